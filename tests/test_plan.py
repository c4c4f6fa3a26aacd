"""What fits into how much memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gpu_gpt2 import layout, plan
from gpu_gpt2.cli.train import _fitting
from gpu_gpt2.config import MODELS, ModelConfig, model_config
from gpu_gpt2.device.base import X_DTYPES
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.model import GPT2
from gpu_gpt2.ops.select import ops_for
from gpu_gpt2.optimizer import AdamW

SMALL = ModelConfig(vocab_size=67, n_positions=16, n_embd=32, n_layer=3, n_head=2)


def test_bytes_counted_by_hand() -> None:
    """One layer, one channel: 18 bytes a parameter in bf16, 16 in fp32, and N Vp logits."""
    config = ModelConfig(vocab_size=128, n_positions=2, n_embd=1, n_layer=1, n_head=1)
    n = 128 + 2 + 12 + 13 + 2  # wte, wpe, matrices, vectors of the layer, last layernorm
    rows = dict(plan.memory_plan(config, "bf16", 3, 2, 0).rows)
    assert rows["weights"] == 2 * n
    assert rows["master weights, float32"] == rows["gradients, float32"] == 4 * n
    assert rows["moments of AdamW, float32"] == 8 * n
    assert rows["logits"] == 6 * 128 * 2
    assert "master weights, float32" not in dict(plan.memory_plan(config, "fp32", 3, 2, 0).rows)


@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize("recompute", plan.RECOMPUTE_LEVELS)
def test_the_plan_is_what_is_allocated(
    monkeypatch: pytest.MonkeyPatch, recompute: int, dtype: str
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
    AdamW(GPT2(SMALL, ops, dtype=dtype, max_batch=3, max_seq_len=16, recompute=recompute))
    planned = plan.planned_bytes(SMALL, dtype, 3, 16, recompute)
    assert planned <= sum(allocated) <= planned + 1024  # a few numbers of the optimizer besides


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", X_DTYPES)
def test_no_tensor_of_logits_in_float32_beside_16_bits(name: str, dtype: str) -> None:
    config = model_config(name)
    size = 7 * config.n_positions * config.padded_vocab_size
    large = [
        spec for spec in layout.activations(config, 7, config.n_positions) if spec.size >= size
    ]
    assert {spec.dtype for spec in large if spec.name == "logits" or spec.size == size} == {"X"}


@pytest.mark.parametrize(("model", "memory"), [("gpt2", "8GB"), ("gpt2-xl", "80GB")])
def test_trains_at_its_full_context_in(model: str, memory: str) -> None:
    usable = plan.parse_bytes(memory) - plan.LIBRARIES
    fit = plan.best_fit(model_config(model), "bf16", 1024, usable)
    assert fit.batch_size >= 4
    assert fit.recompute == 0
    assert fit.total <= usable


def test_the_largest_batch_is_the_largest() -> None:
    memory = plan.planned_bytes(SMALL, "bf16", 37, 16, 1)
    assert plan.largest_batch(SMALL, "bf16", 16, 1, memory) == 37
    assert plan.largest_batch(SMALL, "bf16", 16, 1, memory - 1) == 36
    assert plan.largest_batch(SMALL, "bf16", 16, 1, memory, sequences=64) == 32
    assert plan.largest_batch(SMALL, "bf16", 16, 1, memory, sequences=37) == 37
    assert plan.largest_batch(SMALL, "bf16", 16, 1, 1000) == 0


def test_the_level_is_no_higher_than_it_must_be() -> None:
    def memory(batch_size: int, level: int) -> int:
        return plan.planned_bytes(SMALL, "bf16", batch_size, 16, level)

    def fit(size: int, sequences: int) -> tuple[int, int]:
        found = plan.best_fit(SMALL, "bf16", 16, size, sequences=sequences)
        return found.batch_size, found.recompute

    assert fit(memory(8, 0), 8) == (8, 0)
    assert fit(memory(8, 0) - 1, 8) == (8, 1)
    assert fit(memory(8, 2), 8) == (8, 2)
    assert fit(memory(8, 3), 8) == (8, 3)
    assert fit(memory(2, 3), 8) == (2, 3)
    enough = plan.ENOUGH_TOKENS // 16
    assert fit(memory(enough, 0), 4 * enough) == (enough, 0)  # although level 3 would hold more


def test_what_does_not_fit_says_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"needs \d\.\d\d GB at recompute level 3; use a smaller"):
        plan.best_fit(model_config("gpt2"), "bf16", 1024, 10**9)
    with pytest.raises(ConfigError, match="at recompute level 1;"):
        plan.best_fit(model_config("gpt2"), "bf16", 1024, 10**9, recompute=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9), ("8 gib", 8 * 2**30), ("512MB", 512 * 10**6), ("1.5TB", 15 * 10**11),
        ("24e9", 24 * 10**9), ("1000", 1000), ("2KiB", 2048),
    ],
)  # fmt: skip
def test_reads_sizes(text: str, size: int) -> None:
    assert plan.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 parsecs", "-8GB", "1.2.3GB", "8GB 8GB", "nan"])
def test_refuses_other_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="as memory; write 8GB"):
        plan.parse_bytes(text)


def test_batch_size_auto_fills_the_memory_with_a_divisor_of_the_step() -> None:
    values = {"model": "nano", "tokenizer": "bytes", "seq_len": 16, "total_batch_tokens": 16 * 30}
    config = model_config("nano", 257)
    memory = plan.planned_bytes(config, "fp32", 12, 16, 3)
    fit = _fitting(values, "fp32", int(memory / 0.95) + 100)
    assert fit == {"batch_size": 10, "recompute": 3}
    assert _fitting(values, "fp32", 10**9) == {"batch_size": 30, "recompute": 0}
    with pytest.raises(
        ConfigError, match="--total-batch-tokens 100 is not a multiple of --seq-len"
    ):
        _fitting(values | {"total_batch_tokens": 100}, "fp32", 10**9)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpu_gpt2", "plan", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command() -> None:
    shown = run("--model", "gpt2-medium", "--memory", "8GB")
    assert shown.returncode == 0, shown.stderr
    assert "with --batch-size 3 --recompute 3" in shown.stdout
    assert "moments of AdamW, float32" in shown.stdout
    refused = run("--model", "gpt2", "--memory", "8GB", "--batch-size", "40")
    assert refused.returncode == 1
    assert refused.stderr.startswith("gpu-gpt2: that does not fit into 8.00 GB")
