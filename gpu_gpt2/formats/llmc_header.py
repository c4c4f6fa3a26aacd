"""The header that all of llm.c's files begin with: 256 little-endian int32, unused ones zero.

The first int32 is the magic number, which tells the kind of file; the second is its version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import reading, unexpected

HEADER_WORDS: Final = 256
HEADER_BYTES: Final = 4 * HEADER_WORDS
INT32_MAX: Final = 2**31 - 1  # the largest size that a header can state

MODEL_MAGIC: Final = 20240326
DEBUG_STATE_MAGIC: Final = 20240327
TOKENIZER_MAGIC: Final = 20240328
GPT2_SHARD_MAGIC: Final = 20240520
MULTIPLE_CHOICE_MAGIC: Final = 20240522
OPTIMIZER_STATE_MAGIC: Final = 20240527
LLAMA3_SHARD_MAGIC: Final = 20240801
LLAMA3_MODEL_MAGIC: Final = 20240803

# A name for each kind of file, for the message that the user named the wrong one.
KINDS: Final[Mapping[int, str]] = {
    MODEL_MAGIC: "a GPT-2 model",
    DEBUG_STATE_MAGIC: "a debug state, the values that gpu-gpt2 verify compares a model with",
    TOKENIZER_MAGIC: "a tokenizer",
    GPT2_SHARD_MAGIC: "text as tokens of GPT-2",
    MULTIPLE_CHOICE_MAGIC: "questions with answers to choose from, such as HellaSwag",
    OPTIMIZER_STATE_MAGIC: "the optimizer state of a run (its model is a model_*.bin beside it)",
    LLAMA3_SHARD_MAGIC: "text as tokens of Llama 3",
    LLAMA3_MODEL_MAGIC: "a Llama 3 model",
}


@dataclass(frozen=True, slots=True)
class Header:
    """The int32 words of a file's header; its errors name the file."""

    path: Path
    words: tuple[int, ...]  # HEADER_WORDS of them
    file_bytes: int

    @property
    def magic(self) -> int:
        return self.words[0]

    @property
    def version(self) -> int:
        return self.words[1]

    def expect_magic(self, magic: int) -> None:
        """Raises DataError unless the file is of the kind that `magic` stands for."""
        self.expect(0, "magic number", (magic,))

    def expect(self, index: int, name: str, allowed: range | tuple[int, ...]) -> int:
        """Word `index`, called `name` in the DataError that is raised if it is not `allowed`."""
        value = self.words[index]
        if value in allowed:
            return value
        expected = (
            f"{allowed.start} to {allowed.stop - 1}"
            if isinstance(allowed, range)
            else " or ".join(map(str, allowed))
        )
        advice = "the file is damaged or of another kind"
        raise unexpected(self.path, f"{name} {value}", 4 * index, expected, advice)

    def expect_size(self, allowed: int | range, content: str) -> None:
        """Raises DataError unless the file has as many bytes as its `content` makes."""
        if isinstance(allowed, int):
            allowed = range(allowed, allowed + 1)
        if self.file_bytes not in allowed:
            size = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 1 else f"{allowed[0]}"
            raise DataError(
                f"{self.path}: {content} would make {size} bytes, but the file holds "
                f"{self.file_bytes}; it was cut off or damaged, so write it again"
            )


def magic_of(path: Path) -> int:
    """The first int32 of a file, 0 if the file is empty; DataError if it cannot be read."""
    with reading(path, "file"), path.open("rb") as file:
        return int.from_bytes(file.read(4), "little")


def read_header(path: Path, kind: str) -> Header:
    """The header of the file `path`, which should be a `kind`, as in "token file"; DataError."""
    with reading(path, kind), path.open("rb") as file:
        content = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(content) < HEADER_BYTES:
        raise DataError(
            f"{path} holds {size} bytes, less than the {HEADER_BYTES} of a {kind}'s header"
        )
    return Header(path, tuple(np.frombuffer(content, "<i4").tolist()), size)


def other_kind(path: Path, magic: int, wanted: str) -> DataError:
    """The error for a file that has the magic number of another kind of KINDS than `wanted`."""
    return DataError(f"{path}: this file of llm.c is {KINDS[magic]}; name {wanted}")


def header_bytes(*words: int) -> bytes:
    """The HEADER_BYTES bytes of a header that begins with `words`, each an int32."""
    header = np.zeros(HEADER_WORDS, "<i4")
    header[: len(words)] = words
    return header.tobytes()
