"""Arrays to and from files a part at a time; files that appear whole or not at all; checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from gpu_gpt2.errors import DataError
from gpu_gpt2.models.weights import Weights

BLOCK_BYTES: Final = 4 << 20  # what is converted at once: little memory, few calls


def read_array(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Weights:
    """An array of `shape` that lies at byte `offset` of a file; DataError.

    It is read, not mapped: pages of a map count as this process's memory until it is dropped.
    """
    values = np.empty(shape, dtype)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(values.reshape(-1).view(np.uint8).data)
    except OSError as e:
        raise DataError(f"{path}: cannot be read at offset {offset}: {e.strerror}") from e
    if found != values.nbytes:
        raise DataError(
            f"{path}: expected {values.nbytes} bytes at offset {offset}, found {found}; it became "
            f"shorter while it was read"
        )
    return values


def write_array(file: BinaryIO, offset: int, values: Weights, dtype: np.dtype[Any]) -> None:
    """Puts `values`, which may be a strided view, at byte `offset` as `dtype`. Raises OSError.

    bfloat16 is rounded to the nearest, ties to even.
    """
    file.seek(offset)
    rows = max(1, BLOCK_BYTES // values[:1].nbytes)
    for start in range(0, len(values), rows):
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            block = np.ascontiguousarray(values[start : start + rows], dtype)
        file.write(block.reshape(-1).view(np.uint8).data)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`: what is made there becomes `path` when all of it is on the disk.

    Works for a file and for a folder of files. Whatever fails, nothing is left. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for entry in (*temporary.glob("*"), temporary):
            sync(entry)
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
