"""`bench kernels`: times every op and compares it with the measured limits of the device."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rich.table import Table

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device.base import FLOAT32
from gpu_gpt2.ops.table import Ops
from gpu_gpt2.tools.bench.cases import BenchCase, Tensors, cases

# Bytes of the timed copy: more than all caches hold.
COPY_BYTES: Final = {"cuda": 2 << 30, "cpu": 128 << 20}
HEAD: Final = ("op", "ms", "GB/s", "TFLOP/s", "of the limit")
# Rows and columns of the timed matmul, large enough to reach the peak.
MATMUL_SIZE: Final = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bandwidth and the arithmetic that this device reaches, measured one at a time."""

    copy_gb_s: float  # bytes read plus bytes written by a large copy
    matmul_tflops: float  # TFLOP/s of a large square matmul in the dtype of the ops


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """The time of one op, and its share of the limit that binds it: bandwidth or arithmetic."""

    name: str
    ms: float  # median
    gb_s: float  # the least bytes that the op must move, over the time
    tflops: float  # TFLOP/s of its matmuls; 0 for an op without matmuls
    share: float  # 1 for an op that reaches a limit of the device


def measure_limits(ops: Ops) -> Limits:
    """Measures a large copy and a large matmul on the device of `ops`."""
    copied = 2 * COPY_BYTES[ops.device.name]
    return Limits(copy_gb_s=copied / _copy_ms(ops) / 1e6, matmul_tflops=large_matmul_tflops(ops))


def large_matmul_tflops(ops: Ops) -> float:
    """Returns the TFLOP/s of a large square matmul of random numbers."""
    size, new = MATMUL_SIZE[ops.device.name], Tensors(ops)
    a, b, out = new(size, size), new(size, size), new(size, size)
    ms = statistics.median(ops.device.time_ms(lambda: ops.matmul(out, a, b), repeat=10))
    return 2 * size**3 / ms / 1e9


def _copy_ms(ops: Ops) -> float:
    device, new = ops.device, Tensors(ops)
    count = COPY_BYTES[device.name] // FLOAT32.itemsize
    src, dst = new.float32(count), new.float32(count)
    return statistics.median(device.time_ms(lambda: device.copy(dst, src), repeat=10))


def measure(
    ops: Ops, config: ModelConfig, B: int, T: int, limits: Limits, repeat: int
) -> Iterator[KernelTime]:
    """Yields the time of every op in bench/cases.py; on a GPU the caches are empty at its start.

    On a GPU that PyTorch can use too, PyTorch's flash attention follows ours.
    """
    for case in cases(ops, config, B, T):
        yield _result(case, statistics.median(ops.device.time_ms(case.run, repeat=repeat)), limits)
        of_training = case.name in ("attention_fwd", "attention_bwd")
        if of_training and ops.device.is_gpu and ops.dtype != "fp32":
            backward = case.name == "attention_bwd"
            if ms := _torch_attention_ms(ops.dtype, config, B, T, repeat, backward=backward):
                peer = replace(case, name=f"{case.name} of PyTorch")
                yield _result(peer, ms, limits)


def _torch_attention_ms(
    dtype: str, config: ModelConfig, B: int, T: int, repeat: int, *, backward: bool
) -> float:
    """Returns the median time of PyTorch's flash attention, or 0 if it cannot run."""
    try:
        from gpu_gpt2.tools.pytorch.step import torch_attention_ms
    except ImportError:  # no PyTorch
        return 0.0

    times = torch_attention_ms(dtype, B, config.n_head, T, config.head_size, repeat, backward)
    return statistics.median(times) if times else 0.0


def _result(case: BenchCase, ms: float, limits: Limits) -> KernelTime:
    gb_s, tflops = case.moved / ms / 1e6, case.flops / ms / 1e9
    return KernelTime(
        name=case.name,
        ms=ms,
        gb_s=gb_s,
        tflops=tflops,
        share=max(gb_s / limits.copy_gb_s, tflops / limits.matmul_tflops),
    )


def table(times: list[KernelTime], limits: Limits) -> Table:
    """Returns the times as a table for the terminal."""
    columns = Table(
        box=None,
        caption=f"limits measured here: copy {limits.copy_gb_s:,.0f} GB/s, "
        f"matmul {limits.matmul_tflops:,.1f} TFLOP/s",
        caption_justify="left",
    )
    for title in HEAD:
        columns.add_column(title, justify="left" if title == "op" else "right", no_wrap=True)
    for row in times:
        columns.add_row(*cells(asdict(row)))
    return columns


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a KernelTime, given by names, as the texts of the columns of HEAD."""
    return (
        row["name"],
        f"{row['ms']:.3f}",
        f"{row['gb_s']:,.0f}",
        f"{row['tflops']:,.1f}" if row["tflops"] else "",
        f"{row['share']:.0%}",
    )
