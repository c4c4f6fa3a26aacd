"""The header that all of llm.c's files begin with: 256 little-endian int32, unused ones zero."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from gpu_gpt2.errors import DataError

HEADER_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Header:
    """The words of a header, with the file they stand in; errors name both."""

    path: Path
    words: tuple[int, ...]  # 256
    file_bytes: int

    @property
    def magic(self) -> int:
        return self.words[0]

    @property
    def version(self) -> int:
        return self.words[1]

    def expect(self, index: int, what: str, allowed: range | tuple[int, ...]) -> int:
        """Word `index`, which is `what`; DataError unless it is one of `allowed`."""
        value = self.words[index]
        if value in allowed:
            return value
        expected = (
            f"{allowed.start} to {allowed.stop - 1}"
            if isinstance(allowed, range)
            else " or ".join(map(str, allowed))
        )
        raise DataError(
            f"{self.path}: {what} {value} at offset {4 * index}, expected {expected}; "
            f"the file is damaged or of another kind"
        )

    def expect_size(self, file_bytes: int, why: str) -> None:
        """DataError unless the file has so many bytes; `why` says where the number is from."""
        if self.file_bytes != file_bytes:
            raise DataError(
                f"{self.path}: {why} would make {file_bytes} bytes, but the file holds "
                f"{self.file_bytes}; it was cut off or damaged, so write it again"
            )


def read_header(path: Path, kind: str) -> Header:
    """The header of the file `path`, which should be a `kind`, as in "token file"; DataError."""
    try:
        with path.open("rb") as file:
            content = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as e:
        raise DataError(f"cannot read the {kind} {path}: {e.strerror}") from e
    if len(content) < HEADER_BYTES:
        raise DataError(
            f"{path} holds {size} bytes, less than the {HEADER_BYTES} of a {kind}'s header"
        )
    return Header(path, tuple(np.frombuffer(content, "<i4").tolist()), size)


def header_bytes(*words: int) -> bytes:
    """The 1024 bytes of a header that begins with `words`, each an int32."""
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[: len(words)] = words
    return header.tobytes()
