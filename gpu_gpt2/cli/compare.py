"""`gpu-gpt2 compare`: compares the losses of a run with a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpu_gpt2 import compare as comparison
from gpu_gpt2.cli.common import say
from gpu_gpt2.errors import ConfigError


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run, then its reference: a file of docs/reference-curves/ or the "
            "folder of another run. With --make: the folders of three or more runs.",
            metavar="PATH",
        ),
    ],
    make: Annotated[
        Path | None,
        typer.Option(
            help="Write a reference from runs that differ only in --seed, instead of comparing.",
            metavar="FILE",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help=f"Largest allowed difference from the losses of another run, in nats per token; "
            f"default: {comparison.TOLERANCE}.",
            metavar="NATS",
            min=0,
        ),
    ] = None,
) -> None:
    """Compare the losses of a run with a reference; exit with status 1 if they leave its band."""
    if make is not None:
        if tolerance is not None:
            raise ConfigError("--tolerance is for comparing two runs; leave it out with --make")
        comparison.make_reference(paths, make)
        say(f"wrote {make}")
        return
    if len(paths) != 2:
        raise ConfigError(f"expected a run and its reference, not {len(paths)} paths")
    run_dir, where = paths
    reference = comparison.open_reference(where, tolerance)
    deviations = comparison.compare(run_dir, reference)
    say(f"{run_dir} compared with {reference.description}")
    for deviation in deviations:
        say(str(deviation))
    if not all(deviation.inside for deviation in deviations):
        raise typer.Exit(1)
