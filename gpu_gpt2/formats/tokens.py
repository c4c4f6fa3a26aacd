"""Token files, read by memory map: llm.c's shards for GPT-2 and Llama 3, and its first, bare kind.

A shard is the header (magic, version, count) and then the tokens, uint16 or uint32; those of
modded-nanogpt are llm.c's for GPT-2. Files from before May 2024 are int32 tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.llmc_header import HEADER_BYTES, Header, header_bytes, read_header

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]  # uint16, uint32 or int32

MAX_COUNT: Final = 2**31 - 1  # the header counts in an int32
CHECK_BLOCK: Final = 1 << 22  # tokens looked at together


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of shard."""

    name: str
    magic: int
    version: int
    dtype: np.dtype[Any]


GPT2: Final = Kind("GPT-2 shard", 20240520, 1, np.dtype("<u2"))
LLAMA3: Final = Kind("Llama-3 shard", 20240801, 7, np.dtype("<u4"))
BARE: Final = np.dtype("<i4")

_SHARDS: Final[Mapping[int, Kind]] = {kind.magic: kind for kind in (GPT2, LLAMA3)}
_OTHER_FILES: Final[Mapping[int, str]] = {
    20240326: "a model of llm.c's",
    20240803: "a Llama model of llm.c's",
    20240327: "a debug state of llm.c's",
    20240328: "a tokenizer of llm.c's",
    20240522: "an evaluation file of llm.c's",
    20240527: "an optimizer state of llm.c's",
    int.from_bytes(b"PK\3\4", "little"): "a zip file, perhaps PyTorch's",
}
_PICKLE: Final = b"\x80"


def is_token_file(path: Path) -> bool:
    """Whether `path` is named .bin or begins with a shard's magic number, whatever its name."""
    if path.suffix == ".bin":
        return True
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(4), "little") in _SHARDS
    except OSError:
        return False


def read_tokens(path: Path) -> Tokens:
    """tokens (count,) uint16, uint32 or int32 of a token file, mapped, not loaded; DataError.

    They are not checked against a vocabulary: see `check_tokens`.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
            size = file.seek(0, 2)
    except OSError as e:
        raise DataError(f"cannot read the token file {path}: {e.strerror}") from e
    magic = int.from_bytes(start, "little")
    if magic in _SHARDS:
        header, kind = read_header(path, "token file"), _SHARDS[magic]
        return _mapped(path, kind.dtype, HEADER_BYTES, _count(header, kind))
    if magic in _OTHER_FILES or start.startswith(_PICKLE):
        what = _OTHER_FILES.get(magic, "a pickle, perhaps PyTorch's")
        raise DataError(f"{path} is {what}, not a token file; name a file of tokens")
    return _bare_tokens(path, size)


def _count(header: Header, kind: Kind) -> int:
    header.expect(1, f"version of a {kind.name}", (kind.version,))
    count = header.expect(2, "count of tokens", range(MAX_COUNT + 1))
    header.expect_size(
        HEADER_BYTES + kind.dtype.itemsize * count, f"{count} tokens, as offset 8 says,"
    )
    return count


def _bare_tokens(path: Path, size: int) -> Tokens:
    """int32 tokens without a header. Nothing marks such a file, so its first ones must look it."""
    expected = (
        f"expected a shard (magic number {GPT2.magic} or {LLAMA3.magic}) or int32 tokens alone"
    )
    if size == 0 or size % BARE.itemsize:
        raise DataError(
            f"{path} holds {size} bytes and no known magic number at offset 0: {expected}; "
            f"plain text must not be named .bin"
        )
    tokens = _mapped(path, BARE, 0, size // BARE.itemsize)
    first = tokens[:1024]
    wrong = (first < 0) | (first >= 2**20)  # no vocabulary is as large; text read as int32 is
    if wrong.any():
        at = int(wrong.argmax())
        raise DataError(
            f"{path} is no token file: {int(first[at])} at offset {at * BARE.itemsize}, "
            f"{expected}; plain text must not be named .bin"
        )
    return tokens


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Tokens:
    return np.memmap(path, dtype, "r", offset=offset, shape=(count,))


class TokenWriter:
    """Takes tokens chunk by chunk for a shard whose length is known only at its end."""

    def __init__(self, file: BinaryIO, kind: Kind) -> None:
        self.count = 0
        self._file, self._kind = file, kind

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Adds tokens (count,), integers that fit the kind's dtype. Raises OSError."""
        limit = np.iinfo(self._kind.dtype).max
        if tokens.size and not (0 <= int(tokens.min()) and int(tokens.max()) <= limit):
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit the file")
        if self.count + tokens.size > MAX_COUNT:
            raise ValueError(f"a token file holds at most {MAX_COUNT} tokens")
        self._file.write(np.ascontiguousarray(tokens, self._kind.dtype).data)
        self.count += tokens.size


@contextmanager
def token_writer(path: Path, kind: Kind = GPT2) -> Iterator[TokenWriter]:
    """A writer for the shard `path`, which appears whole at the end or not at all; DataError."""
    try:
        with whole(path) as temporary, temporary.open("wb") as file:
            file.write(header_bytes())  # the count comes at the end
            writer = TokenWriter(file, kind)
            yield writer
            file.seek(0)
            file.write(header_bytes(kind.magic, kind.version, writer.count))
    except OSError as e:
        raise DataError(
            f"cannot write {path}: {e.strerror}; make room or choose another folder"
        ) from e


def write_tokens(path: Path, tokens: npt.NDArray[Any], kind: Kind = GPT2) -> None:
    """Writes tokens (count,) as a shard, whole or not at all; DataError."""
    with token_writer(path, kind) as writer:
        writer.write(tokens)


def check_tokens(tokens: Tokens, vocab_size: int, where: str) -> None:
    """DataError that names the first token outside the vocabulary, if there is one."""
    for start in range(0, len(tokens), CHECK_BLOCK):
        block = tokens[start : start + CHECK_BLOCK]
        if int(block.max()) < vocab_size and int(block.min()) >= 0:
            continue
        at = int(((block >= vocab_size) | (block < 0)).argmax())
        raise DataError(
            f"{where}: token {block[at]} at position {start + at} is outside the vocabulary of "
            f"{vocab_size}; it was made with another tokenizer"
        )
