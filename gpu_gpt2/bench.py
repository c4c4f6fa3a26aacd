"""Speed of a whole training step, ours and PyTorch's, measured in one run."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table

from gpu_gpt2 import layout
from gpu_gpt2.config import GPT2_VOCAB_SIZE, ModelConfig, model_config
from gpu_gpt2.data.loader import Batch
from gpu_gpt2.device.base import FLOAT32, X_DTYPES
from gpu_gpt2.device.cupy_device import CupyDevice
from gpu_gpt2.device.select import choose_dtype, open_device
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.init import initial_weights
from gpu_gpt2.model import GPT2
from gpu_gpt2.ops.select import ops_for
from gpu_gpt2.optimizer import AdamW
from gpu_gpt2.step import TrainingStep

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Times of a training step."""

    name: str
    step_ms: float  # median
    fastest_ms: float
    tokens_per_s: float  # at the median


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBench:
    """What `gpu-gpt2 bench step` found."""

    title: str
    ours: StepTime
    torch: StepTime | None
    planned_bytes: int  # weights, gradients, moments, activations
    peak_bytes: int | None  # of this process after our steps; on the CPU only


def training_step(
    device: str, dtype: str, model: str, batch_size: int, seq_len: int, steps: int
) -> StepBench:
    """Times `steps` steps on random tokens after one to warm up, then PyTorch's the same way."""
    if min(batch_size, seq_len) < 1 or steps < 5:
        raise ConfigError("batch size and sequence length must be at least 1, steps at least 5")
    config = model_config(model, GPT2_VOCAB_SIZE)
    place = open_device(device)
    dtype = choose_dtype(dtype, place)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, config.vocab_size, (2, batch_size, seq_len), dtype=np.int32)
    ours = _timed("gpu-gpt2", _our_step(config, place.name, dtype, tokens, targets), tokens, steps)
    peak = _peak_bytes() if place.name == "cpu" else None
    torch_time = None
    if importlib.util.find_spec("torch") and place.name != "emulator":
        import torch

        from gpu_gpt2.peers import torch_step

        if isinstance(place, CupyDevice):
            place.free_cached_memory()
        if place.name == "cpu" or torch.cuda.is_available():
            step = torch_step(config, place.name, dtype, tokens, targets)
            torch_time = _timed("PyTorch eager", step, tokens, steps)
    return StepBench(
        title=f"{model}, batch {batch_size} x {seq_len}, {dtype}, {place.name}: median of {steps}",
        ours=ours,
        torch=torch_time,
        planned_bytes=planned_bytes(config, dtype, batch_size, seq_len),
        peak_bytes=peak,
    )


def planned_bytes(config: ModelConfig, dtype: str, batch_size: int, seq_len: int) -> int:
    """Weights, gradients, two moments, master weights if separate, and activations."""
    x = X_DTYPES[dtype]
    per_parameter = x.itemsize + 3 * FLOAT32.itemsize + (FLOAT32.itemsize if x != FLOAT32 else 0)
    activations = layout.activations(config, batch_size, seq_len)
    return int(layout.parameter_count(config) * per_parameter + layout.bytes_of(activations, x))


def render(bench: StepBench) -> Group:
    """The result as text and a table, the ratio to PyTorch included."""
    table = Table("", box=None)
    for column in ("ms per step", "fastest", "tokens/s"):
        table.add_column(column, justify="right")
    for row in filter(None, (bench.ours, bench.torch)):
        table.add_row(
            row.name, f"{row.step_ms:.1f}", f"{row.fastest_ms:.1f}", f"{row.tokens_per_s:,.0f}"
        )
    if bench.torch:
        table.add_row(
            "ratio",
            f"{bench.torch.step_ms / bench.ours.step_ms:.2f} x",
            f"{bench.torch.fastest_ms / bench.ours.fastest_ms:.2f} x",
        )
    planned = bench.planned_bytes / 2**20
    if bench.peak_bytes:
        peak = bench.peak_bytes / 2**20
        memory = f"{peak:,.0f} MiB at most, {peak / planned:.2f} of the {planned:,.0f} MiB planned"
    else:
        memory = f"{planned:,.0f} MiB planned"
    return Group(bench.title, table, f"memory: {memory}")


def _timed(name: str, step: Callable[[], None], tokens: Tokens, steps: int) -> StepTime:
    step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    return StepTime(
        name=name,
        step_ms=median * 1000,
        fastest_ms=min(times) * 1000,
        tokens_per_s=tokens.size / median,
    )


def _our_step(
    config: ModelConfig, device: str, dtype: str, tokens: Tokens, targets: Tokens
) -> Callable[[], None]:
    B, T = tokens.shape
    ops = ops_for(open_device(device), dtype)
    model = GPT2(config, ops, dtype=dtype, max_batch=B, max_seq_len=T)
    optimizer = AdamW(model, weight_decay=0.1)
    optimizer.load(initial_weights(config, 0))
    order = np.argsort(tokens, axis=None, kind="stable").astype(np.int32)
    batch = Batch(tokens, targets, order)
    take_step = TrainingStep(model, optimizer, micro_steps=1, say=print)

    def step() -> None:
        take_step(lambda: batch, 1e-4)()  # waits for the device

    return step


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows does not count this
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts in bytes
