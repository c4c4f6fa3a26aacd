"""llm.c's multiple-choice files: contexts with four completions each, such as HellaSwag's.

A header (magic, version, count of examples, bytes of the longest), then the examples as uint16:
START, bytes of the example, its index, its label, count of completions, and the tokens of the
context and of each completion, each with their count in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import new_file, reading, unexpected
from gpu_gpt2.formats.llmc_header import (
    HEADER_BYTES,
    MULTIPLE_CHOICE_MAGIC,
    header_bytes,
    read_header,
)

VERSION: Final = 1
UINT16_MAX: Final = 2**16 - 1
START: Final = UINT16_MAX  # marks the start of an example, so no token may have this id
COMPLETIONS: Final = 4  # every example has four completions, as in HellaSwag
MAX_EXAMPLES: Final = UINT16_MAX  # an example stores its index in a uint16
MAX_EXAMPLE_BYTES: Final = UINT16_MAX  # an example stores its size in a uint16

_FIXED_WORDS: Final = 5  # uint16 words in front of the context's count of tokens
_MIN_EXAMPLE_BYTES: Final = 2 * (_FIXED_WORDS + 2 * (1 + COMPLETIONS))  # each part has a token


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """A context with its completions; every token is below START."""

    context: npt.NDArray[Any]  # (n,) integers, n >= 1; read as uint16
    completions: tuple[npt.NDArray[Any], ...]  # COMPLETIONS times (m,), m >= 1
    label: int  # the right completion


def read_choices(path: Path) -> list[Example]:
    """The examples of a multiple-choice file, in order; DataError names what is wrong."""
    kind = "multiple-choice file"
    header = read_header(path, kind)
    header.expect_magic(MULTIPLE_CHOICE_MAGIC)
    header.expect(1, "version", (VERSION,))
    count = header.expect(2, "count of examples", range(1, MAX_EXAMPLES + 1))
    allowed = range(_MIN_EXAMPLE_BYTES, MAX_EXAMPLE_BYTES + 1)
    longest = header.expect(3, "size of the longest example", allowed)
    least, most = HEADER_BYTES + _MIN_EXAMPLE_BYTES * count, HEADER_BYTES + longest * count
    header.expect_size(range(least, most + 1, 2), f"{count} examples at offset 8")
    with reading(path, kind):
        words = np.fromfile(path, "<u2", offset=HEADER_BYTES)
    examples = []
    sizes = []
    position = 0
    for index in range(count):
        example, size = _example(path, words, position, index)
        examples.append(example)
        sizes.append(2 * size)
        position += size
    if position != len(words):
        found = f"{2 * (len(words) - position)} bytes follow the last of {count} examples"
        raise unexpected(path, found, HEADER_BYTES + 2 * position, "none")
    header.expect(3, "size of the longest example", (max(sizes),))
    return examples


def write_choices(path: Path, examples: Sequence[Example]) -> None:
    """Writes the examples, so that `path` is complete or untouched; DataError names a bad one."""
    if not 1 <= len(examples) <= MAX_EXAMPLES:
        raise DataError(
            f"{path}: {len(examples)} examples; a multiple-choice file holds 1 to {MAX_EXAMPLES}"
        )
    streams = [_stream(path, index, example) for index, example in enumerate(examples)]
    longest = max(stream.nbytes for stream in streams)
    with new_file(path) as file:
        file.write(header_bytes(MULTIPLE_CHOICE_MAGIC, VERSION, len(examples), longest))
        file.write(np.concatenate(streams).tobytes())


def _example(
    path: Path, words: npt.NDArray[np.uint16], start: int, index: int
) -> tuple[Example, int]:
    """Example `index`, which begins at word `start` after the header, and its count of words."""

    def wrong(position: int, found: str, expected: str) -> DataError:
        offset = HEADER_BYTES + 2 * position
        return unexpected(path, f"example {index}: {found}", offset, expected)

    left = 2 * (len(words) - start)  # bytes
    if left < _MIN_EXAMPLE_BYTES:
        raise wrong(start, f"{left} bytes to the end", f"at least {_MIN_EXAMPLE_BYTES}")
    mark, size, number, label, completions = map(int, words[start : start + _FIXED_WORDS])
    if mark != START:
        raise wrong(start, f"word {mark}", f"the start mark {START}")
    if size % 2 or not _MIN_EXAMPLE_BYTES <= size <= left:
        expected = f"an even number from {_MIN_EXAMPLE_BYTES} to {left}"
        raise wrong(start + 1, f"size {size}", expected)
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
    """The uint16 words of one example; DataError if the file cannot hold it."""

    def wrong(reason: str) -> DataError:
        return DataError(f"{path}: example {index} {reason}")

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
    if size > MAX_EXAMPLE_BYTES:
        raise wrong(f"makes {size} bytes; the file holds at most {MAX_EXAMPLE_BYTES} in one")
    fixed = (START, size, index, example.label, COMPLETIONS)
    parts = [np.array(fixed, "<u2")]
    for row in rows:
        parts += [np.array([row.size], "<u2"), row.astype("<u2")]
    return np.concatenate(parts)
