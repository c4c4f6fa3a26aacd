"""`gpu-gpt2 info`, `check` and `bench`: what this machine has, and whether it computes right."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from gpu_gpt2 import bench, check, info
from gpu_gpt2.cli.common import Device, Dtype, console, say
from gpu_gpt2.config import MODEL_NAMES
from gpu_gpt2.device.select import choose_dtype, open_device
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.ops.select import ops_for

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")


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
    """Run every op against the NumPy reference in float64; exit 1 if one is off."""
    place = open_device(device)
    dtypes = ["fp32"] if place.name == "cpu" else list(DTYPES)
    if dtype != "auto":
        dtypes = [choose_dtype(dtype, place)]
    cases = (*check.CASES, *check.LARGE_CASES) if place.name == "cuda" else check.CASES
    results = []
    for result in track(
        check.run_checks(lambda x: ops_for(place, x), dtypes, cases),
        description=f"checking on {place.name}",
        total=None,
        console=console,
        transient=True,
    ):
        results.append(result)
    console.print(check.table(results))
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} checks passed on {place.name}")
    if failed:
        raise typer.Exit(1)


@bench_app.command("step")
def bench_step(
    device: Device = "auto",
    dtype: Dtype = "auto",
    model: Annotated[str, typer.Option(help=MODEL_NAMES)] = "d12",
    batch_size: Annotated[int, typer.Option(help="Sequences.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps to take the median of, at least 5.")] = 5,
) -> None:
    """Time a whole training step, and the same in PyTorch if it is installed."""
    result = bench.training_step(device, dtype, model, batch_size, seq_len, steps)
    console.print(bench.render(result))
