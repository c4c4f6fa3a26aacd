"""What fits into how much memory."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import llama2c_models
import numpy as np
import psutil
import pytest
from rich.console import Console

from gpu_gpt2.config import (
    MODELS,
    GPT2Config,
    LlamaConfig,
    ModelConfig,
    TrainConfig,
    model_config,
)
from gpu_gpt2.device.base import FLOAT32, X_DTYPES
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.decoder import Decoder
from gpu_gpt2.models.families import activations, new_model
from gpu_gpt2.ops import ops_for
from gpu_gpt2.ops.table import WINDOW
from gpu_gpt2.settings import _fitting, new_config
from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.memory import (
    CUDA_OVERHEAD,
    ENOUGH_TOKENS,
    RECOMPUTE_LEVELS,
    best_fit,
    check_fits,
    largest_batch,
    memory_plan,
    parse_bytes,
    planned_bytes,
)
from gpu_gpt2.training.muon import OPTIMIZERS

SMALL = GPT2Config(vocab_size=67, n_positions=16, n_embd=32, n_layer=3, n_head=2)
# The packed rows of its queries, keys and values are narrower than the gate and up projection.
SMALL_LLAMA = LlamaConfig(
    vocab_size=67, n_positions=80, n_embd=32, n_layer=3, n_head=4, n_kv_head=2, n_inner=40,
    tie_word_embeddings=False,
)  # fmt: skip


RECOMPUTED = [(level, "adamw") for level in RECOMPUTE_LEVELS]


def test_bytes_counted_by_hand() -> None:
    """One layer, one channel: 18 bytes a parameter in bf16, 16 in fp32, and N Vp logits."""
    config = GPT2Config(vocab_size=128, n_positions=2, n_embd=1, n_layer=1, n_head=1)
    n = 128 + 2 + 12 + 13 + 2  # wte, wpe, matrices, vectors of the layer, last layernorm
    rows = dict(memory_plan(config, "bf16", 3, 2, 0).rows)
    assert rows["weights"] == 2 * n
    assert rows["master weights, float32"] == rows["gradients, float32"] == 4 * n
    assert rows["optimizer state, float32"] == 8 * n
    assert rows["logits"] == 6 * 128 * 2
    assert "angles of RoPE, float32" not in rows
    assert "master weights, float32" not in dict(memory_plan(config, "fp32", 3, 2, 0).rows)


def test_bytes_of_muon_counted_by_hand() -> None:
    """Only m of the 12 C^2 elements of the matrices; X of the widest matrix, Gram of C x C."""
    config = GPT2Config(vocab_size=128, n_positions=2, n_embd=16, n_layer=3, n_head=1)
    adamw, muon = (
        dict(memory_plan(config, "bf16", 3, 2, 0, optimizer=name, host_copies=True).rows)
        for name in ("adamw", "muon")
    )
    saved = 4 * 3 * 12 * 16 * 16
    assert adamw["optimizer state, float32"] - muon["optimizer state, float32"] == saved
    assert adamw["checkpoint copies"] - muon["checkpoint copies"] == saved
    assert muon["optimizer scratch"] == 2 * 2 * 64 * 16 + (2 + 4 + 2) * 16 * 16
    del adamw["optimizer state, float32"], adamw["checkpoint copies"]
    assert adamw.items() <= muon.items()


def test_the_angles_of_rope_are_counted_for_the_length_of_the_sequences() -> None:
    rows = dict(memory_plan(SMALL_LLAMA, "bf16", 3, 20, 0).rows)
    assert rows["angles of RoPE, float32"] == 20 * 8 * 4


@pytest.mark.parametrize(
    "config", [SMALL, SMALL_LLAMA, replace(SMALL_LLAMA, n_kv_head=4, n_inner=32)]
)
@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize(("recompute", "optimizer"), [(0, "muon"), *RECOMPUTED])
def test_the_plan_is_what_is_allocated(
    recompute: int, optimizer: str, dtype: str, config: ModelConfig
) -> None:
    allocated = []

    class Counting(EmulatorDevice):
        def empty(self, shape: tuple[int, ...], dtype: object) -> np.ndarray:
            allocated.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return super().empty(shape, dtype)

        def zeros(self, shape: tuple[int, ...], dtype: object) -> np.ndarray:
            allocated.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return super().zeros(shape, dtype)

    ops = ops_for(Counting(), dtype)
    T = config.n_positions
    model = new_model(config, ops, max_batch=3, max_seq_len=T, recompute=recompute)
    OPTIMIZERS[optimizer](model)
    Decoder(model, batch=1, length=T)
    planned = planned_bytes(config, dtype, 3, T, recompute, optimizer=optimizer)
    # Besides, the optimizer has the two windows of its spike detector and the decoder the logits
    # of one token, and both have a few numbers.
    windows = 2 * WINDOW * FLOAT32.itemsize + config.padded_vocab_size * X_DTYPES[dtype].itemsize
    assert planned + windows <= sum(allocated) <= planned + windows + 1024


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", RECOMPUTE_LEVELS)
def test_no_float32_tensor_as_large_as_the_logits(name: str, recompute: int) -> None:
    config = model_config(name)
    T = config.n_positions
    specs = activations(config, 7, T, recompute=recompute)
    logits = 7 * T * config.vocab_size
    assert [spec.name for spec in specs if spec.dtype == "float32" and spec.size >= logits] == []


@pytest.mark.parametrize(("model", "memory"), [("gpt2", "8GB"), ("gpt2-xl", "80GB")])
def test_trains_at_its_full_context_in(model: str, memory: str) -> None:
    usable = parse_bytes(memory) - CUDA_OVERHEAD
    fit = best_fit(model_config(model), "bf16", 1024, usable)
    assert fit.batch_size >= 4
    assert fit.recompute == 0
    assert fit.total <= usable


def test_the_largest_batch_is_the_largest() -> None:
    memory = planned_bytes(SMALL, "bf16", 37, 16, 1)
    assert largest_batch(SMALL, "bf16", 16, 1, memory) == 37
    assert largest_batch(SMALL, "bf16", 16, 1, memory - 1) == 36
    assert largest_batch(SMALL, "bf16", 16, 1, memory, sequences=64) == 32
    assert largest_batch(SMALL, "bf16", 16, 1, memory, sequences=37) == 37
    assert largest_batch(SMALL, "bf16", 16, 1, 1000) == 0


def test_the_level_is_no_higher_than_it_must_be() -> None:
    def memory(batch_size: int, level: int) -> int:
        return planned_bytes(SMALL, "bf16", batch_size, 16, level)

    def fit(size: int, sequences: int) -> tuple[int, int]:
        found = best_fit(SMALL, "bf16", 16, size, sequences=sequences)
        return found.batch_size, found.recompute

    assert fit(memory(8, 0), 8) == (8, 0)
    assert fit(memory(8, 0) - 1, 8) == (8, 1)
    assert fit(memory(8, 2), 8) == (8, 2)
    assert fit(memory(8, 3), 8) == (8, 3)
    assert fit(memory(2, 3), 8) == (2, 3)
    enough = ENOUGH_TOKENS // 16
    assert fit(memory(enough, 0), 4 * enough) == (enough, 0)  # although level 3 would hold more


def test_what_does_not_fit_says_what_is_needed() -> None:
    with pytest.raises(
        ConfigError, match=r"--recompute 3 needs \d\.\d\d GB, .*: use a smaller --seq"
    ):
        best_fit(model_config("gpt2"), "bf16", 1024, 10**9)
    with pytest.raises(
        ConfigError, match=r"--recompute 1 needs .*: use a higher --recompute, or a"
    ):
        best_fit(model_config("gpt2"), "bf16", 1024, 10**9, recompute=1)


def test_what_is_needed_counts_the_headroom() -> None:
    """The size named is one that fits: the GPU's memory, not what is left of it."""
    least = planned_bytes(SMALL, "bf16", 1, 16, 3)
    message = f"needs {(least + 10**9) / 1e9:.2f} GB, and there are 1000.0 MB: use"
    with pytest.raises(ConfigError, match=message):
        best_fit(SMALL, "bf16", 16, 10**9 - 1, headroom=10**9)
    assert best_fit(SMALL, "bf16", 16, least + 10**9, headroom=10**9).batch_size == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9), ("8 gib", 8 * 2**30), ("512MB", 512 * 10**6), ("1.5TB", 15 * 10**11),
        ("24e9B", 24 * 10**9), ("1000B", 1000), ("2KiB", 2048),
    ],
)  # fmt: skip
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "8", "8 parsecs", "-8GB", "1.2.3GB", "8GB 8GB", "nan", "1e400GB"]
)
def test_refuses_other_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="as memory; write 8GB"):
        parse_bytes(text)


def test_batch_size_auto_fills_the_memory_with_a_divisor_of_the_step() -> None:
    values = {
        "dtype": "fp32", "seq_len": 16, "total_batch_tokens": 16 * 30, "optimizer": "adamw",
    }  # fmt: skip
    config = model_config("nano", 257)
    memory = planned_bytes(config, "fp32", 12, 16, 3)
    gpu = SimpleNamespace(free_memory=int(memory / 0.95) + 100, is_gpu=True)
    assert _fitting(values, config, None, gpu) == {"batch_size": 10, "recompute": 3}
    # A CPU also holds the copies that a checkpoint is written from.
    cpu = SimpleNamespace(free_memory=gpu.free_memory, is_gpu=False)
    assert _fitting(values, config, None, cpu)["batch_size"] < 10
    large = SimpleNamespace(free_memory=10**9, is_gpu=False)
    assert _fitting(values, config, None, large) == {"batch_size": 30, "recompute": 0}
    assert _fitting(values, config, 2, large)["recompute"] == 2
    # Muon's state is smaller by more than its scratch.
    muon = planned_bytes(config, "fp32", 15, 16, 3, optimizer="muon")
    gpu = SimpleNamespace(free_memory=int(muon / 0.95) + 100, is_gpu=True)
    assert _fitting(values | {"optimizer": "muon"}, config, 3, gpu)["batch_size"] == 15
    assert _fitting(values, config, 3, gpu)["batch_size"] < 15
    with pytest.raises(
        ConfigError, match="--total-batch-tokens 100 is not a multiple of --seq-len"
    ):
        _fitting(values | {"total_batch_tokens": 100}, config, None, large)


def auto_config(run_dir: Path) -> TrainConfig:
    """Of `train --batch-size auto` with 30 sequences a step."""
    given = {"model": "nano", "tokenizer": "bytes", "seq_len": 16, "total_batch_tokens": 16 * 30}
    more = {"batch_size": "auto", "device": "cpu", "dtype": "fp32"}
    return new_config({**given, **more}, {}, run_dir)


def test_batch_size_auto_asks_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = planned_bytes(model_config("nano", 257), "fp32", 12, 16, 3, host_copies=True)
    monkeypatch.setattr(CpuDevice, "free_memory", int(memory / 0.95) + 100)
    config = auto_config(tmp_path / "run")
    assert (config.batch_size, config.recompute) == (10, 3)


def test_what_does_not_fit_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    Path("text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    config = replace(auto_config(Path("run")), data="text.txt", steps=1)
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(CpuDevice, "free_memory", 10**6)
    with pytest.raises(
        ConfigError, match=r"needs .* MB, and there are 1\.0 MB: use a higher --recompute, or "
    ):
        train(config, console)
    assert "optimizer state" in console.file.getvalue()  # the table is there all the same
    assert not Path("run").exists()


def test_advice_that_can_be_followed() -> None:
    def advice(batch_size: int, recompute: int, *, resumed: bool) -> str:
        fit = memory_plan(SMALL, "fp32", batch_size, 16, recompute)
        check_fits(fit, fit.total, resumed=resumed)  # it just fits
        with pytest.raises(ConfigError) as refused:
            check_fits(fit, fit.total - 1, resumed=resumed)
        return str(refused.value).partition(": ")[2]

    assert advice(2, 0, resumed=False) == (
        "use a higher --recompute, or a smaller --batch-size, or a smaller --seq-len or --model"
    )
    assert advice(1, 3, resumed=False) == "use a smaller --seq-len or --model"
    assert advice(2, 1, resumed=True) == "use a higher --recompute"
    assert advice(2, 3, resumed=True) == "free some memory"


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(available=5, total=9, free=3)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    assert CpuDevice().free_memory == 5


def test_a_checkpoint_needs_no_second_copy_of_the_weights() -> None:
    array = np.zeros(3, np.float32)
    for device in (CpuDevice(), EmulatorDevice()):
        assert np.shares_memory(device.download_view(array), array)
        assert not np.shares_memory(device.download(array), array)


def test_what_auto_chose_is_said_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 100)
    sizes = ["--seq-len", "16", "--total-batch-tokens", "480", "--batch-size", "auto"]
    small = ["--device", "cpu", "--model", "nano", "--tokenizer", "bytes", "--steps", "1"]
    done = run("train", *small, *sizes, "--data", "text.txt", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(1 x 30 x 16, recompute level 0)" in done.stdout
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run")).train
    assert (saved.batch_size, saved.recompute) == (30, 0)


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpu_gpt2", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_command() -> None:
    shown = run("plan", "--model", "gpt2-medium", "--memory", "8GB")
    assert shown.returncode == 0, shown.stderr
    assert "with --batch-size 3 --recompute 3" in shown.stdout
    assert "optimizer state, float32" in shown.stdout
    refused = run("plan", "--model", "gpt2", "--memory", "8GB", "--batch-size", "40")
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "gpu-gpt2: training with --batch-size 40 --recompute 3 needs 9."
    )
    assert "higher" not in refused.stderr  # level 3 was tried


def test_the_command_takes_the_lowest_level_that_holds_a_given_batch() -> None:
    shown = run("plan", "--model", "gpt2", "--memory", "8GB", "--batch-size", "12")
    assert shown.returncode == 0, shown.stderr
    assert "with --batch-size 12 --recompute 1" in shown.stdout
    fixed = run(
        "plan", "--model", "gpt2", "--memory", "8GB", "--batch-size", "12", "--recompute", "0"
    )
    assert fixed.returncode == 1
    assert "use a higher --recompute, or a smaller --batch-size" in fixed.stderr


def test_the_command_plans_for_the_model_of_a_file(tmp_path: Path) -> None:
    path = llama2c_models.model_file(tmp_path / "model.bin")
    shown = run("plan", "--init-from", str(path), "--dtype", "fp32", "--memory", "2GB")
    assert shown.returncode == 0, shown.stderr
    assert f"{path} in fp32, sequences of 32 tokens" in shown.stdout
    assert "angles of RoPE" in shown.stdout
    refused = run("plan", "--init-from", str(path), "--model", "gpt2", "--n-layer", "3")
    assert refused.returncode == 1
    assert "has sizes of its own; leave out --model, --n-layer" in refused.stderr
