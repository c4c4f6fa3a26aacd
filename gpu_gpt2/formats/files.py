"""Arrays in files, files that appear whole or not at all, checksums, and errors of bad files."""

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

BLOCK_BYTES: Final = 4 << 20  # converted at once: little memory, few calls


def unexpected(
    path: Path,
    found: str,
    offset: int,
    expected: str,
    advice: str = "the file is damaged, so write it again",
) -> DataError:
    """The error for a file that holds something else at byte `offset` than its format says."""
    return DataError(f"{path}: {found} at offset {offset}, expected {expected}; {advice}")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns an OSError into a DataError that names the file and its `kind`, as in "token file"."""
    try:
        yield
    except OSError as e:
        raise DataError(f"cannot read the {kind} {path}: {e.strerror}") from e


def read_array(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Weights:
    """Reads an array of `shape` that begins at byte `offset` of a file; DataError.

    The array is read rather than mapped, because the pages of a map count as this process's
    memory until the map is dropped.
    """
    values = np.empty(shape, dtype)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(values.reshape(-1).view(np.uint8).data)
    except OSError as e:
        raise DataError(f"{path}: cannot be read at offset {offset}: {e.strerror}") from e
    if found != values.nbytes:
        raise unexpected(
            path,
            f"{found} bytes",
            offset,
            str(values.nbytes),
            "the file became shorter while it was read",
        )
    return values


def write_array(file: BinaryIO, offset: int, values: Weights, dtype: np.dtype[Any]) -> None:
    """Writes `values`, which may be a strided view, at byte `offset` as `dtype`. Raises OSError.

    A conversion to bfloat16 rounds to nearest, ties to even.
    """
    file.seek(offset)
    rows = max(1, BLOCK_BYTES // values[:1].nbytes)
    for start in range(0, len(values), rows):
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            block = np.ascontiguousarray(values[start : start + rows], dtype)
        file.write(block.reshape(-1).view(np.uint8).data)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a hidden name beside `path`, which becomes `path` once all of it is on the disk.

    The caller makes a file or a folder of files under the hidden name. If anything fails, nothing
    of it is left. Raises OSError.
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


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears as `path` whole or not at all; DataError."""
    try:
        with whole(path) as temporary, temporary.open("wb") as file:
            yield file
    except OSError as e:
        raise DataError(
            f"cannot write {path}: {e.strerror}; make room or choose another folder"
        ) from e


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
