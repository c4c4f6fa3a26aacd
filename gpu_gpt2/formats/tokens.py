"""Token files: llm.c's GPT-2 shards. A header of 256 int32, then the tokens as uint16."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError

Tokens = npt.NDArray[np.uint16]

MAGIC: Final = 20240520
VERSION: Final = 1
HEADER_BYTES: Final = 1024  # int32: magic, version, count of tokens, then zeros


def is_token_file(path: Path) -> bool:
    """Whether `path` is named .bin or begins with the magic number, whatever its name."""
    if path.suffix == ".bin":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC.to_bytes(4, "little")
    except OSError:
        return False


def read_tokens(path: Path) -> Tokens:
    """tokens (count,) uint16 of a token file, mapped, not loaded; DataError names what is wrong."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER_BYTES)
    except OSError as e:
        raise DataError(f"cannot read the token file {path}: {e.strerror}") from e
    if len(header) < HEADER_BYTES:
        raise DataError(
            f"{path} holds {size} bytes, less than the {HEADER_BYTES} of a token file's header"
        )
    magic, version, count = (int(word) for word in np.frombuffer(header, "<i4", count=3))
    if magic != MAGIC:
        raise DataError(
            f"{path} is no token file of GPT-2's: magic number {magic} at offset 0, "
            f"expected {MAGIC}; plain text must not be named .bin"
        )
    if version != VERSION:
        raise DataError(f"{path}: version {version} at offset 4, expected {VERSION}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path}: {count} tokens at offset 8 would make {HEADER_BYTES + 2 * count} bytes, "
            f"but the file holds {size}; it was cut off or damaged, so write it again"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(count,))


def write_tokens(path: Path, tokens: npt.NDArray[Any]) -> None:
    """Writes tokens (count,), integers below 65536, so that `path` is complete or untouched."""
    if tokens.size and not (0 <= int(tokens.min()) and int(tokens.max()) < 2**16):
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit in 16 bits")
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype("<u2", copy=False).tobytes())
        temporary.replace(path)
    except OSError as e:
        raise DataError(
            f"cannot write {path}: {e.strerror}; make room or choose another folder"
        ) from e
    finally:
        with suppress(OSError):  # it is gone when all went well
            temporary.unlink()


def check_tokens(tokens: Tokens, vocab_size: int, where: str) -> None:
    """DataError that names the first token outside the vocabulary, if there is one."""
    if tokens.size == 0 or int(tokens.max()) < vocab_size:
        return
    position = int(np.argmax(tokens >= vocab_size))
    raise DataError(
        f"{where}: token {tokens[position]} at position {position} is outside the vocabulary of "
        f"{vocab_size}; it was made with another tokenizer"
    )
