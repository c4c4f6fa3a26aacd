"""What all commands share: the terminal, its one way of saying things, and common options."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.console import Console

from gpu_gpt2.device.select import DEVICES

INTERRUPTED: Final = 130  # exit status after Ctrl-C, by convention

console: Final = Console()

Device = Annotated[str, typer.Option(help=f"{' | '.join(DEVICES)}")]
Dtype = Annotated[str, typer.Option(help="auto | fp32 | bf16")]


def say(text: str) -> None:
    """One line, never wrapped, so that a path or a command in it can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
