"""Token files, read by memory map: llm.c's shards for GPT-2 and Llama 3, and int32 files.

A shard is a header (magic, version, count of tokens) followed by the tokens, uint16 for GPT-2 and
uint32 for Llama 3. modded-nanogpt uses llm.c's shards for GPT-2. Files that llm.c made before May
2024 are int32 tokens without a header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import new_file, reading, unexpected
from gpu_gpt2.formats.llmc_header import (
    GPT2_SHARD_MAGIC,
    HEADER_BYTES,
    INT32_MAX,
    KINDS,
    LLAMA3_SHARD_MAGIC,
    Header,
    header_bytes,
    other_kind,
    read_header,
)

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]  # uint16, uint32 or int32

MAX_TOKENS: Final = INT32_MAX  # most tokens of a shard: its header holds the count as an int32
SHARD_TOKENS: Final = 10**8  # tokens of every shard of llm.c's data sets but the last
CHECK_BLOCK: Final = 1 << 22  # tokens compared with the vocabulary at once: little memory

# llm.c's names of token files: STEM_train.bin and STEM_val.bin, or, for a set of numbered shards,
# STEM_val_000000.bin, STEM_train_000001.bin, STEM_train_000002.bin and so on.
_FILE_NAME: Final = re.compile(r"(?P<stem>.*)_(?P<split>train|val)(?:_\d+)?\.bin")
_NUMBER: Final = re.compile(r"_\d{6}\.bin$")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of shard."""

    name: str
    magic: int
    version: int
    dtype: np.dtype[Any]


GPT2: Final = Kind("GPT-2 shard", GPT2_SHARD_MAGIC, 1, np.dtype("<u2"))
LLAMA3: Final = Kind("Llama-3 shard", LLAMA3_SHARD_MAGIC, 7, np.dtype("<u4"))
HEADERLESS: Final = np.dtype("<i4")

_SHARDS: Final[Mapping[int, Kind]] = {kind.magic: kind for kind in (GPT2, LLAMA3)}
_ZIP: Final = b"PK\3\4"
_PICKLE: Final = b"\x80"
_CHECKED: Final = 1024  # tokens of a file without a header that must look like tokens
_VOCAB_LIMIT: Final = 2**20  # larger than any vocabulary, smaller than text read as int32


def shard_name(stem: str, split: str, number: int | None = None) -> str:
    """The name of a token file; `split` is "train" or "val", `number` None for a single file."""
    return f"{stem}_{split}.bin" if number is None else f"{stem}_{split}_{number:06d}.bin"


def stem_and_split(name: str) -> tuple[str, str]:
    """The stem of a token file's name, and "train" or "val"; two empty strings for other names."""
    match = _FILE_NAME.fullmatch(name)
    return (match["stem"], match["split"]) if match else ("", "")


def shard_pattern(name: str) -> str:
    """The pattern of a numbered token file's name and those of its set; other names unchanged."""
    return _NUMBER.sub("_*.bin", name)


def is_token_file(path: Path) -> bool:
    """True if `path` is named .bin, or begins with a shard's magic number whatever its name."""
    if path.suffix == ".bin":
        return True
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(4), "little") in _SHARDS
    except OSError:
        return False


def read_tokens(path: Path) -> Tokens:
    """The tokens (count,) uint16, uint32 or int32 of a token file, as a memory map; DataError.

    The tokens are not compared with a vocabulary: see `check_tokens`.
    """
    with reading(path, "token file"), path.open("rb") as file:
        start = file.read(4)
        size = file.seek(0, 2)
    magic = int.from_bytes(start, "little")
    if magic in _SHARDS:
        header, kind = read_header(path, "token file"), _SHARDS[magic]
        return _mapped(path, kind.dtype, HEADER_BYTES, _count(header, kind))
    if magic in KINDS:
        raise other_kind(path, magic, "a file of tokens")
    if start == _ZIP or start.startswith(_PICKLE):
        archive = "zip file" if start == _ZIP else "pickle"
        raise DataError(
            f"{path} is a {archive}, perhaps PyTorch's, not a token file; name a file of tokens"
        )
    return _headerless_tokens(path, size)


def _count(header: Header, kind: Kind) -> int:
    header.expect(1, f"version of a {kind.name}", (kind.version,))
    count = header.expect(2, "count of tokens", range(MAX_TOKENS + 1))
    header.expect_size(
        HEADER_BYTES + kind.dtype.itemsize * count, f"{count} tokens, as offset 8 says,"
    )
    return count


def _headerless_tokens(path: Path, size: int) -> Tokens:
    """int32 tokens without a header; DataError unless the first of them look like tokens."""
    if size == 0 or size % HEADERLESS.itemsize:
        raise DataError(
            f"{path} holds {size} bytes and no known magic number at offset 0, expected a shard "
            f"or int32 tokens alone; plain text must not be named .bin"
        )
    tokens = _mapped(path, HEADERLESS, 0, size // HEADERLESS.itemsize)
    first = tokens[:_CHECKED]
    wrong = (first < 0) | (first >= _VOCAB_LIMIT)
    if wrong.any():
        at = int(wrong.argmax())
        raise unexpected(
            path,
            f"int32 {int(first[at])}",
            at * HEADERLESS.itemsize,
            f"a shard (magic number {GPT2.magic} or {LLAMA3.magic}) or int32 tokens alone",
            "plain text must not be named .bin",
        )
    return tokens


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Tokens:
    return np.memmap(path, dtype, "r", offset=offset, shape=(count,))


class TokenWriter:
    """Writes a shard chunk by chunk; its count of tokens may be unknown until the end."""

    def __init__(self, file: BinaryIO, kind: Kind) -> None:
        self.count = 0
        self._file, self._kind = file, kind

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Appends tokens (count,), integers that fit the kind's dtype. Raises OSError."""
        limit = np.iinfo(self._kind.dtype).max
        if tokens.size and not (0 <= int(tokens.min()) and int(tokens.max()) <= limit):
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit the file")
        if self.count + tokens.size > MAX_TOKENS:
            raise ValueError(f"a token file holds at most {MAX_TOKENS} tokens")
        self._file.write(np.ascontiguousarray(tokens, self._kind.dtype).data)
        self.count += tokens.size


@contextmanager
def token_writer(path: Path, kind: Kind = GPT2) -> Iterator[TokenWriter]:
    """A writer for the shard `path`, which appears whole at the end or not at all; DataError."""
    with new_file(path) as file:
        file.write(header_bytes())  # room for the header, which needs the count of tokens
        writer = TokenWriter(file, kind)
        yield writer
        file.seek(0)
        file.write(header_bytes(kind.magic, kind.version, writer.count))


def write_tokens(path: Path, tokens: npt.NDArray[Any], kind: Kind = GPT2) -> None:
    """Writes tokens (count,) as a shard, whole or not at all; DataError."""
    with token_writer(path, kind) as writer:
        writer.write(tokens)


def check_tokens(tokens: Tokens, vocab_size: int, where: str) -> None:
    """Raises DataError if a token is outside the vocabulary; it names the first one.

    where: the file or text that the tokens are from, for the message.
    """
    for start in range(0, len(tokens), CHECK_BLOCK):
        block = tokens[start : start + CHECK_BLOCK]
        if int(block.max()) < vocab_size and int(block.min()) >= 0:
            continue
        at = int(((block >= vocab_size) | (block < 0)).argmax())
        raise DataError(
            f"{where}: token {block[at]} at position {start + at} is outside the vocabulary of "
            f"{vocab_size}; it was made with another tokenizer"
        )
