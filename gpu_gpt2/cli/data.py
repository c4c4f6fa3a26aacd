"""`gpu-gpt2 data`: text to token files, token files from the web, and a look into one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from gpu_gpt2.cli.common import INTERRUPTED, console, say
from gpu_gpt2.data.prepare import recipes
from gpu_gpt2.data.prepare.download import Remote, download_all
from gpu_gpt2.data.prepare.published import NAMES, expected_bytes, published
from gpu_gpt2.data.prepare.shards import Plan, Prepared, finished, prepare
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.tokenizer import make_tokenizer
from gpu_gpt2.tools.show import describe

data_app = typer.Typer(no_args_is_help=True, help="Make, get and look into files of tokens.")

Out = Annotated[Path, typer.Option(help="The files come into a folder in this one.")]
OUT: Final = Path("data")
_NUMBER: Final = re.compile(r"_\d{6}\.bin$")
_VAL: Final = re.compile(r"_val(_\d{6})?\.bin$")


@data_app.command("prepare")
def prepare_data(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE...",
            help=f"{', '.join(recipes.NAMES)}; or .txt, .jsonl and .parquet files, or folders.",
        ),
    ],
    out: Out = OUT,
    tokenizer: Annotated[str, typer.Option(help="gpt2 | bytes | the folder of one")] = "gpt2",
    shard_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens in a file; {recipes.SHARD_TOKENS} if not given.")
    ] = None,
    val_tokens: Annotated[
        int | None, typer.Option(help="Of own files: tokens held out; else about a tenth.")
    ] = None,
    field: Annotated[
        str, typer.Option(help="Of own files: where .jsonl and .parquet have text.")
    ] = "text",
    raw: Annotated[
        Path | None, typer.Option("--from", help="Raw text of NAME that is here already.")
    ] = None,
) -> None:
    """Turn text into token files; the same command goes on where it was stopped."""
    name = recipes.ALIASES.get(names[0], names[0])
    if name in recipes.NAMES:
        if len(names) > 1:
            raise ConfigError(f"{name} is a data set of its own; prepare it without other names")
        if val_tokens is not None or field != "text":
            raise ConfigError(f"--val-tokens and --field are for own files; {name} needs neither")
    elif raw is not None:
        raise ConfigError(f"--from goes with {', '.join(recipes.NAMES)}; own files need none")
    elif not Path(name).exists():
        raise ConfigError(
            f"no data set and no file {name}; choose {', '.join(recipes.NAMES)}, or name a file"
        )
    with _going_on():
        if name == recipes.HELLASWAG:
            path, count = recipes.prepare_hellaswag(out, raw, tokenizer, _download)
            say(f"made {count:,} examples in {path}")
        elif name in recipes.NAMES:
            plan = recipes.plan_named(name, out, tokenizer, shard_tokens)
            done = finished(plan) if raw is None else None
            if done is None:
                plan = recipes.with_text(plan, name, raw, _download)
            _say_prepared(plan, done or _prepare(plan))
        else:
            paths = list(map(Path, names))
            plan = recipes.plan_own(paths, out, tokenizer, field, shard_tokens, val_tokens)
            _say_prepared(plan, _prepare(plan))


@data_app.command("get")
def get_data(
    name: Annotated[str, typer.Argument(help=" | ".join(NAMES))],
    out: Out = OUT,
    tokens: Annotated[
        int | None, typer.Option(help="Training tokens; the last file is cut. All if not given.")
    ] = None,
) -> None:
    """Download token files that others have made, or llm.c's starter pack."""
    name = recipes.ALIASES.get(name, name)
    remotes = published(name, out, tokens)
    with _going_on():
        _download(remotes)
    for remote in remotes[:8]:
        say(f"{remote.path.stat().st_size:15,} bytes  {remote.path}")
    if len(remotes) > 8:
        say(f"and {len(remotes) - 8} more in {remotes[0].path.parent}")


@data_app.command("show")
def show_data(
    file: Annotated[Path, typer.Argument(help="Tokens, examples, tokenizer, model, debug state.")],
    tokenizer: Annotated[str, typer.Option(help="gpt2 | bytes | the folder of one")] = "gpt2",
) -> None:
    """Print the header of a file of llm.c, its counts, and how its text begins."""
    description = describe(file, make_tokenizer(tokenizer, ()))
    table = Table(show_header=False, box=None)
    for row in description.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if description.text:
        say(description.text)


@contextmanager
def _going_on() -> Iterator[None]:
    """Ctrl-C becomes one line: what is complete stays."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; give the same command again to go on")
        raise typer.Exit(INTERRUPTED) from None


def _prepare(plan: Plan) -> Prepared:
    total = sum(source.path.stat().st_size for source in plan.sources)
    with Progress(
        BarColumn(bar_width=24),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=total, tokens=0)
        return prepare(plan, lambda read, n: progress.update(task, completed=read, tokens=n))


def _download(remotes: Sequence[Remote]) -> None:
    with Progress(
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=expected_bytes(remotes) or None)
        download_all(remotes, lambda count: progress.advance(task, count))


def _say_prepared(plan: Plan, done: Prepared) -> None:
    val = sum(shard.tokens for shard in done.shards if _VAL.search(shard.file))
    count = f"{len(done.shards)} file{'s' if len(done.shards) > 1 else ''}"
    speed = f", {done.text_bytes / 1e6 / done.seconds:.1f} MB/s" if done.text_bytes else ""
    what = "made" if done.text_bytes else "were here already, checked:"
    say(
        f"{what} {done.tokens - val:,} training and {val:,} validation tokens in {count} in "
        f"{plan.folder}{speed}"
    )
    files = plan.folder / _NUMBER.sub("_*.bin", done.shards[-1].file)
    spec = "" if plan.tokenizer == "gpt2" else f" --tokenizer {shlex.quote(plan.tokenizer)}"
    say(f"train on it: gpu-gpt2 train --data {shlex.quote(str(files))}{spec}")
