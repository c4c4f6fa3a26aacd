"""The command line: collects the commands, and prints an error as one line."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Final, NoReturn

import typer
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from gpu_gpt2.cli.bench import bench_app
from gpu_gpt2.cli.chat import chat
from gpu_gpt2.cli.common import console
from gpu_gpt2.cli.compare import compare
from gpu_gpt2.cli.convert import convert
from gpu_gpt2.cli.data import data_app
from gpu_gpt2.cli.evaluate import evaluate
from gpu_gpt2.cli.generate import generate
from gpu_gpt2.cli.help import GroupedCommands
from gpu_gpt2.cli.inspect import check_ops, show_info
from gpu_gpt2.cli.plan import show_plan
from gpu_gpt2.cli.plot import plot
from gpu_gpt2.cli.train import TrainCommand, train
from gpu_gpt2.cli.verify import verify_model
from gpu_gpt2.errors import UserError

app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train GPT-2 and Llama with CUDA C kernels you can read.",
)
_TRAIN: Final = "Train a model and use it"
_FILES: Final = "Data sets and model files"
_MACHINE: Final = "Machine and memory"
_CHECK: Final = "Check and time the kernels and the model"
app.command(cls=TrainCommand, rich_help_panel=_TRAIN)(train)
app.command(rich_help_panel=_TRAIN)(generate)
app.command(rich_help_panel=_TRAIN)(chat)
app.command(rich_help_panel=_TRAIN)(evaluate)
app.command(rich_help_panel=_TRAIN)(plot)
app.command(rich_help_panel=_TRAIN)(compare)
app.add_typer(data_app, name="data", cls=GroupedCommands, rich_help_panel=_FILES)
app.command(rich_help_panel=_FILES)(convert)
app.command("info", rich_help_panel=_MACHINE)(show_info)
app.command("plan", rich_help_panel=_MACHINE)(show_plan)
app.command("check", rich_help_panel=_CHECK)(check_ops)
app.command("verify", rich_help_panel=_CHECK)(verify_model)
app.add_typer(bench_app, name="bench", cls=GroupedCommands, rich_help_panel=_CHECK)


def main() -> None:
    """Entry point of the command `gpu-gpt2`."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal has no letters for
    _log_to_console()
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(
            f"out of memory ({error}); use a smaller model, or smaller numbers for --batch-size "
            f"and --seq-len, or in generate for --num-samples and --max-tokens"
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"cannot write the output: {error.strerror}; make room on the disk")


def _open_closed_streams() -> None:
    """Gives standard streams that the caller has closed an empty input and no output."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


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
