"""The command line: gathers the commands, prints errors as one line."""

from __future__ import annotations

import io
import logging
import sys
from typing import NoReturn

import typer
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from gpu_gpt2.cli.bench import bench_app
from gpu_gpt2.cli.common import console
from gpu_gpt2.cli.convert import convert
from gpu_gpt2.cli.data import data_app
from gpu_gpt2.cli.evaluate import evaluate
from gpu_gpt2.cli.generate import generate
from gpu_gpt2.cli.inspect import check_ops, show_info
from gpu_gpt2.cli.plan import show_plan
from gpu_gpt2.cli.train import train
from gpu_gpt2.cli.verify import verify_model
from gpu_gpt2.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train GPT-2 with CUDA C kernels you can read.",
)
app.command()(train)
app.command()(generate)
app.command()(evaluate)
app.command()(convert)
app.command("verify")(verify_model)
app.command("plan")(show_plan)
app.command("info")(show_info)
app.command("check")(check_ops)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of the command `gpu-gpt2`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal has no letters for
    _log_to_console()
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"out of memory ({error}); use a smaller --batch-size, --seq-len or --model")


def _log_to_console() -> None:
    """Shows warnings of the package on the terminal, above a progress bar if there is one."""
    logger = logging.getLogger("gpu_gpt2")
    if not logger.handlers:
        handler = RichHandler(
            console=console,
            highlighter=NullHighlighter(),
            show_time=False,
            show_level=False,
            show_path=False,
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _fail(message: str) -> NoReturn:
    text = f"gpu-gpt2: {message}"
    Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)
    sys.exit(1)
