"""A whole run: what it writes, how it goes on, how it ends when something is wrong."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import new_model, quiet, train_settings

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.device.base import AsyncRead
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import ConfigError, TrainingError
from gpu_gpt2.formats.tokens import write_tokens
from gpu_gpt2.models.decoder import Decoder
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.weights import load_arena
from gpu_gpt2.open_model import open_model
from gpu_gpt2.train import Run, train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.metrics import RunLog
from gpu_gpt2.training.optimizer import AdamW, PendingStep, StepResult
from gpu_gpt2.training.stop_signal import StopSignal

TEXT = "".join(f"{i} squared is {i * i}, and the cube of {i} is {i**3}.\n" for i in range(300))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own cache and its own place for runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("numbers.txt").write_text(TEXT)


def settings(**changes: object) -> TrainConfig:
    return train_settings(**{"data": "numbers.txt", **changes})


def metrics(run: str = "run") -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def cli(*args: str, **kwargs: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_gpt2", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def test_metrics_checkpoints_and_learning() -> None:
    outcome = train(settings(steps=60), quiet())
    assert (outcome.step, outcome.interrupted) == (60, False)
    records = metrics()
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s"}
    assert steps[0]["tokens_per_s"] == pytest.approx(256 / steps[0]["step_ms"] * 1000)
    assert steps[0]["loss"] == pytest.approx(np.log(257), abs=0.2)
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [*range(0, 60, 4), 60]
    assert evaluations[-1]["val_loss"] < 0.6 * evaluations[0]["val_loss"]
    # A byte is a token here, so bits per byte are the loss in bits.
    ratio = evaluations[-1]["val_bits_per_byte"] / evaluations[-1]["val_loss"]
    assert ratio == pytest.approx(1 / np.log(2), rel=0.01)
    assert [path.name for path in checkpoint.checkpoints(Path("run"))] == [
        "step_00000056",
        "step_00000060",
    ]


def test_the_checkpoint_is_a_hugging_face_model_with_the_same_logits() -> None:
    folder = train(settings(), quiet()).checkpoint
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = np.array(tokenizer("4 squared is 16")["input_ids"], np.int32)
    source = open_model(folder)
    config, weights = source.config, load_arena(source)
    ours = new_model(config, B=1, T=32, training=False)
    ours.load(weights)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids[None]).long()).logits[0].numpy()
    actual = ours.forward(ids[None])[:, : config.vocab_size]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_checkpoint_is_written_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    download = CpuDevice.download

    def counting(self: CpuDevice, src: np.ndarray) -> np.ndarray:
        copied.append(src.size)
        return download(self, src)

    monkeypatch.setattr(CpuDevice, "download", counting)
    config = checkpoint.load(train(settings(), quiet()).checkpoint).model
    assert max(copied) < parameter_count(config)


@pytest.mark.parametrize("recompute", [0, 3])
def test_a_resumed_run_ends_like_an_uninterrupted_one(recompute: int) -> None:
    whole = train(settings(run_dir="whole"), quiet()).checkpoint
    # The same run, stopped after four of eight steps by taking its later checkpoint away.
    train(settings(run_dir="parts"), quiet())
    first, last = checkpoint.checkpoints(Path("parts"))
    assert first.name == "step_00000004"
    # A crash may leave half a record behind, and records of steps that will be done again.
    with Path("parts", "metrics.jsonl").open("a") as file:
        file.write('not JSON\n{"step": 9, "lo')
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    state = checkpoint.load(first)
    parts = train(replace(state.train, recompute=recompute), quiet(), state).checkpoint
    a, b = checkpoint.load(whole), checkpoint.load(parts)
    for name in ("weights", "m", "v"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.update == b.update
    assert (a.update.updates, a.update.good_steps, a.update.loss_scale) == (8, 8, 1.0)
    losses = [[r["loss"] for r in metrics(run) if "loss" in r] for run in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The events of a run in order: steps enqueued and read, saves, evaluations, samples."""
    events: list[str] = []
    numbers: dict[int, int] = {}  # of the step that each handle belongs to
    handles = []  # kept, so that no two have the same id

    def note(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, noted)

    step, result = AdamW.step, PendingStep.result

    def enqueuing(self: AdamW, *args: Any, **kwargs: Any) -> PendingStep:
        handle = step(self, *args, **kwargs)
        handles.append(handle)
        numbers[id(handle)] = len(handles)
        events.append(f"enqueue {len(handles)}")
        return handle

    def reading(self: PendingStep) -> StepResult:
        events.append(f"read {numbers[id(self)]}")
        return result(self)

    monkeypatch.setattr(AdamW, "step", enqueuing)
    monkeypatch.setattr(PendingStep, "result", reading)
    note(Run, "_start_saving", "save")
    note(RunLog, "validation", "evaluate")
    note(RunLog, "sample", "sample")
    return events


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a device whose launches return at once."""
    monkeypatch.setattr(CpuDevice, "is_async", True)


@pytest.mark.usefixtures("asynchronous")
def test_a_step_is_read_after_the_next_is_enqueued(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = train(settings(steps=5, eval_every=3, save_every=3), quiet()).checkpoint
    assert events == [
        "evaluate",
        "enqueue 1", "enqueue 2", "read 1", "enqueue 3", "read 2", "read 3", "save", "evaluate",
        "enqueue 4", "enqueue 5", "read 4", "read 5", "save", "evaluate", "sample",
    ]  # fmt: skip
    monkeypatch.setattr(CpuDevice, "is_async", False)
    usual = train(
        settings(steps=5, eval_every=3, save_every=3, run_dir="usual"), quiet()
    ).checkpoint
    keys = ("step", "loss", "lr", "grad_norm", "val_loss")
    records = [
        [{key: r[key] for key in keys if key in r} for r in metrics(run)]
        for run in ("run", "usual")
    ]
    assert records[0] == records[1]
    a, b = checkpoint.load(late), checkpoint.load(usual)
    assert (a.weights == b.weights).all()
    assert (a.loader, a.update) == (b.loader, b.update)


def test_everything_that_is_due_is_done_once(events: list[str]) -> None:
    train(settings(steps=4, eval_every=2, save_every=2, sample_every=4), quiet())
    assert events == [
        "evaluate",
        "enqueue 1", "read 1", "enqueue 2", "read 2", "save", "evaluate",
        "enqueue 3", "read 3", "enqueue 4", "read 4", "save", "evaluate", "sample",
    ]  # fmt: skip
    events.clear()
    state = checkpoint.load(checkpoint.checkpoints(Path("run"))[0])
    train(replace(state.train, steps=3), quiet(), state)
    assert events == ["enqueue 5", "read 5", "save", "evaluate", "sample"]


def test_a_state_beyond_the_last_step_is_not_trained_on() -> None:
    state = checkpoint.load(train(settings(steps=4), quiet()).checkpoint)
    outcome = train(replace(state.train, steps=3), quiet(), state)
    assert (outcome.step, outcome.interrupted) == (4, False)


@pytest.mark.usefixtures("asynchronous")
def test_an_interrupted_run_reads_every_step_then_saves_and_does_no_more(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = Model.forward_backward

    def fourth_interrupts(self: Model, *args: Any, **kwargs: Any) -> Any:
        if events and events[-1] == "read 2":
            signal.raise_signal(signal.SIGINT)
        return forward_backward(self, *args, **kwargs)

    monkeypatch.setattr(Model, "forward_backward", fourth_interrupts)
    outcome = train(settings(total_batch_tokens=128), quiet())
    assert (outcome.step, outcome.interrupted) == (4, True)
    assert events[-4:] == ["enqueue 4", "read 3", "read 4", "save"]
    assert metrics()[-1]["step"] == checkpoint.load(outcome.checkpoint).step == 4


def test_a_second_interrupt_does_not_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write, forward_backward = checkpoint._write, Model.forward_backward
    writing, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> None:
        writing.set()
        go_on.wait()
        write(*args)

    def interrupted(self: Model, *args: Any, **kwargs: Any) -> Any:
        if writing.is_set():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return forward_backward(self, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "_write", slow)
    monkeypatch.setattr(Model, "forward_backward", interrupted)
    late = threading.Timer(10, go_on.set)
    late.start()
    with pytest.raises(KeyboardInterrupt):
        train(settings(steps=1000, save_every=2), quiet())
    assert not go_on.is_set()
    late.cancel()
    threads = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    go_on.set()
    for thread in threads:
        thread.join()  # before the folder of the test is removed


@pytest.mark.parametrize(("during", "expected"), [("validation", "evaluate"), ("sample", "sample")])
def test_an_interrupt_in_a_pause_does_not_save_twice(
    events: list[str], monkeypatch: pytest.MonkeyPatch, during: str, expected: str
) -> None:
    log = getattr(RunLog, during)

    def interrupts(self: RunLog, step: int, *args: Any, **kwargs: Any) -> None:
        log(self, step, *args, **kwargs)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, during, interrupts)
    outcome = train(settings(eval_every=2, save_every=2, sample_every=2), quiet())
    assert (outcome.step, outcome.interrupted) == (2, True)
    assert events[-1] == expected
    assert events.count("save") == 1


def test_a_signal_ends_a_sample_early(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0
    read_tokens = Decoder.read_tokens

    def interrupts(self: Decoder) -> AsyncRead:
        nonlocal drawn
        drawn += 1
        if drawn == 3:
            signal.raise_signal(signal.SIGINT)
        return read_tokens(self)

    monkeypatch.setattr(Decoder, "read_tokens", interrupts)
    outcome = train(settings(save_every=2, sample_every=2, sample_tokens=1000), quiet())
    assert (outcome.step, outcome.interrupted, drawn) == (2, True, 3)
    assert "sample" not in events


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_ends_a_validation_early_and_resuming_makes_up_for_it(
    number: signal.Signals, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, validate = Model.add_losses, Run.validate
    before = signal.getsignal(number)
    batches = 0

    def signalled(self: Model, *args: Any, **kwargs: Any) -> Any:
        nonlocal batches
        batches += 1
        signal.raise_signal(number)
        return losses(self, *args, **kwargs)

    def validating(self: Run) -> None:
        if self.step == step:
            patched.setattr(Model, "add_losses", signalled)
        validate(self)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "validate", validating)
        outcome = train(settings(), quiet())
    assert batches == 1  # the validation has several, and the first one is the last
    assert (outcome.step, outcome.interrupted) == (step, True)
    assert signal.getsignal(number) is before
    validations = [r["step"] for r in metrics() if "val_loss" in r]
    assert validations == list(range(0, step, 4))
    state = checkpoint.load(outcome.checkpoint)
    assert not train(state.train, quiet(), state).interrupted
    assert [r["step"] for r in metrics() if "val_loss" in r] == [0, 4, 8]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup, which lets a run go on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(quiet()) as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_pauses_are_not_part_of_step_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_gpt2.run.validation_loss", lambda *_, **__: time.sleep(0.3) or 1.0)
    train(settings(steps=3, eval_every=1), quiet())
    assert max(r["step_ms"] for r in metrics() if "loss" in r) < 300


@pytest.mark.usefixtures("asynchronous")
def test_a_late_reading_names_the_step_that_diverged(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = PendingStep.result

    def second_diverges(self: PendingStep) -> StepResult:
        found = result(self)
        return replace(found, grad_norm=math.inf) if events[-1] == "read 2" else found

    monkeypatch.setattr(PendingStep, "result", second_diverges)
    with pytest.raises(TrainingError, match=r"step 2: loss 5\.\d+, gradient norm inf: "):
        train(settings(), quiet())
    assert events == ["evaluate", "enqueue 1", "enqueue 2", "read 1", "enqueue 3", "read 2"]
    assert [r["step"] for r in metrics()] == [0, 1]


def test_micro_batches_do_not_change_the_first_update() -> None:
    """With text for 8 rows alone, four batches of 2 see what one of 8 sees."""
    rng = np.random.default_rng(0)
    write_tokens(Path("x_train.bin"), rng.integers(0, 256, 8 * 32 + 1))
    write_tokens(Path("x_val.bin"), rng.integers(0, 256, 40))
    once = {"data": "x_train.bin", "steps": 1}
    one = train(settings(batch_size=8, run_dir="one", **once), quiet()).checkpoint
    four = train(settings(batch_size=2, run_dir="four", **once), quiet()).checkpoint
    loss = [metrics(run)[1]["loss"] for run in ("one", "four")]
    assert loss[0] == pytest.approx(loss[1], rel=1e-6)
    a, b = checkpoint.load(one), checkpoint.load(four)
    assert np.abs(a.m - b.m).max() < 1e-6 * np.abs(a.m).max()
    # m starts at 0 and has seen one clipped gradient: (1 - beta1) times a vector of norm 1.
    assert np.linalg.norm(a.m) == pytest.approx(0.1 * min(1.0, metrics("one")[1]["grad_norm"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lr": 1e4},
            r"norm inf; squared_norm of .* overflows.*: training diverged; the newest .* run/step_",
        ),
        ({"lr": 1e30}, r"step 1: validation loss nan: training diverged"),
        ({"lr": 1e39, "steps": 1}, r"step 1: a weight is no longer .* no checkpoint was saved"),
    ],
)
def test_a_diverging_run_saves_nothing_broken(change: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(
            settings(
                **{"warmup_steps": 0, "steps": 20, "eval_every": 1, "save_every": 1, **change}
            ),
            quiet(),
        )
    for folder in checkpoint.checkpoints(Path("run")):
        assert np.isfinite(checkpoint.load(folder).weights).all()


def test_a_run_in_use_is_left_alone() -> None:
    first = cli("train", *OPTIONS, "--steps", "100000")
    wait_for_steps(first)
    with pytest.raises(ConfigError, match="run is in use by another training"):
        train(settings(), quiet())
    first.kill()
    first.communicate()
    train(settings(), quiet())  # the lock ends with its process


OPTIONS = (
    "--data", "numbers.txt", "--model", "nano", "--tokenizer", "bytes", "--device", "cpu",
    "--batch-size", "2", "--seq-len", "32", "--run-dir", "run",
)  # fmt: skip


def wait_for_steps(process: subprocess.Popen[str]) -> None:
    file = Path("run", "metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = cli("train", *OPTIONS, "--steps", "100000")
    wait_for_steps(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this step; Ctrl-C again stops at once" in out
    assert "gpu-gpt2 train --resume --run-dir run" in out
    saved = checkpoint.load(checkpoint.latest(Path("run"))).step
    assert saved == metrics()[-1]["step"] > 3

    refused = cli("train", *OPTIONS)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "already holds a run; resume it with --resume" in err
    other = cli("train", "--resume", "--run-dir", "run", "--lr", "0.5")
    _, err = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "leave out --lr" in err
    resumed = cli("train", "--resume", "--run-dir", "run", "--steps", str(saved + 2))
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert [r["step"] for r in metrics() if "loss" in r] == list(range(1, saved + 3))


def test_a_run_whose_output_nobody_reads_any_more_saves_and_stops() -> None:
    """As `gpu-gpt2 train | head` does."""
    process = cli("train", *OPTIONS, "--steps", "100000", "--eval-every", "1")
    wait_for_steps(process)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 130
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert checkpoint.load(checkpoint.latest(Path("run"))).step == metrics()[-1]["step"] > 0


def test_a_run_needs_no_output() -> None:
    process = cli("train", *OPTIONS, "--steps", "2", preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudoterminals")
def test_a_run_whose_terminal_is_gone_without_a_signal_goes_on() -> None:
    """As that of a job that the shell has disowned."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_gpt2", "train", *OPTIONS, "--steps", "500"],
        stdout=theirs, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    wait_for_steps(process)
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert checkpoint.latest(Path("run")).name == "step_00000500"


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = cli(
        "train", "--data", "numbers.txt", "--model", "nano", "--tokenizer", "bytes",
        "--device", "cpu", "--steps", "2", "--batch-size", "2", "--seq-len", "8",
        "--run-dir", "run",
        preexec_fn=small_files,
    )  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert err.startswith("gpu-gpt2: cannot write checkpoint run/step_00000002: File too large")
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "main.log", "metrics.jsonl", "settings.toml",
    ]  # fmt: skip


def test_state_covers_every_parameter() -> None:
    folder = train(settings(steps=1), quiet()).checkpoint
    state = checkpoint.load(folder)
    assert state.tokens == 256
    assert state.weights.size == parameter_count(state.model)
    assert state.v.any()


def test_a_prompt_that_is_no_utf_8_is_shown_with_a_mark() -> None:
    """The command line may have any bytes; Python makes lone surrogates of them."""
    train(settings(steps=1, sample_prompt="caf\udce9", sample_tokens=3), quiet())
    assert 'sample_prompt = "caf?"' in Path("run", "settings.toml").read_text("utf-8")
