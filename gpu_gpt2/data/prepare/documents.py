"""Reads the documents of text files one by one, so that files may be larger than memory.

A long document is cut into pieces that give the same tokens as the whole. It is cut only where
white space begins, because GPT-2's pattern also cuts there.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from gpu_gpt2.errors import DataError

BLOCK_CHARS: Final = 1 << 18  # about the length of a piece of a long document
# Length at which a text without white space is cut anyway, because tiktoken cannot encode a run of
# more than 10**6 blanks.
FORCED_CHARS: Final = 2 * BLOCK_CHARS

_BORDER: Final = re.compile(r"\S(?=[ \n])")
_BORDER_CHARS: Final = 4096  # the end of a text is searched first: long texts need no full search
_PARQUET_ROWS: Final = 256  # decoded at once: little memory, few calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file of documents and how to read it."""

    path: Path
    kind: str  # a key of READERS
    field: str = "text"  # field or column of a .jsonl or .parquet file that holds the text
    seed: int = 0  # seed of the shuffled order of stories


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    begins: bool  # whether a document begins here, so that <|endoftext|> comes in front
    read: int  # bytes of the file that have been read so far


def read_pieces(source: Source) -> Iterator[Piece]:
    """Yields the documents of a file in pieces, in order; DataError names file and position."""
    try:
        yield from READERS[source.kind](source)
    except OSError as e:
        raise DataError(f"cannot read {source.path}: {e.strerror or e}") from e


def find_sources(paths: Sequence[Path], field: str) -> tuple[Source, ...]:
    """The text files among `paths` and in the folders among them, sorted; DataError if none."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
            if not inside:
                raise DataError(f"{path} holds no {_listed(KINDS)} file; name a folder that does")
            found += inside
        elif not path.exists():
            raise DataError(f"no file or folder {path}; name one that is there")
        elif path.suffix not in KINDS:
            raise DataError(
                f"{path}: expected a {_listed(KINDS)} file; convert it, or rename it if it is one"
            )
        else:
            found.append(path)
    return tuple(Source(path=path, kind=KINDS[path.suffix], field=field) for path in found)


def json_lines(path: Path, keys: Mapping[str, type]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the objects of a .jsonl file, each with the bytes of the file read so far; DataError.

    keys: the fields that every object must have, with their types.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decoded(path, line, offset).removeprefix("\ufeff")
            if text.strip():
                where = f"{path}: line {number} at offset {offset}"
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as e:
                    raise DataError(
                        f"{where} is not JSON ({e}); expected one object in each line, so mend it"
                    ) from e
                offset += len(line)
                yield _checked(where, value, keys), offset
            else:
                offset += len(line)


def _checked(where: str, value: Any, keys: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected an object; mend it")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            found = f"a {type(value[key]).__name__}" if key in value else "nothing"
            raise DataError(
                f"{where}: expected a {kind.__name__} in the field {key!r}, found {found} (fields: "
                f"{', '.join(map(str, list(value)[:8])) or 'none'}); mend it or name another field"
            )
    return value


def _text(source: Source) -> Iterator[Piece]:
    """The whole file as one document; none if it is empty."""
    if source.path.stat().st_size:
        yield from _in_pieces(_text_blocks(source.path))


def _text_blocks(path: Path) -> Iterator[tuple[str, int]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK_CHARS)
            kept = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise _not_utf8(path, offset - kept + e.start, e.object[e.start]) from e
            offset += len(block)
            yield text, offset
            if not block:
                return


def _json_lines(source: Source) -> Iterator[Piece]:
    for value, read in json_lines(source.path, {source.field: str}):
        yield from _document(value[source.field], read)


def _parquet(source: Source) -> Iterator[Piece]:
    # Imported here because only .parquet files need it and it is slow to load.
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, column = source.path, source.field
    size = path.stat().st_size
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise DataError(
                    f"{path} has no column {column!r}, only {', '.join(schema.names)}; name one "
                    f"with --field"
                )
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {column!r} holds {kind}, expected strings")
            rows = file.metadata.num_rows
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        raise DataError(f"{path}: row {row} of column {column!r} is empty")
                    yield from _document(text, size * row // rows)
    except (pa.ArrowException, UnicodeDecodeError) as e:
        reason = " ".join(str(e).split())
        raise DataError(
            f"{path} is not a readable .parquet file behind row {row}: {reason}; get it again"
        ) from e


def _sections(source: Source) -> Iterator[Piece]:
    """The sections of a text as documents; all but the last keep the blank line at their end."""
    content = source.path.read_bytes()
    sections = _decoded(source.path, content, 0).split("\n\n")
    read = 0
    for i, section in enumerate(sections):
        text = section if i == len(sections) - 1 else section + "\n\n"
        read += len(text.encode())
        yield from _document(text, read)


def _stories(source: Source) -> Iterator[Piece]:
    """The stories of a JSON file of TinyStories, shuffled by the source's seed."""
    path = source.path
    content = path.read_bytes()
    size = len(content)
    try:
        stories = json.loads(_decoded(path, content, 0))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not JSON ({e}); get it again") from e
    del content
    if not isinstance(stories, list):
        raise DataError(f"{path} holds no list of stories; get it again")
    order = list(range(len(stories)))
    random.Random(source.seed).shuffle(order)  # the same order as shuffling the stories, as llm.c
    for done, i in enumerate(order, 1):
        story = _checked(f"{path}: element {i}", stories[i], {"story": str})["story"]
        yield from _document(story.strip(), size * done // len(order))


READERS: Final[Mapping[str, Callable[[Source], Iterator[Piece]]]] = {
    "text": _text,
    "jsonl": _json_lines,
    "parquet": _parquet,
    "sections": _sections,
    "stories": _stories,
}
KINDS: Final[Mapping[str, str]] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}


def _document(text: str, read: int) -> Iterator[Piece]:
    """The pieces of a document that is in memory."""
    if len(text) <= BLOCK_CHARS:
        return iter((Piece(text, True, read),))
    starts = range(0, len(text), BLOCK_CHARS)
    return _in_pieces((text[start : start + BLOCK_CHARS], read) for start in starts)


def _in_pieces(blocks: Iterable[tuple[str, int]]) -> Iterator[Piece]:
    """The pieces of one document, which is cut only where its tokens stay the same."""
    rest, begins, read = "", True, 0
    for block, read in blocks:
        unsearched = max(0, len(rest) - 1)  # the last border may end at the old end
        rest += block
        if len(rest) <= BLOCK_CHARS:
            continue
        cut = _last_border(rest, max(unsearched, len(rest) - _BORDER_CHARS)) or _last_border(
            rest, unsearched
        )
        if not cut and len(rest) >= FORCED_CHARS:
            cut = len(rest)
        if cut:
            yield Piece(rest[:cut], begins, read)
            rest, begins = rest[cut:], False
    if rest or begins:
        yield Piece(rest, begins, read)


def _last_border(text: str, start: int) -> int:
    """The last index of `text` after `start` at which it may be cut; 0 if there is none."""
    end = 0
    for match in _BORDER.finditer(text, start):
        end = match.end()
    return end


def _decoded(path: Path, content: bytes, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _not_utf8(path, offset + e.start, content[e.start]) from e


def _not_utf8(path: Path, offset: int, byte: int) -> DataError:
    return DataError(
        f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}; convert it first, as in: "
        f"iconv -f LATIN1 -t UTF-8"
    )


def _listed(kinds: Mapping[str, str]) -> str:
    return " or ".join(kinds)
