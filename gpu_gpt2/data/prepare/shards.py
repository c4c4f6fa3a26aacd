"""Text to token files that llm.c reads, on all cores, and resumed where an earlier run stopped.

A manifest beside the token files holds their sources and settings, the SHA-256 of each file, and
the place in the text where the next file begins.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.data.prepare.documents import Piece, Source, read_pieces
from gpu_gpt2.data.prepare.encode import Encoded, Place, encode_pieces
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import new_file, sha256_of
from gpu_gpt2.formats.tokens import MAX_TOKENS, shard_name, stem_and_split, token_writer

FORMAT: Final = 1  # raised whenever the same text would give other files

Progress = Callable[[int, int], None]  # total bytes of the sources read, total tokens written


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Sources whose tokens continue from one token file into the next."""

    sources: tuple[Source, ...]
    stem: str  # common beginning of the file names
    split: str = "train"  # "val" if all of the tokens are held out
    shard_tokens: int | None = None  # tokens of a numbered file; None for one file without number
    val_tokens: int = 0  # held out from the beginning, in a file of their own

    def file(self, index: int) -> tuple[str, int]:
        """Name of file `index`, and the most tokens it may have."""
        numbered = self.shard_tokens is not None
        if self.val_tokens:
            if index == 0:
                return shard_name(self.stem, "val", 0 if numbered else None), self.val_tokens
            index -= 1
        if self.shard_tokens is None:
            return shard_name(self.stem, self.split), MAX_TOKENS
        return shard_name(self.stem, self.split, index + 1), self.shard_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The token files to make, and the text to make them from."""

    name: str  # the beginning of the manifest's name
    folder: Path  # folder that holds the token files
    tokenizer: str  # "gpt2", "bytes" or the path of a tokenizer
    settings: Mapping[str, str | int]  # together with the text they decide every byte of the files
    streams: tuple[Stream, ...] = ()  # empty while the text has not been found

    @property
    def manifest(self) -> Path:
        return self.folder / f"{self.name}_manifest.json"

    @property
    def sources(self) -> list[Source]:
        return [source for stream in self.streams for source in stream.sources]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A finished token file, and the place in the text where the next one begins."""

    file: str
    tokens: int
    sha256: str
    stream: int  # index of the stream in the plan
    index: int  # number of the file in its stream, from 0
    source: int  # index of the next file's source in the stream
    piece: int  # index of the next file's piece in that source
    skip: int  # tokens of that piece that are in this file or an earlier one


@dataclass(slots=True, kw_only=True)
class Prepared:
    """The finished token files, and the text and time that this run took for its part of them."""

    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    text_bytes: int = 0  # bytes of the text in UTF-8
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def finished(plan: Plan) -> Prepared | None:
    """The result of the run that made all files of `plan`, if there was one; DataError.

    The raw text, which may be gone by now, is not compared.
    """
    if not plan.manifest.exists():
        return None
    done = _read_manifest(plan)
    return done if done.complete else None


def prepare(plan: Plan, progress: Progress) -> Prepared:
    """Makes the files of `plan` that are missing and checks those that exist already.

    Raises DataError if they were begun with other settings or other text. Must be called in the
    main thread.
    """
    done = _read_manifest(plan) if plan.manifest.exists() else Prepared()
    if done.complete:
        return done
    started = time.monotonic()
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        for number in range(done.shards[-1].stream if done.shards else 0, len(plan.streams)):
            _write_stream(plan, number, done, progress)
        _check_split(plan, done)
        done.complete = True
        _write_manifest(plan, done)
    except OSError as e:
        raise DataError(
            f"cannot write in {plan.folder}: {e.strerror}; make room or choose another --out"
        ) from e
    done.seconds = time.monotonic() - started
    return done


def _write_stream(plan: Plan, number: int, done: Prepared, progress: Progress) -> None:
    """Writes the missing files of stream `number`, and the manifest after each."""
    stream = plan.streams[number]
    for leftover in plan.folder.glob(f".{glob.escape(stream.stem)}_*.bin.*.tmp"):
        leftover.unlink()  # a run that was killed left it
    last = done.shards[-1] if done.shards and done.shards[-1].stream == number else None
    index, place, skip = 0, Place(0, 0, 0), 0
    if last:
        index, place, skip = last.index + 1, Place(last.source, last.piece, 0), last.skip
    starts = [0, *itertools.accumulate(map(_bytes_of, plan.sources))]
    first = sum(len(s.sources) for s in plan.streams[:number])
    text_bytes = starts[first + len(stream.sources)] - starts[first + place.source]
    chunks = encode_pieces(_pieces(stream, place), plan.tokenizer, text_bytes)
    with closing(chunks):
        feed = _Feed(chunks, place, skip)
        while True:
            name, max_tokens = stream.file(index)
            tokens = feed.take(max_tokens)
            if not tokens.size:
                break
            count, before = 0, done.tokens
            with token_writer(plan.folder / name) as out:
                while tokens.size:
                    out.write(tokens)
                    count += tokens.size
                    progress(starts[first + feed.place.source] + feed.place.read, before + count)
                    tokens = feed.take(max_tokens - count)
            done.shards.append(
                Shard(
                    file=name,
                    tokens=count,
                    sha256=sha256_of(plan.folder / name),
                    stream=number,
                    index=index,
                    source=feed.place.source,
                    piece=feed.place.piece,
                    skip=feed.skip,
                )
            )
            _write_manifest(plan, done)
            index += 1
    done.text_bytes += feed.text_bytes


def _pieces(stream: Stream, start: Place) -> Iterator[tuple[Place, Piece]]:
    """The pieces of a stream from `start` on."""
    for i in range(start.source, len(stream.sources)):
        skipped = start.piece if i == start.source else 0
        pieces = enumerate(read_pieces(stream.sources[i]))
        for j, piece in itertools.islice(pieces, skipped, None):
            yield Place(i, j, piece.read), piece


class _Feed:
    """The tokens of a stream in portions of any size, and the next token's place in the text."""

    def __init__(
        self, chunks: Iterator[tuple[list[Place], Encoded]], place: Place, skip: int
    ) -> None:
        """skip: tokens of the first piece to leave out, as an earlier file has them."""
        self._chunks = chunks
        self._places: list[Place] = []
        self._tokens = np.empty(0, np.uint16)
        self._ends = np.empty(0, np.int64)
        self._position = 0  # index of the next token in the chunk
        self.place = place  # the piece of the next token
        self.skip = skip  # tokens of that piece that have been taken
        self.text_bytes = 0  # of all chunks so far

    def take(self, max_tokens: int) -> npt.NDArray[np.uint16]:
        """The next 1 to `max_tokens` tokens; none if that is 0 or at the end of the text."""
        while max_tokens and self._position == self._tokens.size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._places, encoded = chunk
            self._tokens, self._ends = encoded.tokens, encoded.ends
            self._position = self.skip  # 0 except in the first chunk
            self.text_bytes += encoded.text_bytes
        taken = self._tokens[self._position : self._position + max_tokens]
        self._position += taken.size
        if taken.size:
            i = int(np.searchsorted(self._ends, self._position, side="right"))
            if i < len(self._places):
                self.place = self._places[i]
                self.skip = self._position - (int(self._ends[i - 1]) if i else 0)
            else:
                last = self._places[-1]
                self.place, self.skip = last._replace(piece=last.piece + 1), 0
        return taken


def _check_split(plan: Plan, done: Prepared) -> None:
    """Deletes all files and raises DataError if none of them is for training."""
    if any(stem_and_split(shard.file)[1] == "train" for shard in done.shards):
        return
    for path in (plan.manifest, *(plan.folder / shard.file for shard in done.shards)):
        path.unlink(missing_ok=True)
    raise DataError(
        f"{plan.name}: the text makes {done.tokens} tokens, and the first "
        f"{sum(stream.val_tokens for stream in plan.streams)} are held out, so none is left to "
        f"train on; give more text or a smaller --val-tokens"
    )


def _read_manifest(plan: Plan) -> Prepared:
    """The finished files; DataError unless the same plan made them and they are undamaged."""
    path = plan.manifest
    again = f"to begin again, delete {path} or choose another --out"
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") != _digest(content):
            raise ValueError("its SHA-256 is not that of its contents")
        found = content["format"], content["settings"], content["sources"]
        shards = [Shard(**shard) for shard in content["shards"]]
        done = Prepared(shards=shards, complete=bool(content["complete"]))
        sums = {shard.file: str(shard.sha256) for shard in shards}
        positions = [(s.stream, s.index, s.source, s.piece, s.skip, s.tokens) for s in shards]
        if not all(type(n) is int and n >= 0 for row in positions for n in row):
            raise ValueError("a position is no number")
        if any(Path(name).name != name for name in sums):
            raise ValueError("a file lies elsewhere")
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}; {again}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}); {again}") from e
    expected = FORMAT, dict(plan.settings), _sources(plan)
    for what, then, now in zip(("format", "settings", "text"), found, expected, strict=True):
        if then != now and (what != "text" or plan.streams):
            raise DataError(
                f"{path}: the files were begun with another {what} ({_difference(then, now)}); "
                f"{again}"
            )
    for name, sha256 in sums.items():
        file = plan.folder / name
        try:
            damaged = sha256_of(file) != sha256
        except OSError as e:
            raise DataError(f"cannot read {file}: {e.strerror}; {again}") from e
        if damaged:
            raise DataError(f"{file} is not as it was written, its SHA-256 has changed; {again}")
    return done


def _digest(content: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's content, by which damage to the manifest is found."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _difference(then: Any, now: Any) -> str:
    """A few words on how a manifest's entry differs from what it would be now."""
    if isinstance(then, dict) and isinstance(now, dict):
        changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return ", ".join(f"{key} {then.get(key)}, now {now.get(key)}" for key in changed)
    if isinstance(then, list) and isinstance(now, list):
        changed = [str(n[0]) for t, n in zip(then, now, strict=False) if t != n]
        return f"{len(then)} files, now {len(now)}; {', '.join(changed[:3])} changed"
    return f"{then}, now {now}"


def _write_manifest(plan: Plan, done: Prepared) -> None:
    content = {
        "format": FORMAT,
        "settings": dict(plan.settings),
        "sources": _sources(plan),
        "shards": [asdict(shard) for shard in done.shards],
        "complete": done.complete,
    }
    text = json.dumps(content | {"sha256": _digest(content)}, indent=1)
    with new_file(plan.manifest) as file:
        file.write(text.encode() + b"\n")


def _sources(plan: Plan) -> list[list[str | int]]:
    """Name, bytes and modification time of every file of text, by which a change is found."""
    found: list[list[str | int]] = []
    for source in plan.sources:
        stat = source.path.stat()
        found.append([source.path.name, stat.st_size, stat.st_mtime_ns])
    return found


def _bytes_of(source: Source) -> int:
    return source.path.stat().st_size
