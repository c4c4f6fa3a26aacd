"""`gpu-gpt2 info` and `gpu-gpt2 check`: what this machine has, and whether its ops are right."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from gpu_gpt2.cli.common import console, say, shared_option, show_table
from gpu_gpt2.config import AUTO
from gpu_gpt2.device import choose_dtype, has_gpu, open_device
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.ops import ops_for
from gpu_gpt2.ops.cases import CASES, LARGE_CASES
from gpu_gpt2.tools import check, info


def show_info() -> None:
    """Print what is installed on this machine, and the device and dtype that training would use."""
    rows, advice = info.report()
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in advice:
        say(f"! {line}")


def check_ops(
    device_name: Annotated[
        str, shared_option("device", auto="cuda if there is an NVIDIA GPU, else emulator")
    ] = AUTO,
    dtype: Annotated[str, shared_option("dtype", auto="every dtype of the device")] = AUTO,
) -> None:
    """Compare every op with NumPy in float64; the exit status is 1 if an error is too large."""
    if device_name == AUTO:  # never the CPU, which runs no kernels
        device_name = "cuda" if has_gpu() else "emulator"
    device = open_device(device_name)
    dtypes: list[str] = [name for name in DTYPES if name in device.dtypes]
    if dtype != AUTO:
        dtypes = [choose_dtype(dtype, device)]
    cases = (*CASES, *LARGE_CASES) if device.is_gpu else CASES
    results = []
    for result in track(
        check.run_checks(lambda name: ops_for(device, name), dtypes, cases),
        description=f"checking on {device.name}",
        total=None,
        console=console,
        transient=True,
    ):
        results.append(result)
    show_table(check.table(results))
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} checks passed on {device.name}")
    if failed:
        raise typer.Exit(1)
