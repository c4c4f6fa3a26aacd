"""Shared by all commands: the terminal, its progress bars, and common options."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from gpu_gpt2.device import DEVICES, choose_dtype, open_device
from gpu_gpt2.models.gpt2 import GPT2
from gpu_gpt2.models.weights import WeightSource, load_arena
from gpu_gpt2.ops import ops_for

WIDE: Final = 110  # columns: the widest table
INTERRUPTED: Final = 130  # exit status after Ctrl-C, by convention

console: Final = Console()

Device = Annotated[str, typer.Option(help=f"{' | '.join(DEVICES)}")]
Dtype = Annotated[str, typer.Option(help="auto | fp32 | bf16 | fp16")]


def say(text: str) -> None:
    """One line, never wrapped, so that a path or a command in it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def bytes_progress(*columns: ProgressColumn) -> Progress:
    """A progress bar of bytes with more `columns`; on a terminal only, and gone at the end."""
    time_left = TimeRemainingColumn(compact=True)
    return progress(BarColumn(bar_width=24), DownloadColumn(), *columns, time_left)


def progress(*columns: ProgressColumn) -> Progress:
    """A progress bar of `columns`, or of rich's own; on a terminal only, and gone at the end."""
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def show_table(table: Table) -> None:
    """A table at its full width: a narrow terminal breaks its lines, but nothing is cut off."""
    Console(width=max(console.width, WIDE)).print(table)


def model_on_device(source: WeightSource, device: str, dtype: str, B: int, T: int) -> GPT2:
    """A model that reads, but is not trained, for batches of up to (B, T)."""
    place = open_device(device)
    dtype = choose_dtype(dtype, place)
    gpt2 = GPT2(
        source.config,
        ops_for(place, dtype),
        max_batch=B,
        max_seq_len=T,
        training=False,
    )
    gpt2.load(load_arena(source))
    return gpt2
