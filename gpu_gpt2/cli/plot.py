"""`gpu-gpt2 plot`: draws the curves of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpu_gpt2.cli.common import say
from gpu_gpt2.plot import PLOT_FILE, plot_runs


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of one or more training runs, drawn in the same plot."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"File to write, .png or .svg; default: {PLOT_FILE} in the first run folder.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Draw loss, learning rate, gradient norm and speed of training runs as PNG or SVG."""
    out = out or runs[0] / PLOT_FILE
    plot_runs(runs, out)
    say(f"wrote {out}")
