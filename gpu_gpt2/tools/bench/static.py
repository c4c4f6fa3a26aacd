"""`bench kernels --static`: registers and memory of every kernel, without a GPU.

All ops of a training step run on a device that records each launch instead of making it, at the
sizes of a model. The recorded kernels are then compiled for each architecture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy.typing as npt
from rich.table import Table

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device.base import Array
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.launch import Dim3
from gpu_gpt2.device.nvrtc import KernelResources, compile_for
from gpu_gpt2.device.source import DTYPES, KernelSource
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.tools.bench.cases import cases

ARCHITECTURES: Final = ("sm_75", "sm_80", "sm_90")  # GPUs from Turing (T4) on: T4, A100, H100
TENSOR_CORE_HEADER: Final = '"tensor_core.cuh"'  # kernels with this header need Ampere
TENSOR_CORE_ARCHITECTURES: Final = ("sm_80", "sm_90")
# Head sizes of GPT-2 and GPT-3, and 33, which only the plain attention kernel takes.
HEAD_SIZES: Final = (64, 80, 96, 128, 33)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """One kernel compiled for one architecture, with its largest block of `threads` threads."""

    file: str
    dtype: str
    defines: tuple[tuple[str, int], ...]
    architecture: str
    threads: int
    resources: KernelResources


class RecordingDevice(CpuDevice):
    """Records launches and runs nothing: no kernel, matmul or copy.

    `launches` maps source and kernel name to the threads of the largest block.
    """

    def __init__(self) -> None:
        self.launches: dict[tuple[KernelSource, str], int] = {}

    def upload(self, dst: Array, src: npt.NDArray[Any]) -> None:
        pass

    def fill_zero(self, dst: Array) -> None:
        pass

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        pass

    def _launch(
        self,
        source: KernelSource,
        name: str,
        grid: Dim3,
        block: Dim3,
        args: tuple[Any, ...],
        shared_bytes: int,
    ) -> None:
        threads = 1
        for size in block:
            threads *= size
        key = (source, name)
        self.launches[key] = max(threads, self.launches.get(key, 0))


def launches(config: ModelConfig) -> dict[tuple[KernelSource, str], int]:
    """Returns all kernels of a training step in each dtype, as RecordingDevice.launches.

    Attention is recorded for HEAD_SIZES too, which are compile-time values.
    """
    found: dict[tuple[KernelSource, str], int] = {}
    for dtype in DTYPES:
        device = RecordingDevice()
        ops = KernelOps(device, dtype)
        for case in cases(ops, config, B=1, T=16):
            case.run()
        for head_size in HEAD_SIZES:
            small = replace(config, n_embd=head_size, n_head=1, n_layer=1, vocab_size=128)
            for case in cases(ops, small, B=1, T=16):
                if case.name.startswith("attention"):
                    case.run()
        found |= device.launches
    return found


def counts(config: ModelConfig, dtype: str) -> list[dict[str, Any]]:
    """Returns each op's least bytes and its flops for one sequence of the model's full context."""
    ops = KernelOps(RecordingDevice(), dtype)
    return [
        {"name": case.name, "dtype": dtype, "bytes": case.moved, "flops": case.flops}
        for case in cases(ops, config, B=1, T=config.n_positions)
    ]


def counts_table(found: list[dict[str, Any]]) -> Table:
    """Returns the rows of `counts` as a table for the console."""
    columns = Table(box=None)
    columns.add_column("op")
    for title in ("MB", "GFLOP", "flops per byte"):
        columns.add_column(title, justify="right")
    for row in found:
        columns.add_row(*count_cells(row))
    return columns


def count_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns a row of `counts` as text: the op, MB, GFLOP and flops per byte."""
    moved, flops = row["bytes"], row["flops"]
    matmuls = (f"{flops / 1e9:.2f}", f"{flops / moved:.0f}") if flops else ("", "")
    return (row["name"], f"{moved / 1e6:.2f}", *matmuls)


def builds(
    config: ModelConfig, architectures: tuple[str, ...] = ARCHITECTURES
) -> Iterator[KernelBuild]:
    """Compiles every kernel of `launches`. Raises KernelError if one does not compile."""
    wanted = launches(config)
    jobs = [
        (source, architecture)
        for source in dict.fromkeys(source for source, _ in wanted)
        for architecture in architectures
        if architecture in TENSOR_CORE_ARCHITECTURES or TENSOR_CORE_HEADER not in source.text
    ]
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        compiled = compilers.map(lambda job: compile_for(*job), jobs)
        for (source, architecture), kernels in zip(jobs, compiled, strict=True):
            for resources in kernels:
                if threads := wanted.get((source, resources.kernel)):
                    yield KernelBuild(
                        file=source.file,
                        dtype=source.dtype,
                        defines=source.defines,
                        architecture=architecture,
                        threads=threads,
                        resources=resources,
                    )


def table(found: list[KernelBuild]) -> Table:
    """Returns the `rows` of the kernels as a table for the console."""
    columns = Table(box=None)
    columns.add_column("kernel", no_wrap=True)
    for title in ("D", "threads", "dtype"):
        columns.add_column(title)
    for title in (*ARCHITECTURES, "shared", "spilled"):
        columns.add_column(title, justify="right")
    for row in rows(found):
        columns.add_row(*map(str, row.values()))
    return columns


def rows(found: list[KernelBuild]) -> list[dict[str, Any]]:
    """Returns one dictionary per kernel, head size and dtype.

    It has the registers of a thread by architecture, the static shared memory of a block in bytes,
    and the bytes that spill. Of a kernel that is compiled several times, such as one that several
    ops launch, it has the largest values.
    """
    together: dict[tuple[Any, ...], dict[str, Any]] = {}
    for build in found:
        r = build.resources
        head_size = dict(build.defines).get("HEAD_SIZE", "")
        row = together.setdefault(
            (r.kernel, head_size, build.dtype),
            {
                "kernel": r.kernel,
                "head_size": head_size,
                "threads": 0,
                "dtype": build.dtype,
                **dict.fromkeys(ARCHITECTURES, ""),
                "shared_bytes": 0,
                "spill_bytes": 0,
            },
        )
        row["threads"] = max(row["threads"], build.threads)
        row[build.architecture] = max(row[build.architecture] or 0, r.registers)
        row["shared_bytes"] = max(row["shared_bytes"], r.shared_bytes)
        row["spill_bytes"] += r.spill_bytes + r.stack_bytes
    return list(together.values())
