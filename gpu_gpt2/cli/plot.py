"""`gpu-gpt2 plot`: the curves of training runs as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpu_gpt2.cli.common import say
from gpu_gpt2.plot import PLOT_FILE, plot_runs


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of training runs; several are drawn over each other."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"PNG or SVG file to write, by its suffix; default: {PLOT_FILE} in the first RUN.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Draw loss, learning rate, gradient norm and speed of training runs into a picture."""
    out = out or runs[0] / PLOT_FILE
    plot_runs(runs, out)
    say(f"wrote {out}")
