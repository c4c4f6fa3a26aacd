"""llm.c's multiple-choice files: a text and four ways it could go on, as HellaSwag asks.

After the header (magic, version, count of examples, bytes of the longest) the examples as uint16:
START, bytes of the example, its index, its label, count of completions, then the tokens of the
context and of each completion, with their count in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.llmc_header import HEADER_BYTES, header_bytes, read_header

MAGIC: Final = 20240522
VERSION: Final = 1
START: Final = 65535  # in front of every example; so no token may have this id
COMPLETIONS: Final = 4

_FIXED_WORDS: Final = 5  # in front of the context's count
_LEAST_BYTES: Final = 2 * (_FIXED_WORDS + 2 * (1 + COMPLETIONS))  # one token each
_LIMIT: Final = 2**16  # of examples, and of bytes in one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """A context and its completions; every token is below START."""

    context: npt.NDArray[Any]  # (n,) integers, n >= 1; read as uint16
    completions: tuple[npt.NDArray[Any], ...]  # COMPLETIONS times (m,), m >= 1
    label: int  # the right completion


def read_choices(path: Path) -> list[Example]:
    """The examples of a multiple-choice file, in order; DataError names what is wrong."""
    header = read_header(path, "multiple-choice file")
    header.expect(0, "magic number", (MAGIC,))
    header.expect(1, "version", (VERSION,))
    count = header.expect(2, "count of examples", range(1, _LIMIT))
    longest = header.expect(3, "size of the longest example", range(_LEAST_BYTES, _LIMIT))
    least, most = HEADER_BYTES + _LEAST_BYTES * count, HEADER_BYTES + longest * count
    if not least <= header.file_bytes <= most or header.file_bytes % 2:
        raise DataError(
            f"{path}: {count} examples at offset 8 would make an even number of bytes from {least} "
            f"to {most}, but the file holds {header.file_bytes}; it was cut off or damaged, so "
            f"write it again"
        )
    try:
        words = np.fromfile(path, "<u2", offset=HEADER_BYTES)
    except OSError as e:
        raise DataError(f"cannot read the multiple-choice file {path}: {e.strerror}") from e
    examples = []
    sizes = []
    position = 0
    for index in range(count):
        example, size = _example(path, words, position, index)
        examples.append(example)
        sizes.append(2 * size)
        position += size
    if position != len(words):
        raise DataError(
            f"{path}: {2 * (len(words) - position)} bytes follow the last of {count} examples at "
            f"offset {HEADER_BYTES + 2 * position}, expected none; the file is damaged, so write "
            f"it again"
        )
    header.expect(3, "size of the longest example", (max(sizes),))
    return examples


def write_choices(path: Path, examples: Sequence[Example]) -> None:
    """Writes the examples, so that `path` is complete or untouched; DataError names a bad one."""
    if not 1 <= len(examples) < _LIMIT:
        raise DataError(
            f"{path}: {len(examples)} examples; a multiple-choice file holds 1 to {_LIMIT - 1}"
        )
    streams = [_stream(path, index, example) for index, example in enumerate(examples)]
    longest = max(stream.nbytes for stream in streams)
    try:
        with whole(path) as temporary, temporary.open("wb") as file:
            file.write(header_bytes(MAGIC, VERSION, len(examples), longest))
            file.write(np.concatenate(streams).tobytes())
    except OSError as e:
        raise DataError(
            f"cannot write {path}: {e.strerror}; make room or choose another folder"
        ) from e


def _example(
    path: Path, words: npt.NDArray[np.uint16], start: int, index: int
) -> tuple[Example, int]:
    """Example `index`, which begins at word `start` behind the header, and its count of words."""

    def wrong(position: int, what: str, expected: str) -> DataError:
        return DataError(
            f"{path}: example {index}: {what} at offset {HEADER_BYTES + 2 * position}, expected "
            f"{expected}; the file is damaged, so write it again"
        )

    found = len(words) - start
    if 2 * found < _LEAST_BYTES:
        raise wrong(start, f"{2 * found} bytes to the end", f"at least {_LEAST_BYTES}")
    mark, size, number, label, completions = map(int, words[start : start + _FIXED_WORDS])
    if mark != START:
        raise wrong(start, f"word {mark}", f"the start mark {START}")
    if size % 2 or not _LEAST_BYTES <= size <= 2 * found:
        raise wrong(start + 1, f"size {size}", f"an even number from {_LEAST_BYTES} to {2 * found}")
    if number != index:
        raise wrong(start + 2, f"index {number}", str(index))
    if label >= COMPLETIONS:
        raise wrong(start + 3, f"label {label}", f"0 to {COMPLETIONS - 1}")
    if completions != COMPLETIONS:
        raise wrong(start + 4, f"{completions} completions", str(COMPLETIONS))
    end = start + size // 2
    position = start + _FIXED_WORDS
    rows = []
    for _ in range(1 + COMPLETIONS):
        length = int(words[position]) if position < end else 0
        if not 1 <= length < end - position:
            raise wrong(
                position,
                f"{length} tokens",
                f"1 or more, within the example's {size} bytes",
            )
        row = words[position + 1 : position + 1 + length]
        if (marks := np.flatnonzero(row == START)).size:
            raise wrong(position + 1 + int(marks[0]), f"token {START}", f"one below {START}")
        rows.append(row)
        position += 1 + length
    if position != end:
        raise wrong(start + 1, f"size {size}", str(2 * (position - start)))
    return Example(context=rows[0], completions=tuple(rows[1:]), label=label), size // 2


def _stream(path: Path, index: int, example: Example) -> npt.NDArray[np.uint16]:
    """The words of one example."""

    def wrong(what: str) -> DataError:
        return DataError(f"{path}: example {index} {what}")

    if len(example.completions) != COMPLETIONS:
        raise wrong(f"has {len(example.completions)} completions; the file holds {COMPLETIONS}")
    if not 0 <= example.label < COMPLETIONS:
        raise wrong(f"has label {example.label}; it must be 0 to {COMPLETIONS - 1}")
    rows = (example.context, *example.completions)
    for row in rows:
        if row.size == 0:
            raise wrong("has no tokens in its context or in a completion; it needs at least 1")
        if int(row.min()) < 0 or int(row.max()) >= START:
            raise wrong(f"has a token outside 0 to {START - 1}; the file cannot hold it")
    size = 2 * (_FIXED_WORDS + sum(1 + row.size for row in rows))
    if size >= _LIMIT:
        raise wrong(f"makes {size} bytes; the file holds at most {_LIMIT - 1} in one")
    fixed = (START, size, index, example.label, COMPLETIONS)
    parts = [np.array(fixed, "<u2")]
    for row in rows:
        parts += [np.array([row.size], "<u2"), row.astype("<u2")]
    return np.concatenate(parts)
