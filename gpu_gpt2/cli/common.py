"""Shared by all commands: the terminal, its progress bars, and common options."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

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

from gpu_gpt2.config import AUTO, OPTIONS, Option
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.models.families import new_model
from gpu_gpt2.models.llama_int8 import Int8Source, LlamaInt8
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.weights import WeightSource, load_arena
from gpu_gpt2.ops import ops_for

WIDE: Final = 110  # columns: the widest table
INTERRUPTED: Final = 130  # exit status after Ctrl-C, by convention

console: Final = Console()


def shared_option(name: str, *, auto: str = "", show_default: bool | str = True) -> Any:
    """The command-line option of the TrainConfig field `name`: its help, unit and range.

    `auto` says what the value "auto" stands for; "" if the option does not take it. A text in
    `show_default` describes a default that is not a constant.
    """
    option = OPTIONS[name]
    metavar = option.metavar or "|".join(option.choices)
    return typer.Option(
        option.flag,
        help=f"{option.help} {AUTO}: {auto}." if auto else option.help,
        metavar=(f"{metavar}|{AUTO}" if auto else metavar) or None,
        show_default=show_default,
        rich_help_panel=option.group,
        callback=_reader(option, takes_auto=auto != ""),
    )


def _reader(option: Option, *, takes_auto: bool) -> Callable[[Any], Any]:
    """Returns a function that checks a value of the command line; None means none was given."""

    def read(value: Any) -> Any:
        if value is None:
            return None
        if takes_auto or option.in_epochs:
            return option.check_given(value)
        option.check(value)
        return value

    return read


# Options of several commands, which mean the same as in `gpu-gpt2 train`.
Device = Annotated[str, shared_option("device", auto=OPTIONS["device"].auto)]
Dtype = Annotated[str, shared_option("dtype", auto=OPTIONS["dtype"].auto)]
ModelName = Annotated[str, shared_option("model")]
BatchSize = Annotated[int, shared_option("batch_size")]
SeqLen = Annotated[int, shared_option("seq_len")]
Recompute = Annotated[int, shared_option("recompute")]


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


@contextmanager
def overflow_is_silent() -> Iterator[None]:
    """Hides NumPy's warnings of overflows and NaNs inside, which damaged weights cause.

    For a caller that reports a loss or logits that are not finite.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def model_on_device(
    source: WeightSource,
    device_name: str,
    dtype: str,
    B: int,
    T: int,
    *,
    with_logits: bool = True,
) -> Model:
    """A loaded model for inference on batches of up to (B, T) tokens.

    Matrices that are int8 in the file stay int8. `with_logits` is as for Model.
    """
    device = open_device(device_name)
    ops = ops_for(device, choose_dtype(dtype, device))
    if isinstance(source, Int8Source) and source.has_int8_rows:
        return LlamaInt8(source, ops, max_batch=B, max_seq_len=T, with_logits=with_logits)
    model = new_model(
        source.config,
        ops,
        max_batch=B,
        max_seq_len=T,
        training=False,
        with_logits=with_logits,
    )
    model.load(load_arena(source))
    return model
