"""The data sets that `data prepare` knows by name, and the user's own files: text, split, names.

What comes out has the names that llm.c's dev/data scripts give, and the same tokens.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import requests

from gpu_gpt2.data.prepare.documents import Source, find_sources, json_lines
from gpu_gpt2.data.prepare.download import Remote, get_json
from gpu_gpt2.data.prepare.shards import MOST_TOKENS, Plan, Stream
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example, write_choices
from gpu_gpt2.tokenizer import cache_key, make_tokenizer, vocab_size_of

HUGGING_FACE: Final = "https://huggingface.co"
SHARD_TOKENS: Final = 10**8
MOST_VAL_TOKENS: Final = 10**7  # held out of own files where nothing else is said
ALIASES: Final[Mapping[str, str]] = {
    "fineweb": "fineweb10B",
    "edu-fineweb": "edu_fineweb10B",
    "edu_fineweb": "edu_fineweb10B",
}
_TEXT_BYTES_PER_TOKEN: Final = {"bytes": 1}  # of others about 4
_LISTING: Final = "files.json"  # of what is to be got, so that it is asked for once


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set by name."""

    manifest: str  # the beginning of its name
    suffix: str  # of the files of raw text
    sharded: bool
    streams: Callable[[Sequence[Path], int], tuple[Stream, ...]]  # of the files, tokens in a shard
    url: str  # of the raw text: a file, or a folder of Hugging Face's
    bytes: int | None = None  # of that file, if known


def _tinyshakespeare(files: Sequence[Path], shard_tokens: int) -> tuple[Stream, ...]:
    return (
        Stream(
            sources=tuple(Source(path=path, kind="sections") for path in files),
            train="tiny_shakespeare_train",
            val="tiny_shakespeare_val",
            val_tokens=32_768,
        ),
    )


def _tinystories(files: Sequence[Path], shard_tokens: int) -> tuple[Stream, ...]:
    """The first file is held out; stories are shuffled within each."""
    if len(files) < 2:
        raise DataError(
            f"{files[0]} is the only file of TinyStories, and the first of several is held out; "
            f"get all of them"
        )

    def sources(paths: Sequence[Path]) -> tuple[Source, ...]:
        return tuple(Source(path=p, kind="stories", seed=1337 + i) for i, p in enumerate(paths))

    return (
        Stream(sources=sources(files[:1]), train="TinyStories_val"),
        Stream(sources=sources(files[1:]), train="TinyStories_train"),
    )


def _fineweb(stem: str) -> Callable[[Sequence[Path], int], tuple[Stream, ...]]:
    def streams(files: Sequence[Path], shard_tokens: int) -> tuple[Stream, ...]:
        return (
            Stream(
                sources=tuple(Source(path=path, kind="parquet") for path in files),
                train=f"{stem}_train",
                shard_tokens=shard_tokens,
                val=f"{stem}_val_000000",
                val_tokens=shard_tokens,
            ),
        )

    return streams


def _fineweb_recipe(stem: str, repository: str, sample: str) -> Recipe:
    return Recipe(
        manifest=stem,
        suffix=".parquet",
        sharded=True,
        streams=_fineweb(stem),
        url=f"{HUGGING_FACE}/datasets/HuggingFaceFW/{repository}/resolve/main/sample/{sample}",
    )


RECIPES: Final[Mapping[str, Recipe]] = {
    "tinyshakespeare": Recipe(
        manifest="tiny_shakespeare",
        suffix=".txt",
        sharded=False,
        streams=_tinyshakespeare,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        "input.txt",
        bytes=1_115_394,
    ),
    "tinystories": Recipe(
        manifest="TinyStories",
        suffix=".json",
        sharded=False,
        streams=_tinystories,
        url=f"{HUGGING_FACE}/datasets/roneneldan/TinyStories/resolve/main/"
        "TinyStories_all_data.tar.gz",
    ),
    "fineweb10B": _fineweb_recipe("fineweb", "fineweb", "10BT"),
    "fineweb100B": _fineweb_recipe("fineweb", "fineweb", "100BT"),
    "edu_fineweb10B": _fineweb_recipe("edu_fineweb", "fineweb-edu", "10BT"),
    "edu_fineweb100B": _fineweb_recipe("edu_fineweb", "fineweb-edu", "100BT"),
}
HELLASWAG: Final = "hellaswag"
HELLASWAG_URL: Final = (
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
)
NAMES: Final = (*RECIPES, HELLASWAG)

Download = Callable[[Sequence[Remote]], None]


def plan_named(name: str, out: Path, tokenizer: str, shard_tokens: int | None) -> Plan:
    """The plan of a data set of RECIPES, still without its text; ConfigError."""
    recipe = RECIPES[name]
    if shard_tokens is not None and not recipe.sharded:
        raise ConfigError(f"{name} is not cut into shards; leave out --shard-tokens")
    settings = _settings(tokenizer)
    if recipe.sharded:
        settings["shard_tokens"] = _checked_shard_tokens(shard_tokens)
    return Plan(name=recipe.manifest, folder=out / name, tokenizer=tokenizer, settings=settings)


def with_text(plan: Plan, name: str, given: Path | None, download: Download) -> Plan:
    """The plan with its raw text: `given`, a file or folder, else from the folder raw or the web.

    DataError says which file to put where if there is no network.
    """
    recipe = RECIPES[name]
    if given is not None:
        files = _given(given, recipe.suffix)
    elif recipe.suffix == ".parquet":
        files = _sample(recipe, plan.folder / "raw", download)
    else:
        raw = raw_file(recipe.url, plan.folder, recipe.bytes, download)
        files = _unpacked(raw) if raw.suffix == ".gz" else [raw]
    streams = recipe.streams(files, int(plan.settings.get("shard_tokens", 0)))
    return replace(plan, streams=streams)


def plan_own(
    paths: Sequence[Path],
    out: Path,
    tokenizer: str,
    field: str,
    shard_tokens: int | None,
    val_tokens: int | None,
) -> Plan:
    """The plan of the user's own files and folders, named after the first of them; UserError.

    val_tokens: None is about a tenth of the text, at most MOST_VAL_TOKENS.
    """
    sources = find_sources(paths, field)
    if val_tokens is None:
        size = sum(source.path.stat().st_size for source in sources)
        per_token = _TEXT_BYTES_PER_TOKEN.get(tokenizer, 4)
        val_tokens = min(max(1, size // (10 * per_token)), MOST_VAL_TOKENS)
    if not 0 <= val_tokens <= MOST_TOKENS:
        raise ConfigError(f"--val-tokens {val_tokens} must be 0 to {MOST_TOKENS}")
    first = paths[0].resolve()
    name = (first.name if first.is_dir() else first.stem) or "text"
    settings = _settings(tokenizer)
    settings |= {
        "field": field,
        "shard_tokens": _checked_shard_tokens(shard_tokens),
        "val_tokens": val_tokens,
    }
    stream = Stream(
        sources=sources,
        train=f"{name}_train",
        shard_tokens=int(settings["shard_tokens"]),
        val=f"{name}_val_000000" if val_tokens else None,
        val_tokens=val_tokens,
    )
    return Plan(
        name=name, folder=out / name, tokenizer=tokenizer, settings=settings, streams=(stream,)
    )


def prepare_hellaswag(
    out: Path, given: Path | None, tokenizer: str, download: Download
) -> tuple[Path, int]:
    """Writes hellaswag_val.bin: the file and its count of examples; UserError."""
    _settings(tokenizer)
    folder = out / HELLASWAG
    if given is None:
        given = raw_file(HELLASWAG_URL, folder, None, download)
    encode = make_tokenizer(tokenizer, ()).encode
    examples: list[Example] = []
    try:
        for line, _ in json_lines(given, {"ctx": str, "endings": list, "label": int}):
            endings = line["endings"]
            if len(endings) != COMPLETIONS or not all(isinstance(e, str) for e in endings):
                raise DataError(
                    f"{given}: example {len(examples)}: expected {COMPLETIONS} strings in the "
                    f"field 'endings'; get the file again"
                )
            examples.append(
                Example(
                    context=encode(line["ctx"]),
                    completions=tuple(encode(f" {ending}") for ending in endings),
                    label=line["label"],
                )
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"cannot read {given}: {e.strerror}; name a file with --from") from e
    path = folder / "hellaswag_val.bin"
    write_choices(path, examples)
    return path, len(examples)


def raw_file(url: str, folder: Path, size: int | None, download: Download) -> Path:
    """A file of raw text in the folder raw, got from the web if it is not there."""
    path = folder / "raw" / url.rpartition("/")[2]
    if not path.exists():
        download([Remote(url=url, path=path, check=lambda path: None, size=size)])
    return path


def _settings(tokenizer: str) -> dict[str, str | int]:
    if tokenizer.startswith("bpe:"):
        raise ConfigError(
            f"--tokenizer {tokenizer} would have to be trained first; choose gpt2 or bytes, or "
            f"name the folder of a trained tokenizer"
        )
    vocab_size_of(tokenizer)
    return {"tokenizer": cache_key(tokenizer)}


def _checked_shard_tokens(shard_tokens: int | None) -> int:
    if shard_tokens is None:
        return SHARD_TOKENS
    if not 1 <= shard_tokens <= MOST_TOKENS:
        raise ConfigError(f"--shard-tokens {shard_tokens} must be 1 to {MOST_TOKENS}")
    return shard_tokens


def _given(path: Path, suffix: str) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"no file or folder {path}; name the raw text with --from")
        return [path]
    files = sorted(p for p in path.rglob(f"*{suffix}") if p.is_file() and p.name[0] != ".")
    if not files:
        raise DataError(f"{path} holds no {suffix} file; name the raw text with --from")
    return files


def _sample(recipe: Recipe, raw: Path, download: Download) -> list[Path]:
    """The files of a folder of Hugging Face's."""
    listing = raw / _LISTING
    question = recipe.url.replace("/datasets/", "/api/datasets/").replace("/resolve/", "/tree/")
    try:
        if not listing.exists():
            entries = [[Path(e["path"]).name, int(e["size"])] for e in get_json(question)]
            raw.mkdir(parents=True, exist_ok=True)
            with whole(listing) as temporary:
                temporary.write_text(json.dumps(entries))
        found: list[tuple[str, int]] = [
            (str(name), int(size)) for name, size in json.loads(listing.read_bytes())
        ]
    except requests.RequestException as e:
        raise DataError(
            f"cannot get the list of files {question} ({type(e).__name__}); get the .parquet "
            f"files of {recipe.url.replace('/resolve/', '/tree/')} by hand and name their folder "
            f"with --from"
        ) from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{question} or {listing} is no list of files ({type(e).__name__}); delete {listing} "
            f"and try again"
        ) from e
    except OSError as e:
        raise DataError(f"cannot write in {raw}: {e.strerror}; choose another --out") from e
    remotes = [
        Remote(url=f"{recipe.url}/{name}", path=raw / name, check=lambda path: None, size=size)
        for name, size in sorted(found)
        if name.endswith(recipe.suffix) and Path(name).name == name
    ]
    if not remotes:
        raise DataError(f"{question} lists no {recipe.suffix} file; use --from FOLDER")
    download(remotes)
    return [remote.path for remote in remotes]


def _unpacked(archive: Path) -> list[Path]:
    """The .json files of a .tar.gz, in a folder beside it."""
    folder = archive.with_name(archive.name.removesuffix(".tar.gz"))
    try:
        if not folder.exists():
            with whole(folder) as temporary, tarfile.open(archive) as tar:
                temporary.mkdir()
                for member in tar:
                    name = Path(member.name).name
                    content = tar.extractfile(member) if member.isfile() else None
                    if content and name.endswith(".json"):
                        with (temporary / name).open("wb") as file:
                            shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{archive} cannot be unpacked ({e}); delete it and get it again") from e
    except OSError as e:
        raise DataError(f"cannot unpack {archive}: {e.strerror}; make room") from e
    return _given(folder, ".json")
