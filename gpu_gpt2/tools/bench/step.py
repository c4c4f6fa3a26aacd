"""`bench step` and `bench peers`: times training steps of gpu-gpt2 and of PyTorch in one way."""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.table import Table

from gpu_gpt2.config import ModelConfig, model_config
from gpu_gpt2.device.base import Device
from gpu_gpt2.errors import ConfigError, DeviceError
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import check_seq_len
from gpu_gpt2.models.size import flops_per_token
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tools.bench.kernels import large_matmul_tflops
from gpu_gpt2.training.memory import check_fits, memory_plan
from gpu_gpt2.training.optimizer import AdamW

Tokens: TypeAlias = npt.NDArray[np.int32]  # (B, T)
# Enqueues a training step and returns a function that waits until the step has run.
Step: TypeAlias = Callable[[], Callable[[], object]]

OURS: Final = "gpu-gpt2"  # the name of our rows in tables and results
PEERS: Final = ("PyTorch eager", "torch.compile")  # the names of PyTorch's rows
# Titles of the columns of a StepTime, after its size and name. README.md explains them.
COLUMNS: Final = (
    "ms/step", "fastest", "enqueued", "tokens/s", "MFU", "of matmul", "GB", "of plan", "speed-up"
)  # fmt: skip
# Learning rate of the timed steps. Every step trains on the same batch: at a larger rate the model
# memorizes it, its gradients become denormal numbers (below 1e-38), and a CPU computes so slowly
# with those that PyTorch's step took five times as long.
LR: Final = 1e-6
WARM_UP: Final = 3  # untimed steps: compilation, the capture of graphs, the first replay
# Peak TFLOP/s of matmuls of 16-bit matrices without sparsity, summed in float32, from NVIDIA's data
# sheets. The key is a part of the GPU's name.
PEAK_TFLOPS: Final = {
    "H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model with the shape of its batches."""

    model: str  # a name that config.model_config knows, such as "d12"
    batch_size: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.model}:{self.batch_size}x{self.seq_len}"


# Sizes that `bench peers` times by default. On a GPU: the small batch of llm.c's tests, where the
# time to enqueue a step counts most, and full contexts. On a CPU: steps of about a second.
SIZES: Final = {
    device: tuple(Size(model=model, batch_size=B, seq_len=T) for model, B, T in sizes)
    for device, sizes in {
        "cuda": (
            ("d12", 4, 64),
            ("d12", 32, 1024),
            ("d12", 64, 1024),
            ("d24", 32, 1024),
            ("d48", 8, 1024),
        ),
        "cpu": (("d12", 4, 64), ("d6", 4, 256)),
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The time of a training step of one program at one size, or the reason why there is none.

    A field is 0 if its value is not known.
    """

    name: str  # name of the program: OURS, one of PEERS, or llm.c
    size: str  # a Size as text
    step_ms: float = 0.0  # median
    fastest_ms: float = 0.0  # minimum
    enqueue_ms: float = 0.0  # median time until the host has enqueued a step
    tokens_per_s: float = 0.0  # tokens per second of the median step
    peak_bytes: int = 0  # largest memory in use
    planned_bytes: int = 0  # memory of the plan (training/memory.py); only for OURS
    mfu: float = 0.0  # model flops utilization: flops per second, counted as in llm.c, / peak
    matmul_share: float = 0.0  # the same flops per second / those of a large matmul on this device
    problem: str = ""  # the reason, or a warning


def parse_size(text: str) -> Size:
    """Reads a size such as "d12:32x1024".

    Raises ConfigError if `text` is no size or the sequences are longer than the model's context.
    """
    match = re.fullmatch(r"(.+):(\d+)x(\d+)", text)
    if match is None or int(match[2]) < 1 or int(match[3]) < 1:
        raise ConfigError(f"cannot read {text!r} as a size; write MODEL:BATCHxLENGTH: d12:32x1024")
    size = Size(model=match[1], batch_size=int(match[2]), seq_len=int(match[3]))
    check_seq_len(size.seq_len, model_config(size.model))
    return size


def measure_ours(
    device: Device, dtype: str, size: Size, steps: int, matmul_tflops: float, recompute: int = 0
) -> StepTime:
    """Times our training step on random tokens.

    matmul_tflops: TFLOP/s of a large matmul in `dtype` on `device`, as in bench.kernels.Limits.
    Raises ConfigError, before anything is allocated, if the step does not fit into the memory.
    """
    free_memory(device)  # arrays of an earlier program would count in our peak
    config, tokens, targets = _inputs(size)
    memory = memory_plan(config, dtype, size.batch_size, size.seq_len, recompute)
    check_fits(memory, device.free_memory)
    model = new_model(
        config,
        ops_for(device, dtype),
        max_batch=size.batch_size,
        max_seq_len=size.seq_len,
        recompute=recompute,
    )
    optimizer = AdamW(model, weight_decay=0.1)
    optimizer.load(initial_weights(config, 0))
    batch = Batch.of(tokens, targets)

    def step() -> Callable[[], object]:
        losses = model.forward_backward(batch, loss_scale=optimizer.loss_scale)
        return optimizer.step(LR, losses).result

    times = _timed(step, steps)
    return _result(
        OURS,
        size,
        times,
        device,
        matmul_tflops,
        peak_bytes=_peak_bytes(device),
        planned_bytes=memory.total,
        problem=device.graph_error,
    )


def measure_peer(
    name: str, device: Device, dtype: str, size: Size, steps: int, matmul_tflops: float
) -> StepTime:
    """Times PyTorch's training step on the same tokens as ours; `name` is one of PEERS.

    Raises DeviceError if PyTorch cannot be imported.
    """
    try:
        import torch

        from gpu_gpt2.tools.pytorch.step import torch_step
    except ImportError as error:
        raise DeviceError(f"PyTorch cannot be used ({error}): pip install torch") from None

    config, tokens, targets = _inputs(size)
    on_gpu = device.is_gpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    compiled = name == "torch.compile"
    step = torch_step(config, device.name, dtype, tokens, targets, lr=LR, compiled=compiled)
    times = _timed(step, steps)
    peak = int(torch.cuda.max_memory_allocated()) if on_gpu else 0
    return _result(name, size, times, device, matmul_tflops, peak_bytes=peak)


def measure_all(
    device: Device, dtype: str, sizes: Sequence[Size], names: Sequence[str], steps: int
) -> Iterator[StepTime]:
    """Times the programs `names` at every size; one that fails yields a row with the problem."""
    matmul_tflops = large_matmul_tflops(ops_for(device, dtype))
    for size in sizes:
        for name in names:
            try:
                if name == OURS:
                    yield measure_ours(device, dtype, size, steps, matmul_tflops)
                else:
                    yield measure_peer(name, device, dtype, size, steps, matmul_tflops)
            except Exception as error:  # a peer may fail in any way; the others still count
                reason = (str(error) or type(error).__name__).splitlines()[0]
                yield StepTime(name=name, size=str(size), problem=reason[:200])
            free_memory(device)


def table(rows: Sequence[StepTime]) -> Table:
    """Returns text_table of the rows as a table for the console."""
    head, lines = text_table(rows)
    columns = Table(box=None)
    for title in head:
        columns.add_column(title, justify="right" if title else "left", no_wrap=True)
    for line in lines:
        columns.add_row(*line)
    return columns


def text_table(rows: Sequence[StepTime]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and the lines of a table, without columns that are empty in every line.

    Rows of one size stand together; the last column is our speed-up over the row's program.
    """
    lines = []
    for size in dict.fromkeys(row.size for row in rows):
        group = [row for row in rows if row.size == size]
        ours = next((row for row in group if row.name == OURS and row.step_ms), None)
        for row in group:
            lines.append([size if row is group[0] else "", *_cells(row, ours)])
    head = ["", "", *COLUMNS]
    lines = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    used = [i for i in range(len(head)) if i < 2 or any(line[i] for line in lines)]
    return [head[i] for i in used], [[line[i] for i in used] for line in lines]


def problems(rows: Sequence[StepTime]) -> list[str]:
    """Returns one line for each row that has a problem."""
    return [f"{row.name} at {row.size}: {row.problem}" for row in rows if row.problem]


def _cells(row: StepTime, ours: StepTime | None) -> tuple[str, ...]:
    """Returns the row's name and COLUMNS as text, "" where a value is not known.

    `ours` is our row of the same size, or None if there is none. A row without a time has the text
    "failed" behind its name, and no other column.
    """
    if not row.step_ms:
        return (row.name, "failed")
    peak, plan = row.peak_bytes, row.planned_bytes
    return (
        row.name,
        f"{row.step_ms:.2f}",
        f"{row.fastest_ms:.2f}" if row.fastest_ms else "",
        f"{row.enqueue_ms:.2f}" if row.enqueue_ms else "",
        f"{row.tokens_per_s:,.0f}",
        f"{row.mfu:.1%}" if row.mfu else "",
        f"{row.matmul_share:.1%}" if row.matmul_share else "",
        f"{peak / 1e9:.2f}" if peak else "",
        f"{peak / plan:.2f}" if peak and plan else "",
        f"{row.step_ms / ours.step_ms:.2f} x" if ours and ours is not row else "",
    )


def _inputs(size: Size) -> tuple[ModelConfig, Tokens, Tokens]:
    """Returns the model's sizes, with random tokens and targets, the same in every call."""
    config = model_config(size.model)
    shape = (2, size.batch_size, size.seq_len)
    tokens, targets = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return config, tokens, targets


@dataclass(frozen=True, slots=True)
class _Times:
    """Milliseconds of several steps."""

    step_ms: list[float]  # time from the end of the step before to the end of this one
    enqueue_ms: list[float]  # duration of the call that enqueues the step


def _timed(step: Step, steps: int) -> _Times:
    """Times `steps` steps, each enqueued while the one before it runs, as in training."""
    for _ in range(WARM_UP):
        step()()
    step_ms, enqueue_ms = [], []
    wait = step()
    last = time.perf_counter()
    for _ in range(steps + 1):
        started = time.perf_counter()
        next_wait = step()
        enqueue_ms.append((time.perf_counter() - started) * 1000)
        wait()
        now = time.perf_counter()
        step_ms.append((now - last) * 1000)
        wait, last = next_wait, now
    wait()
    return _Times(step_ms[1:], enqueue_ms[1:])  # the first step began before the clock was read


def _result(
    name: str,
    size: Size,
    times: _Times,
    device: Device,
    matmul_tflops: float,
    *,
    peak_bytes: int,
    planned_bytes: int = 0,
    problem: str = "",
) -> StepTime:
    config = model_config(size.model)
    median = statistics.median(times.step_ms)
    tokens_per_s = 1000 * size.batch_size * size.seq_len / median
    peak = peak_tflops(device)
    achieved = tokens_per_s * flops_per_token(config, size.seq_len) / 1e12
    return StepTime(
        name=name,
        size=str(size),
        step_ms=median,
        fastest_ms=min(times.step_ms),
        # A device that is not asynchronous computes the step while it is enqueued.
        enqueue_ms=statistics.median(times.enqueue_ms) if device.is_async else 0.0,
        tokens_per_s=tokens_per_s,
        peak_bytes=peak_bytes,
        planned_bytes=planned_bytes,
        mfu=achieved / peak if peak else 0.0,
        matmul_share=achieved / matmul_tflops,
        problem=problem,
    )


def peak_tflops(device: Device) -> float:
    """Returns the data sheet's peak for this GPU, or 0 if it is not in PEAK_TFLOPS."""
    name = device.product_name
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def _peak_bytes(device: Device) -> int:
    """Returns the device's peak memory, or 0 on a CPU if PyTorch has been imported.

    On a CPU the peak is that of the whole process, PyTorch's memory included.
    """
    return 0 if "torch" in sys.modules and not device.is_gpu else device.peak_memory


def free_memory(device: Device) -> None:
    """Frees the memory that an earlier program no longer uses, ours or PyTorch's."""
    gc.collect()
    device.release_memory()
    if device.is_gpu and "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
