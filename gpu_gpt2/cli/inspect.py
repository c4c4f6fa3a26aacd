"""`gpu-gpt2 info` and `check`: what this machine has, and whether it computes right."""

from __future__ import annotations

import typer
from rich.progress import track
from rich.table import Table

from gpu_gpt2.cli.common import Device, Dtype, console, say, show_table
from gpu_gpt2.device import choose_dtype, has_gpu, open_device
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.ops import ops_for
from gpu_gpt2.ops.cases import CASES, LARGE_CASES
from gpu_gpt2.tools import check, info


def show_info() -> None:
    """Say what is on this machine and what would be used."""
    rows, advice = info.report()
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in advice:
        say(f"! {line}")


def check_ops(device: Device = "auto", dtype: Dtype = "auto") -> None:
    """Run every op against NumPy in float64; exit 1 if one is off. Without a GPU: emulated."""
    if device == "auto":  # what is in question is the kernels, and the CPU runs none
        device = "cuda" if has_gpu() else "emulator"
    place = open_device(device)
    dtypes = ["fp32"] if place.name == "cpu" else list(DTYPES)
    if dtype != "auto":
        dtypes = [choose_dtype(dtype, place)]
    cases = (*CASES, *LARGE_CASES) if place.name == "cuda" else CASES
    results = []
    for result in track(
        check.run_checks(lambda x: ops_for(place, x), dtypes, cases),
        description=f"checking on {place.name}",
        total=None,
        console=console,
        transient=True,
    ):
        results.append(result)
    show_table(check.table(results))
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} checks passed on {place.name}")
    if failed:
        raise typer.Exit(1)
