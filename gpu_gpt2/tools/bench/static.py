"""`bench kernels --static`: what every kernel needs of a GPU, found without one.

The ops run once on a device that launches nothing and notes what it should have launched, at a
model's own sizes; each kernel so found is compiled for each architecture.
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

ARCHITECTURES: Final = ("sm_75", "sm_80", "sm_90")
TENSOR_CORE_HEADER: Final = '"tensor_core.cuh"'
TENSOR_CORE_ARCHITECTURES: Final = ("sm_80", "sm_90")
# Head sizes of GPT-2 and GPT-3, and one that only the plain attention kernel takes.
HEAD_SIZES: Final = (64, 80, 96, 128, 33)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """One kernel of one source for one architecture, in blocks of `threads`."""

    file: str
    dtype: str
    defines: tuple[tuple[str, int], ...]
    architecture: str
    threads: int
    resources: KernelResources


class RecordingDevice(CpuDevice):
    """Runs and copies nothing; `launches` are the sources, kernel names and threads asked for."""

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
    """Every kernel of a training step of `config` in each dtype, with the threads of its blocks.

    Attention also with the other HEAD_SIZES.
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
    """The least bytes and the flops of each op for one sequence of the model's full context."""
    ops = KernelOps(RecordingDevice(), dtype)
    return [
        {"name": case.name, "dtype": dtype, "bytes": case.moved, "flops": case.flops}
        for case in cases(ops, config, B=1, T=config.n_positions)
    ]


def counts_table(found: list[dict[str, Any]]) -> Table:
    """The counts for the console."""
    columns = Table(box=None)
    columns.add_column("op")
    for title in ("MB", "GFLOP", "flops per byte"):
        columns.add_column(title, justify="right")
    for row in found:
        columns.add_row(*count_cells(row))
    return columns


def count_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of counts as text."""
    moved, flops = row["bytes"], row["flops"]
    products = (f"{flops / 1e9:.2f}", f"{flops / moved:.0f}") if flops else ("", "")
    return (row["name"], f"{moved / 1e6:.2f}", *products)


def builds(
    config: ModelConfig, architectures: tuple[str, ...] = ARCHITECTURES
) -> Iterator[KernelBuild]:
    """Compiles every kernel of `launches`; KernelError if one does not compile."""
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
    """Registers of a thread by architecture, shared memory of a block, spills: for the console."""
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
    """One dictionary per kernel, head size and dtype: registers by architecture, and the rest.

    Kernels that several ops share appear once, with the largest numbers.
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
