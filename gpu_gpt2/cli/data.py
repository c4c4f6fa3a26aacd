"""`gpu-gpt2 data`: makes token files of text, downloads token files, shows what is in a file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.progress import TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from gpu_gpt2.cli.common import INTERRUPTED, bytes_progress, console, say
from gpu_gpt2.data.prepare import recipes
from gpu_gpt2.data.prepare.download import Remote, download_all
from gpu_gpt2.data.prepare.published import NAMES, expected_bytes, published
from gpu_gpt2.data.prepare.shards import Plan, Prepared, finished, prepare
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.formats.tokens import SHARD_TOKENS, shard_pattern, stem_and_split
from gpu_gpt2.tokenizer import make_tokenizer
from gpu_gpt2.tools.show import describe

data_app = typer.Typer(no_args_is_help=True, help="Make, download and inspect token files.")

OUT: Final = Path("data")
Out = Annotated[Path, typer.Option(help="Folder in which the data set gets a folder of its own.")]
TOKENIZER_HELP: Final = "gpt2, bytes, or the path of a tokenizer's file or folder."


@data_app.command("prepare")
def prepare_data(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE...",
            help=f"A data set ({', '.join(recipes.NAMES)}), or text of your own: .txt, .jsonl and "
            f".parquet files, and folders of them.",
        ),
    ],
    out: Out = OUT,
    tokenizer: Annotated[
        str, typer.Option(help=f"Tokenizer of the text: {TOKENIZER_HELP}")
    ] = "gpt2",
    shard_tokens: Annotated[
        int | None,
        typer.Option(help=f"Tokens in each training file; {SHARD_TOKENS:,} if not given."),
    ] = None,
    val_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of your own text to hold out for validation; about a tenth of the text, "
            f"but at most {recipes.MAX_DEFAULT_VAL_TOKENS:,}, if not given."
        ),
    ] = None,
    field: Annotated[
        str, typer.Option(help="Field or column with the text in your .jsonl and .parquet files.")
    ] = "text",
    raw: Annotated[
        Path | None,
        typer.Option(
            "--from", help="File or folder with the raw text of a data set, instead of a download."
        ),
    ] = None,
) -> None:
    """Make token files of text. Give the same command again to resume after a stop."""
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
    with _stopped_by_ctrl_c():
        if name == recipes.HELLASWAG:
            path, count = recipes.prepare_hellaswag(out, raw, tokenizer, _download)
            say(f"made {count:,} examples in {path}")
        elif name in recipes.NAMES:
            plan = recipes.plan_named(name, out, tokenizer, shard_tokens)
            done = finished(plan) if raw is None else None
            if done is None:
                plan = recipes.with_text(plan, name, raw, _download)
            _report(plan, done or _prepare(plan))
        else:
            paths = list(map(Path, names))
            plan = recipes.plan_own(paths, out, tokenizer, field, shard_tokens, val_tokens)
            _report(plan, _prepare(plan))


@data_app.command("get")
def get_data(
    name: Annotated[str, typer.Argument(help=f"What to download: {' | '.join(NAMES)}.")],
    out: Out = OUT,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Training tokens to download, rounded up to whole files of {SHARD_TOKENS:,}; all "
            f"files if not given. The validation file always comes too."
        ),
    ] = None,
) -> None:
    """Download token files that others made, or llm.c's starter pack.

    Give the same command again to resume after a stop.
    """
    name = recipes.ALIASES.get(name, name)
    remotes = published(name, out, tokens)
    with _stopped_by_ctrl_c():
        _download(remotes)
    for remote in remotes[:8]:
        say(f"{remote.path.stat().st_size:15,} bytes  {remote.path}")
    if len(remotes) > 8:
        say(f"and {len(remotes) - 8} more in {remotes[0].path.parent}")


@data_app.command("show")
def show_data(
    file: Annotated[
        Path,
        typer.Argument(
            help="A file of llm.c: tokens, multiple-choice examples, a tokenizer, a model, a debug "
            "state or an optimizer state."
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(help=f"Tokenizer to print the tokens with: {TOKENIZER_HELP}")
    ] = "gpt2",
) -> None:
    """Print what is in a file of llm.c: its header, its sizes and the beginning of its text."""
    description = describe(file, make_tokenizer(tokenizer, ()))
    table = Table(show_header=False, box=None)
    for row in description.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if description.text:
        say(description.text)


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[None]:
    """Turns Ctrl-C into one line that says how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; give the same command again to resume")
        raise typer.Exit(INTERRUPTED) from None


def _prepare(plan: Plan) -> Prepared:
    total = sum(source.path.stat().st_size for source in plan.sources)
    with bytes_progress(TextColumn("{task.fields[tokens]:,} tokens")) as progress:
        task = progress.add_task("", total=total, tokens=0)
        return prepare(plan, lambda read, n: progress.update(task, completed=read, tokens=n))


def _download(remotes: Sequence[Remote]) -> None:
    with bytes_progress(TransferSpeedColumn()) as progress:
        task = progress.add_task("", total=expected_bytes(remotes) or None)
        download_all(remotes, lambda count: progress.advance(task, count))


def _report(plan: Plan, done: Prepared) -> None:
    """Prints what was made, and the command that trains on it."""
    val = sum(shard.tokens for shard in done.shards if stem_and_split(shard.file)[1] == "val")
    count = f"{len(done.shards)} file{'s' if len(done.shards) > 1 else ''}"
    speed = f", {done.text_bytes / 1e6 / done.seconds:.1f} MB/s" if done.text_bytes else ""
    made = "made" if done.text_bytes else "were here already, checked:"
    say(
        f"{made} {done.tokens - val:,} training and {val:,} validation tokens in {count} in "
        f"{plan.folder}{speed}"
    )
    files = plan.folder / shard_pattern(done.shards[-1].file)
    spec = "" if plan.tokenizer == "gpt2" else f" --tokenizer {shlex.quote(plan.tokenizer)}"
    say(f"train on it: gpu-gpt2 train --data {shlex.quote(str(files))}{spec}")
