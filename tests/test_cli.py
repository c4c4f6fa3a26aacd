"""The command line: every mistake is one line and exit code 1; help, info, check and bench work."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cupy_backends.cuda.libs
import numpy as np
import pytest
from checkpoints import seal
from typer.testing import CliRunner

from gpu_gpt2 import settings as settings_module
from gpu_gpt2.cli import app as app_module
from gpu_gpt2.cli import inspect
from gpu_gpt2.cli import train as train_module
from gpu_gpt2.cli.app import app
from gpu_gpt2.config import DEFAULTS, OPTIONS, Option, TrainConfig, defaults_for, device_defaults
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.formats.tokens import write_tokens
from gpu_gpt2.ops import ops_for
from gpu_gpt2.ops.cases import CASES
from gpu_gpt2.train import Outcome

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--model", "nano", "--tokenizer", "bytes", "--batch-size", "2", "--seq-len", "8")


def write_bad_inputs() -> None:
    Path("empty.txt").write_text("")
    Path("latin1.txt").write_bytes(b"caf\xe9 " * 100)
    Path("short.txt").write_text("hello")
    Path("text.txt").write_text("some words\n" * 500)
    tokens = np.arange(3000, dtype=np.uint16) % 100
    tokens[2000] = 50257
    write_tokens(Path("beyond.bin"), tokens)
    Path("cut.bin").write_bytes(Path("beyond.bin").read_bytes()[:-100])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "nowhere.txt"], r"no file /.*/nowhere\.txt; give a text file"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "."], r"holds no token files such as NAME_train\.bin"),
        (["--data", "latin1.txt"], r"latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--data", "short.txt", *SMALL], "too few"),
        (["--data", "cut.bin", "--tokenizer", "gpt2"], r"cut\.bin"),
        (["--data", "beyond.bin", "--tokenizer", "gpt2"], r"beyond\.bin.*50257"),
        (["--data", "text.txt", "--tokenizer", "words"], "words"),
        (["--data", "text.txt", "--tokenizer", "bpe:12"], "bpe:12"),
        (["--data", "text.txt", "--tokenizer", "bpe:x"], "unknown tokenizer 'bpe:x'; choose gpt2,"),
        (["--data", "text.txt", "--model", "gpt5"], "unknown model 'gpt5'; choose one of dN"),
        (["--data", "text.txt", "--steps", "9" * 20], "--steps means more than .* steps; ch"),
        (["--data", "text.txt", "--steps", f"{'9' * 400}epochs", *SMALL], "--steps means more"),
        (["--tokens-per-param", "1e308"], "--tokens-per-param 1e.308 means more than .* steps"),
        (
            ["--data", "text.txt", "--val-data", "python-docs", *SMALL],
            "--val-data takes text or token files, not the built-in text python-docs; name a file",
        ),
        (["--device", "tpu"], "--device must be one of cuda, cpu, emulator, or auto, not 'tpu'"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16, or auto, not 'fp8'"),
        (
            ["--device", "cpu", "--preset", "t4"],  # its dtype is fp16
            "the CPU trains in fp32 only, not fp16; use --dtype fp32",
        ),
        (["--device", "cpu", "--dtype", "bf16"], "the CPU trains in fp32 only"),
        (["--data", "text.txt", "--model", "nano", "--seq-len", "33"], "context of 32"),
        (["--device", "cpu", "--tf32"], "--tf32 is for fp32 on a GPU, not fp32 on cpu"),
        (["--steps", "0"], "--steps must be a whole number >= 1, or epochs as in 3epochs, not 0"),
        (["--batch-size", "0"], "--batch-size must be a whole number >= 1, or auto, not 0"),
        (["--batch-size", "many"], "--batch-size must be a whole number >= 1, or auto, not 'many'"),
        (["--seq-len", "0", "--batch-size", "auto"], "--seq-len must be a whole number >= 1"),
        (["--recompute", "4"], "--recompute must be a whole number from 0 to 3, not 4"),
        (["--lr", "-1"], "--lr must be a finite number > 0, not -1"),
        (["--beta2", "1"], "--beta2 must be a finite number > 0 and < 1, not 1"),
        (["--batch-size", "3", "--total-batch-tokens", "100"], "--total-batch-tokens 100 is not"),
        (["--data", "text.txt", *SMALL, "--run-dir", "/proc/no"], "cannot make the run"),
        (["--batch-size", "1000000000", "--steps", "1"], "x --seq-len = 64,000,000,000 is"),
        (["--data", "text.txt", *SMALL[2:], "--model", "gpt3:c12288"], "GB: use a higher --recomp"),
        (["--resume"], "there is no run in runs/"),
        (["--resume", "--run-dir", "nothing"], "nothing: no checkpoint here"),
    ],
)  # fmt: skip
def test_bad_input_to_train(run: Run, args: list[str], message: str) -> None:
    write_bad_inputs()
    before = sorted(path.name for path in Path().iterdir())
    if "--device" not in args:
        args = [*args, "--device", "cpu"]
    code, _, err = run("train", *args)
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert re.search(message, err), err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_gpu_where_there_is_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = run("train", "--device", "cuda")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert re.search(r"no usable NVIDIA GPU here \(.+\); check that nvidia-smi lists one", err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: no checkpoint here; make one with: gpu-gpt2 train"),
        (["."], "no checkpoint here"),
    ],
)
def test_bad_input_to_generate(run: Run, args: list[str], message: str) -> None:
    code, _, err = run("generate", *args)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_message_names_auto_only_where_the_command_takes_it(run: Run) -> None:
    code, _, err = run("bench", "step", "--batch-size", "0")
    assert (code, err) == (1, "gpu-gpt2: --batch-size must be a whole number >= 1, not 0\n")


def test_train_then_generate(run: Run) -> None:
    Path("text.txt").write_text("to be or not to be\n" * 500)
    code, out, _ = run(
        "train", "--data", "text.txt", *SMALL, "--steps", "300", "--device", "cpu", "--lr", "0.01"
    )
    assert code == 0
    assert "saved runs/001/step_00000300" in out
    prompt = ("--prompt", "to be or", "--temperature", "0", "--max-tokens", "11")
    prompt = (*prompt, "--truncate-prompt")  # it has 9 tokens, and the context 8
    code, out, _ = run("generate", "runs/001", *prompt, "--device", "cpu")
    assert code == 0
    assert out == "to be or not to be\n\n"
    code, again, _ = run("generate", "runs/001/step_00000300", *prompt, "--device", "cpu")
    assert again == out
    code, out, _ = run("train", "--data", "text.txt", *SMALL, "--steps", "1", "--device", "cpu")
    assert "saved runs/002/step_00000001" in out


def test_a_small_model_gets_a_sequence_it_can_hold(run: Run) -> None:
    Path("text.txt").write_text("to be or not to be\n" * 500)
    code, out, err = run(
        "train", "--data", "text.txt", "--model", "nano", "--tokenizer", "bytes", "--steps", "1",
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "8 x 32" in out


def test_resume_and_generate_refuse_what_does_not_fit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text.txt").write_text("to be or not to be\n" * 500)
    train = ("train", "--data", "text.txt", "--steps", "2", "--device", "cpu")
    for folder, options in (("bytes run", SMALL), ("bpe", (*SMALL, "--tokenizer", "bpe:260"))):
        code, out, err = run(*train, *options, "--run-dir", folder)
        assert code == 0, err
    assert "gpu-gpt2 generate bpe" in out
    # All is done already; a precision the device lacks; a path with a blank is quoted.
    code, _, err = run("train", "--resume", "--run-dir", "bytes run")
    assert code == 1
    assert "is at step 2 already; give a higher --steps" in err
    code, _, err = run("train", "--resume", "--run-dir", "bytes run", "--dtype", "bf16")
    assert code == 1
    more = ("--steps", "3", "--recompute", "2")
    code, out, err = run("train", "--resume", "--run-dir", "bytes run", *more)
    assert code == 0, err
    assert "gpu-gpt2 generate 'bytes run' --prompt" in out
    # On another device a run is resumed in the one dtype of every device.
    written = Path("bytes run/step_00000003/training.json")
    for name, value in (("device", "cuda"), ("dtype", "fp32"), ("tf32", True)):
        training = json.loads(written.read_text())
        training["train"][name] = value
        written.write_text(json.dumps(training))
    seal(written.parent)
    code, _, err = run(
        "train", "--resume", "--run-dir", "bytes run", "--steps", "4", "--device", "cpu"
    )
    assert code == 0, err
    settings = json.loads(Path("bytes run/step_00000004/training.json").read_text())["train"]
    assert settings["recompute"] == 2
    assert (settings["device"], settings["dtype"], settings["tf32"]) == ("cpu", "fp32", False)
    # The data is found from another folder too.
    there = Path("bytes run").resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, _, err = run("train", "--resume", "--run-dir", str(there), "--steps", "5")
    assert code == 0, err
    monkeypatch.chdir("..")
    Path("text.txt").write_text("other words\n" * 500)
    code, _, err = run("train", "--resume", "--run-dir", "bytes run", "--steps", "9")
    assert code == 1
    assert "not those of the saved run" in err
    # A tokenizer of another model.
    other = Path("bytes run/step_00000004/tokenizer.json").read_bytes()
    Path("bpe/step_00000002/tokenizer.json").write_bytes(other)
    code, _, err = run("generate", "bpe", "--device", "cpu")
    assert code == 1
    assert "its tokenizer has 257 tokens, the model 260" in err


def test_a_resumed_run_keeps_settings_that_are_not_given() -> None:
    run = {"run_dir": "run", "tf32": True, "recompute": 2}
    saved = TrainConfig(**{**defaults_for("cpu"), **run}, device="cuda", dtype="fp32")
    state = SimpleNamespace(train=saved, step=1, model=None)
    with pytest.MonkeyPatch.context() as patch:
        gpu = SimpleNamespace(name="cuda", dtypes=DTYPES)
        patch.setattr(settings_module, "open_device", lambda name: gpu)
        resumed = settings_module.resumed_config(
            state, Path("run/step_1"), {"steps": "2000", "device": "auto"}
        )
    assert resumed == replace(saved, steps=2000)


def test_generated_text_is_printed_as_it_is(run: Run) -> None:
    Path("text.txt").write_text("to be or not to be\n" * 500)
    run("train", "--data", "text.txt", *SMALL, "--steps", "1", "--device", "cpu")
    prompt = "[bold]a[/bold] :smile:\tb"
    options = ("--truncate-prompt", "--max-tokens", "0")
    code, out, err = run("generate", "runs/001", "--prompt", prompt, *options)
    assert code == 0, err
    assert out == prompt + "\n"


def test_info_says_what_would_be_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, _ = run("info")
    assert code == 0
    for part in ("gpu-gpt2", "kernels", "CuPy", "NVRTC", "libnvrtc", "cuBLAS", "emulator"):
        assert part in out
    assert re.search(r"train would use +cpu, fp32", out)
    assert "! no usable NVIDIA GPU here" in out


def test_info_names_a_missing_library(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cupy_backends.cuda.libs, "cublas", raising=False)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.cublas", None)
    code, out, _ = run("info")
    assert code == 0
    assert re.search(r"cuBLAS +not usable", out)
    assert re.search(r"! cuBLAS cannot be opened: pip install nvidia-cublas(-cu12)?\n", out)


def test_check_passes_on_the_cpu(run: Run) -> None:
    code, out, _ = run("check", "--device", "cpu")
    assert code == 0
    counted = re.search(r"(\d+) of (\d+) checks passed on cpu", out)
    assert counted
    assert counted[1] == counted[2]
    assert int(counted[1]) > 50


def test_check_runs_the_kernels_where_there_is_no_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "has_gpu", lambda: False)
    monkeypatch.setattr(inspect, "CASES", [c for c in CASES if "gelu_fwd" in str(c)][:1])
    code, out, _ = run("check")
    assert code == 0
    assert "3 of 3 checks passed on emulator" in out  # in three dtypes


def test_check_fails_when_an_op_is_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops_for(CpuDevice(), "fp32").__class__.gelu_fwd

    def wrong(self: object, y: np.ndarray, x: np.ndarray, b: np.ndarray) -> None:
        right(self, y, x, b)
        if y.dtype == np.float32:
            y.reshape(-1)[-1] += 1e-3

    monkeypatch.setattr(ops_for(CpuDevice(), "fp32").__class__, "gelu_fwd", wrong)
    monkeypatch.setattr(inspect, "CASES", [c for c in CASES if "gelu_fwd" in str(c)][:1])
    code, out, _ = run("check", "--device", "cpu")
    assert code == 1
    assert "0 of 1 checks passed" in out


def test_out_of_memory_is_said_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError("8 GiB for an array")

    monkeypatch.setattr(app_module, "app", fail)
    code, _, err = run("generate", "x")
    assert code == 1
    assert err == (
        "gpu-gpt2: out of memory (8 GiB for an array); use a smaller model, or smaller numbers for "
        "--batch-size and --seq-len, or in generate for --num-samples and --max-tokens\n"
    )


def help_of(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0, shown
    return shown.output


def squeezed(text: str) -> str:
    """The text without white space, so that it does not matter where its lines are broken."""
    return "".join(text.split())


def test_help_names_every_command() -> None:
    out = help_of()
    for command in ("train", "generate", "chat", "plan", "info", "check", "bench"):
        assert re.search(rf"^  {command} +[A-Z]", out, re.MULTILINE), command
    assert "Data sets and model files:\n" in out


def test_help_lists_every_setting_with_its_default_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = help_of("train")
    assert max(map(len, out.splitlines())) <= 80
    shown = squeezed(out)
    defaults = {
        **{name: f"default: {v}" for name, v in DEFAULTS.items() if v is not False and v != ""},
        **{name: f"default on cpu: {value}" for name, value in device_defaults("cpu").items()},
        "device": "default: auto, here cpu",
        "dtype": "default: auto, here fp32",
    }
    for option in OPTIONS.values():
        assert f"\n{option.group}:\n" in out
        auto = f"auto: {option.auto}." if option.auto else ""
        value = option.metavar or "|".join(option.choices)
        value += "|auto" if option.auto else ""
        text = f"{option.flag} {value} {option.help} {auto}"
        if option.name in defaults:
            text += f"[{defaults[option.name]}]"
        assert squeezed(text) in shown


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError])
def test_help_survives_a_broken_cupy(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(name: str) -> None:
        raise error("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(train_module, "open_device", broken)
    assert "[default on cpu: 0.001]" in help_of("train")


def other_value(option: Option) -> str:
    """A value on the command line that is allowed, and not the default on a CPU."""
    default = defaults_for("cpu").get(option.name)
    if option.choices:
        return next(choice for choice in option.choices if choice not in ("cpu", "fp32", default))
    if option.kind is str:
        return "gpt2"
    return str(default + 1 if option.kind is int else default / 2 or 0.5)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "run_dir"])
def test_resume_changes_what_may_change_and_nothing_else(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    option = OPTIONS[name]
    saved = TrainConfig(**defaults_for("cpu"), device="cpu", dtype="fp32", run_dir="run")
    state = SimpleNamespace(train=saved, step=1, model=None)
    monkeypatch.setattr(train_module.checkpoint, "latest", lambda path: path / "step_1")
    monkeypatch.setattr(train_module.checkpoint, "load", lambda folder: state)
    monkeypatch.setattr(settings_module, "open_device", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(settings_module, "choose_dtype", lambda name, device: name)
    resumed = []

    def fake_training(config: TrainConfig, *_: object) -> Outcome:
        resumed.append(config)
        return Outcome(Path("run/step_9"), 9, interrupted=False)

    monkeypatch.setattr(train_module, "run_training", fake_training)
    value = () if option.kind is bool else (other_value(option),)
    more = {  # options that others need
        "tf32": ("--device", "cuda"),
        "hellaswag_every": ("--hellaswag", "file"),
        "keep_every": ("--save-every", "1"),
    }.get(name, ())
    code, _, err = run("train", "--resume", "--run-dir", "run", option.flag, *value, *more)
    if option.resumable:
        assert code == 0, err
        assert getattr(resumed[0], name) != getattr(saved, name)
    else:
        assert code == 1
        before = f"{option.flag} is {getattr(saved, name)!r} in the run, "
        assert f"the settings that it was started with: {before}" in err
        assert err.endswith(f"was given; leave out {option.flag}\n")
        assert len(err.splitlines()) == 1
