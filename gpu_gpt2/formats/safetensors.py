"""Reads and writes safetensors files one tensor at a time.

The format: the header's length as 8 little-endian bytes; the header, JSON with the dtype, shape and
offsets of each tensor, padded with blanks; then the tensors without gaps. The safetensors library
only checks files here: it would map a file into memory as a whole to read it, and it writes only
tensors that are all in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import read_array, write_array
from gpu_gpt2.models.weights import BFLOAT16, Weights

LENGTH_BYTES: Final = 8  # the length of the header stands in front of it
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
}


class TensorFile:
    """A safetensors file to read from; its errors are DataErrors that name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(LENGTH_BYTES), "little")
                with safe_open(path, framework="numpy"):
                    pass  # opening a file checks its lengths, names, shapes and offsets
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except SafetensorError as e:
            raise DataError(f"{path}: not a whole safetensors file: {e}") from e
        except OSError as e:
            raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
        header.pop("__metadata__", None)
        self._tensors: dict[str, Any] = header
        self._data = LENGTH_BYTES + length  # the offset of the first tensor

    @property
    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a tensor; DataError unless it is one of DTYPES."""
        dtype = self._tensors[name]["dtype"]
        if dtype not in DTYPES:
            raise DataError(
                f"{self.path}: {name}: expected one of {', '.join(DTYPES)}, found {dtype}"
            )
        return DTYPES[dtype]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises DataError if a tensor is missing, has another shape or a dtype not in DTYPES."""
        if name not in self.names:
            raise DataError(f"{self.path}: tensor {name} of shape {shape} is missing")
        if (found := self.shape(name)) != shape:
            raise DataError(f"{self.path}: {name}: expected shape {shape}, found {found}")
        self.dtype(name)

    def read(self, name: str, rows: range | None = None) -> Weights:
        """Reads a tensor that was checked, or some consecutive `rows` of it."""
        dtype, (length, *row) = self.dtype(name), self.shape(name)
        rows = rows or range(length)
        start: int = self._data + self._tensors[name]["data_offsets"][0]
        start += rows.start * math.prod(row) * dtype.itemsize
        return read_array(self.path, start, (len(rows), *row), dtype)


class TensorWriter:
    """Writes tensors of one dtype in any order into a safetensors file. Raises OSError."""

    def __init__(
        self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]
    ) -> None:
        """Writes the header into the empty `file`; `shapes` has all tensors of the file."""
        code = next(code for code, known in DTYPES.items() if known == dtype)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older transformers insist
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        data = LENGTH_BYTES + len(text)
        self._file, self._dtype = file, dtype
        self._starts = {name: data + header[name]["data_offsets"][0] for name in shapes}

    def write(self, name: str, values: Weights) -> None:
        """Writes a tensor, which may be a strided view, in the file's dtype."""
        write_array(self._file, self._starts[name], values, self._dtype)
