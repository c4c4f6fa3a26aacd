"""`gpu-gpt2 convert`: any model file into any other: exact, all or nothing, in little memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpu_gpt2 import convert
from gpu_gpt2.config import GPT2_VOCAB_SIZE, GPT2Config, ModelConfig, TrainConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats import files, hf, llmc
from gpu_gpt2.formats.llmc_header import MODEL_MAGIC, header_bytes
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.init import InitialWeights
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named
from gpu_gpt2.open_model import open_model, tokenizer_of
from gpu_gpt2.tokenizer import GPT2Tokenizer
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.optimizer import UpdateState

CONFIG = GPT2Config(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
GPT2_TARGETS = ("hf", "llmc-fp32", "llmc-bf16")
Run = Callable[..., tuple[int, str, str]]


def random_arena(config: ModelConfig = CONFIG) -> FloatArray:
    arena = np.random.default_rng(0).standard_normal(parameter_count(config), np.float32)
    named(config, arena)["wte"][config.vocab_size :] = 0
    return arena


def model_file(path: str, dtype: str = "fp32", config: ModelConfig = CONFIG) -> Path:
    llmc.write_model(Path(path), Arena(config, random_arena(config)), dtype)
    return Path(path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_there_and_back_is_byte_for_byte(dtype: str, run: Run) -> None:
    before = model_file("a.bin", dtype).read_bytes()
    for args in (
        ("a.bin", "folder", "--to", "hf"),
        ("folder", "again", "--to", "hf"),
        ("again/model.safetensors", "b.bin", "--to", f"llmc-{dtype}"),
        ("b.bin", "c.bin", "--to", f"llmc-{dtype}"),
    ):
        code, out, err = run("convert", *args)
        assert (code, err) == (0, "")
        assert out.startswith(f"wrote {args[1]}: a GPT-2 of 2 layers of 48, vocabulary 257, ")
    assert Path("b.bin").read_bytes() == Path("c.bin").read_bytes() == before
    for name in (hf.MODEL_FILE, hf.CONFIG_FILE):
        assert Path("folder", name).read_bytes() == Path("again", name).read_bytes()


def test_transformers_opens_what_came_from_llmc(run: Run) -> None:
    model_file("a.bin", "bf16")
    run("convert", "a.bin", "folder", "--to", "hf")
    model = GPT2LMHeadModel.from_pretrained("folder", dtype="auto")
    assert model.dtype == torch.bfloat16
    qkvw = named(CONFIG, load_arena(llmc.open_model(Path("a.bin"))))["qkvw"]
    theirs = model.transformer.h[1].attn.c_attn.weight.detach().float().numpy()
    assert theirs.T.tobytes() == qkvw[1].tobytes()


def test_float32_to_bfloat16_rounds_once(run: Run) -> None:
    model_file("a.bin", "fp32")
    model_file("b.bin", "bf16")
    run("convert", "a.bin", "c.bin", "--to", "llmc-bf16")
    assert Path("c.bin").read_bytes() == Path("b.bin").read_bytes()
    run("convert", "c.bin", "d.bin", "--to", "llmc-fp32")  # exact again
    assert load_arena(open_model("d.bin")).tobytes() == load_arena(open_model("b.bin")).tobytes()


def test_a_run_is_converted_with_its_tokenizer(run: Run) -> None:
    train = TrainConfig(
        data="python-docs", model="nano", device="cpu", dtype="fp32", tokenizer="bytes", steps=100,
        batch_size=2, seq_len=16, total_batch_tokens=64, lr=1e-3, warmup_steps=10,
        weight_decay=0.1, eval_every=0, save_every=0, sample_every=0, seed=7, run_dir="runs/a",
    )  # fmt: skip
    arena = random_arena()
    for step in (10, 20):
        state = checkpoint.TrainingState(
            model=CONFIG, train=train, step=step, tokens=1, loader={}, weights=arena * step,
            m=arena, v=arena, update=UpdateState(updates=step, good_steps=0, loss_scale=1.0),
        )  # fmt: skip
        checkpoint.save(Path("run"), state, GPT2Tokenizer.of_bytes())
    newest = Path("run/step_00000020")
    code, out, err = run("convert", "run", "out", "--to", "hf")
    assert (code, err) == (0, "")
    assert "try it: gpu-gpt2 generate out" in out
    assert sorted(os.listdir("out")) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    for name in os.listdir("out"):
        assert Path("out", name).read_bytes() == (newest / name).read_bytes(), name
    assert run("convert", "run/step_00000010", "a.bin", "--to", "llmc-fp32")[0] == 0
    assert load_arena(open_model("a.bin")).tobytes() == (arena * 10).tobytes()
    for model in ("run", "out", "out/model.safetensors", "a.bin"):
        code, out, err = run("generate", model, "--max-tokens", "0", "--prompt", "a b")
        assert (code, out) == (0, "a b\n"), err
    Path("gpt2_tokenizer.bin").unlink()
    code, _, err = run("generate", "a.bin")
    assert code == 1
    assert "the model has 257 tokens and no tokenizer; only GPT-2's 50257 are known" in err


def test_gpt2s_tokenizer_comes_along_for_its_vocabulary(run: Run) -> None:
    config = GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=1)
    model_file("a.bin", "fp32", config)
    code, out, err = run("generate", "a.bin", "--max-tokens", "0", "--prompt", "a b")
    assert (code, out) == (0, "a b\n"), err
    assert run("convert", "a.bin", "out", "--to", "hf")[0] == 0
    assert tokenizer_of(open_model("out")).name == "gpt2"
    assert json.loads(Path("out/config.json").read_text())["eos_token_id"] == 50256
    Path("out/tokenizer.json").unlink()
    assert tokenizer_of(open_model("out")).name == "gpt2"


def test_without_a_tokenizer_it_says_so(run: Run) -> None:
    model_file("a.bin")
    code, out, _ = run("convert", "a.bin", "out", "--to", "hf")
    assert code == 0
    assert "it has no tokenizer: the source has none, and its vocabulary is not GPT-2's" in out
    assert json.loads(Path("out/config.json").read_text())["eos_token_id"] is None
    assert sorted(os.listdir("out")) == ["config.json", "model.safetensors"]


def test_a_new_model_by_name(run: Run) -> None:
    assert run("convert", "nano", "a.bin", "--to", "llmc-fp32")[0] == 0
    source = open_model("a.bin")
    assert (source.config.vocab_size, source.config.n_embd) == (GPT2_VOCAB_SIZE, 32)
    again = load_arena(open_model("nano"))
    assert load_arena(source).tobytes() == again.tobytes()
    code, _, err = run("convert", "d13", "b.bin", "--to", "llmc-fp32")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "unknown model 'd13'" in err
    Path("nano").mkdir()  # what is there has precedence
    assert "no checkpoint here" in run("convert", "nano", "b.bin", "--to", "llmc-fp32")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a.bin", "b.bin", "--to", "llmc"), "unknown kind of file 'llmc'; choose --to hf | llmc-"),
        (("a.bin", "a.bin", "--to", "llmc-bf16"), "a.bin exists already; name a file that does"),
        (("a.bin", "empty", "--to", "llmc-bf16"), "empty exists already; name a file that does"),
        (("a.bin", "full", "--to", "hf"), "full exists already and is no empty folder; name"),
        (("a.bin", "a.bin", "--to", "hf"), "a.bin exists already and is no empty folder; name"),
        (("a.bin", "no/b", "--to", "hf"), "/no: no such folder; make it first"),
        (("a.bin", "b" * 250, "--to", "hf"), ": File name too long; nothing of it is left"),
        (("c.bin", "b.bin", "--to", "llmc-fp32"), "cannot read the file c.bin: No such file"),
        (("c.safetensors", "b", "--to", "hf"), "c.safetensors: no such file"),
        (("nowhere", "b", "--to", "hf"), "nowhere: no checkpoint here; make one with: gpu-gpt2"),
        (("empty", "b", "--to", "hf"), "empty: no checkpoint here; make one with: gpu-gpt2"),
        (("full", "b", "--to", "hf"), "full is no run and no Hugging Face folder, but holds m.bin "
                                      "(1 such); name that file"),
        (("text.txt", "b", "--to", "hf"), "text.txt is no model; expected a run or"),
        (("old.pt", "b", "--to", "hf"), "old.pt is a pickle, which can run any program when it is "
         "opened, so gpu-gpt2 does not; if you trust it, load it with PyTorch and save the model"),
        (("old", "b", "--to", "hf"), "old/weights.pt is a pickle, which can run any program"),
        (("zipped.bin", "b", "--to", "hf"), "zipped.bin is a pickle, which can run any program"),
        (("pipe", "b", "--to", "hf"), "pipe: no checkpoint here"),
        (("a.bin", "/proc/b.bin", "--to", "llmc-fp32"), "/proc/b.bin"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(
    args: tuple[str, ...], message: str, run: Run
) -> None:
    model_file("a.bin")
    Path("empty").mkdir()
    Path("full").mkdir()
    shutil.copy("a.bin", "full/m.bin")
    Path("text.txt").write_text("x")
    torch.save({}, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({}, "zipped.bin")
    Path("old").mkdir()
    shutil.copy("old.pt", "old/weights.pt")
    os.mkfifo("pipe")
    before = sorted(Path().rglob("*"))
    code, out, err = run("convert", *args)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert message in err
    assert sorted(Path().rglob("*")) == before


def test_an_empty_folder_is_filled(run: Run) -> None:
    model_file("a.bin")
    Path("empty").mkdir()
    assert run("convert", "a.bin", "empty", "--to", "hf")[0] == 0
    assert sorted(os.listdir()) == ["a.bin", "empty"]
    assert load_arena(open_model("empty")).tobytes() == random_arena().tobytes()


def test_a_mounted_disk_cannot_be_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file("a.bin")
    Path("disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    code, _, err = run("convert", "a.bin", "disk", "--to", "hf")
    assert code == 1
    assert "disk is a mounted disk; name a folder inside it" in err
    assert os.listdir("disk") == []


def test_a_disk_too_small_is_noticed_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model_file("a.bin")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(4_300_000))
    monkeypatch.setattr(files, "write_array", None)
    code, _, err = run("convert", "a.bin", "b", "--to", "hf")
    assert code == 1
    assert "b needs up to 4.5 MB, but its disk has 4.3 MB free; free some space or" in err


def fail_late(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes the writing of the twentieth part fail."""
    left = [20]

    def write_array(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise error
        files.write_array(*args)

    for module in (llmc, sys.modules["gpu_gpt2.formats.safetensors"]):
        monkeypatch.setattr(module, "write_array", write_array)


@pytest.mark.parametrize("to", GPT2_TARGETS)
def test_a_disk_that_fills_up_leaves_nothing(
    to: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file("a.bin")
    fail_late(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    code, _, err = run("convert", "a.bin", "b", "--to", to)
    assert code == 1
    assert err.endswith(
        "/b: No space left on device; nothing of it is left, so mend that and try again\n"
    )
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize("to", GPT2_TARGETS)
def test_a_source_that_turns_out_bad_leaves_nothing(to: str, run: Run) -> None:
    model_file("a.bin")
    source = open_model("a.bin")
    os.truncate("a.bin", 100_000)
    with pytest.raises(DataError, match=r"a\.bin: \d+ bytes at offset .* became shorter"):
        convert.convert(source, Path("b"), to, lambda _: None)
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize("failing", ["tokenizer", "sync", "rename"])
def test_a_failure_at_the_end_leaves_nothing(
    failing: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target: dict[str, tuple[Any, str]] = {
        "tokenizer": (GPT2Tokenizer, "save"),
        "sync": (os, "fsync"),
        "rename": (Path, "replace"),
    }
    monkeypatch.setattr(*target[failing], fail)
    code, _, err = run("convert", "nano", "b", "--to", "hf")
    assert code == 1
    assert "/b: Input/output error; nothing of it is left" in err
    assert os.listdir() == []


WAIT_TO_BE_STOPPED = """
import signal, sys, time
from gpu_gpt2.formats import llmc, safetensors
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def wait(*_):
    print("writing", flush=True)
    time.sleep(60)
llmc.write_array = safetensors.write_array = wait
from gpu_gpt2.cli.app import main
sys.argv = ["gpu-gpt2", "convert", "a.bin", "b", "--to", sys.argv[1]]
main()
"""


@pytest.mark.parametrize("to", ["hf", "llmc-bf16"])
def test_ctrl_c_leaves_nothing(to: str, run: Run) -> None:
    model_file("a.bin")
    command = [sys.executable, "-c", WAIT_TO_BE_STOPPED, to]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(os.listdir()) == 2
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"Traceback" not in err
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize("to", GPT2_TARGETS)
@pytest.mark.parametrize("kind", ["llmc", "hf"])
def test_memory_does_not_grow_with_the_model(kind: str, to: str, run: Run) -> None:
    """A model of 50 MB whose largest piece has 1.05 MB; zeros that take no room on the disk."""
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=256, n_layer=16, n_head=4)
    sizes = (64, 97, 16, 4, 256, 128)
    with Path("a.bin").open("wb") as file:
        file.write(header_bytes(MODEL_MAGIC, 3, *sizes))
        file.truncate(1024 + 4 * parameter_count(config))
    if kind == "hf":
        convert.convert(open_model("a.bin"), Path("a"), "hf", lambda _: None)
    source = open_model("a" if kind == "hf" else "a.bin")
    seen: list[int] = []
    tracemalloc.start()
    try:
        convert.convert(source, Path("b"), to, seen.append)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert convert.bytes_of(source) == sum(seen) > 50_000_000
    assert peak < 8_000_000


def test_a_models_own_vocabulary_goes_to_llm_c_and_is_found_there(tmp_path: Path) -> None:
    """Written beside the file, used only by a model of its size, and never written over."""
    config = GPT2Config(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    folder = tmp_path / "hf"
    hf.write_model(folder, InitialWeights(config=config, seed=1))
    GPT2Tokenizer.of_bytes().save(folder)
    convert.convert(open_model(folder), tmp_path / "a.bin", "llmc-fp32", lambda _: None)
    written = (tmp_path / "gpt2_tokenizer.bin").read_bytes()
    assert (
        tokenizer_of(open_model(tmp_path / "a.bin")).tokens() == GPT2Tokenizer.of_bytes().tokens()
    )
    gpt2 = InitialWeights(config=replace(config, vocab_size=50257), seed=1)
    convert.convert(gpt2, tmp_path / "b.bin", "llmc-bf16", lambda _: None)
    assert (tmp_path / "gpt2_tokenizer.bin").read_bytes() == written
    assert tokenizer_of(open_model(tmp_path / "b.bin")).name == "gpt2"
