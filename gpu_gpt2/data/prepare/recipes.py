"""The data sets that `data prepare` knows by name, and the user's own files: text, split, names.

The token files of a data set have the names and the tokens that llm.c's dev/data scripts give them.
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

from gpu_gpt2.data.prepare.documents import Source, find_sources, json_lines
from gpu_gpt2.data.prepare.download import Remote, hub_listing, hub_url
from gpu_gpt2.data.prepare.shards import Plan, Stream
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example, write_choices
from gpu_gpt2.formats.tokens import MAX_TOKENS, SHARD_TOKENS
from gpu_gpt2.tokenizer import cache_key, make_tokenizer, vocab_size_of

MAX_DEFAULT_VAL_TOKENS: Final = 10**7  # held out of own files without --val-tokens
ALIASES: Final[Mapping[str, str]] = {
    "fineweb": "fineweb10B",
    "edu-fineweb": "edu_fineweb10B",
    "edu_fineweb": "edu_fineweb10B",
}
_BYTES_PER_TOKEN: Final = {"bytes": 1}  # bytes of text per token; about 4 with any other tokenizer
_LISTING: Final = "files.json"  # list of the files to download, kept in the folder raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A data set by name: its raw text, and how its token files are made of it."""

    stem: str  # common beginning of the names of the token files and the manifest
    suffix: str  # ending of the names of the raw text files
    sharded: bool  # whether there are several training files of --shard-tokens each
    # Makes the streams of the raw files, with so many tokens in a shard.
    streams: Callable[[Sequence[Path], int], tuple[Stream, ...]]
    dataset: str | None  # data set on the Hugging Face Hub that has the raw text, if one has
    place: str  # location of the raw text: a file or folder in the data set, or a URL
    bytes: int | None = None  # size of that file, if known
    sha256: str | None = None  # checksum of that file, if known


def _tinyshakespeare(files: Sequence[Path], shard_tokens: int) -> tuple[Stream, ...]:
    return (
        Stream(
            sources=tuple(Source(path=path, kind="sections") for path in files),
            stem="tiny_shakespeare",
            val_tokens=32_768,
        ),
    )


def _tinystories(files: Sequence[Path], shard_tokens: int) -> tuple[Stream, ...]:
    """One stream for the first file, which is held out, and one for the others."""
    if len(files) < 2:
        raise DataError(
            f"{files[0]} is the only file of TinyStories, and the first of several is held out; "
            f"get all of them"
        )

    def sources(paths: Sequence[Path]) -> tuple[Source, ...]:
        return tuple(Source(path=p, kind="stories", seed=1337 + i) for i, p in enumerate(paths))

    return (
        Stream(sources=sources(files[:1]), stem="TinyStories", split="val"),
        Stream(sources=sources(files[1:]), stem="TinyStories"),
    )


def _fineweb(stem: str) -> Callable[[Sequence[Path], int], tuple[Stream, ...]]:
    def streams(files: Sequence[Path], shard_tokens: int) -> tuple[Stream, ...]:
        return (
            Stream(
                sources=tuple(Source(path=path, kind="parquet") for path in files),
                stem=stem,
                shard_tokens=shard_tokens,
                val_tokens=shard_tokens,
            ),
        )

    return streams


def _fineweb_recipe(stem: str, dataset: str, sample: str) -> Recipe:
    return Recipe(
        stem=stem,
        suffix=".parquet",
        sharded=True,
        streams=_fineweb(stem),
        dataset=f"HuggingFaceFW/{dataset}",
        place=f"sample/{sample}",
    )


RECIPES: Final[Mapping[str, Recipe]] = {
    "tinyshakespeare": Recipe(
        stem="tiny_shakespeare",
        suffix=".txt",
        sharded=False,
        streams=_tinyshakespeare,
        dataset=None,
        place="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        "input.txt",
        bytes=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": Recipe(
        stem="TinyStories",
        suffix=".json",
        sharded=False,
        streams=_tinystories,
        dataset="roneneldan/TinyStories",
        place="TinyStories_all_data.tar.gz",
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
    """The plan of a data set of RECIPES, without its text, which `with_text` adds; ConfigError."""
    recipe = RECIPES[name]
    if shard_tokens is not None and not recipe.sharded:
        raise ConfigError(f"{name} is not cut into shards; leave out --shard-tokens")
    settings = _settings(tokenizer)
    if recipe.sharded:
        settings["shard_tokens"] = _checked_shard_tokens(shard_tokens)
    return Plan(name=recipe.stem, folder=out / name, tokenizer=tokenizer, settings=settings)


def with_text(plan: Plan, name: str, given: Path | None, download: Download) -> Plan:
    """Adds its raw text to a plan: `given`, a file or folder, or else the folder raw or the web.

    DataError says which file to put where if there is no network.
    """
    recipe = RECIPES[name]
    if given is not None:
        files = _given(given, recipe.suffix)
    elif recipe.suffix == ".parquet":
        files = _sample(recipe, plan.folder / "raw", download)
    else:
        raw = plan.folder / "raw" / recipe.place.rpartition("/")[2]
        if not raw.exists():
            download([_remote(recipe.dataset, recipe.place, raw, recipe.bytes, recipe.sha256)])
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

    val_tokens: None means about a tenth of the text, but at most MAX_DEFAULT_VAL_TOKENS.
    """
    sources = find_sources(paths, field)
    if val_tokens is None:
        size = sum(source.path.stat().st_size for source in sources)
        per_token = _BYTES_PER_TOKEN.get(tokenizer, 4)
        val_tokens = min(max(1, size // (10 * per_token)), MAX_DEFAULT_VAL_TOKENS)
    if not 0 <= val_tokens <= MAX_TOKENS:
        raise ConfigError(f"--val-tokens {val_tokens} must be 0 to {MAX_TOKENS}")
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
        stem=name,
        shard_tokens=int(settings["shard_tokens"]),
        val_tokens=val_tokens,
    )
    return Plan(
        name=name, folder=out / name, tokenizer=tokenizer, settings=settings, streams=(stream,)
    )


def prepare_hellaswag(
    out: Path, given: Path | None, tokenizer: str, download: Download
) -> tuple[Path, int]:
    """Writes hellaswag_val.bin and returns its path and its count of examples; UserError."""
    _settings(tokenizer)
    folder = out / HELLASWAG
    if given is None:
        given = folder / "raw" / HELLASWAG_URL.rpartition("/")[2]
        if not given.exists():
            download([_remote(None, HELLASWAG_URL, given)])
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


def _remote(
    dataset: str | None, place: str, path: Path, size: int | None = None, sha256: str | None = None
) -> Remote:
    """A file of raw text at `place` in a data set of the Hub, or else at the URL `place`."""
    return Remote(
        url=place if dataset is None else hub_url(dataset, place),
        path=path,
        check=lambda path: None,  # the text is read, and so checked, later
        on_hub=dataset is not None,
        size=size,
        sha256=sha256,
    )


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
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ConfigError(f"--shard-tokens {shard_tokens} must be 1 to {MAX_TOKENS}")
    return shard_tokens


def _given(path: Path, suffix: str) -> list[Path]:
    """The file `path`, or the files with `suffix` in the folder `path`, sorted; DataError."""
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"no file or folder {path}; name the raw text with --from")
        return [path]
    files = sorted(p for p in path.rglob(f"*{suffix}") if p.is_file() and p.name[0] != ".")
    if not files:
        raise DataError(f"{path} holds no {suffix} file; name the raw text with --from")
    return files


def _sample(recipe: Recipe, raw: Path, download: Download) -> list[Path]:
    """The files of a sample of a data set, downloaded into the folder `raw`."""
    assert recipe.dataset is not None
    listing = raw / _LISTING
    try:
        if not listing.exists():
            entries = hub_listing(recipe.dataset, recipe.place)
            raw.mkdir(parents=True, exist_ok=True)
            with whole(listing) as temporary:
                temporary.write_text(json.dumps(entries))
        found: list[tuple[str, int]] = [
            (str(name), int(size)) for name, size in json.loads(listing.read_bytes())
        ]
    except (ValueError, TypeError) as e:
        raise DataError(
            f"{listing} is no list of files ({type(e).__name__}); delete it and try again"
        ) from e
    except OSError as e:
        raise DataError(f"cannot write in {raw}: {e.strerror}; choose another --out") from e
    remotes = [
        _remote(recipe.dataset, f"{recipe.place}/{name}", raw / name, size)
        for name, size in sorted(found)
        if name.endswith(recipe.suffix) and Path(name).name == name
    ]
    if not remotes:
        raise DataError(f"{listing} lists no {recipe.suffix} file; delete it, or use --from FOLDER")
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
