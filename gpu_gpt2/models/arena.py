"""Arenas: many tensors in one flat allocation, each a named view of it.

A model's parameters lie in one arena per kind (weights, gradients, optimizer state), its
activations in another. So pointers never move, one launch updates all weights, and memory is known
before anything is allocated. The tables of tensors stand beside the model: see gpt2.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import numpy as np

from gpu_gpt2.device.base import Array

ALIGNMENT: Final = 256  # bytes, as of cudaMalloc; a vector load or store needs 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor. `dtype` is "X" for the activations' dtype, else "float32" or "int32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "X"
    init: str = ""  # initial values of a parameter: "normal", "residual", "ones" or "zeros"
    decay: bool = False  # AdamW's weight decay applies to this parameter
    matrices: tuple[int, ...] = ()  # rows of each matrix in a layer's part: see layer_matrices
    stacked: bool = False  # the first dimension is the layer; it is 1 if layers share one buffer
    rows: int = 0  # rows in use where the first dimension is padded; 0 means all of them
    shares: str = ""  # the tensor whose memory this one uses while that one is not needed

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layer_matrices(
    name: str, layers: int, rows: tuple[int, ...], columns: int, *, init: str
) -> TensorSpec:
    """Returns the tensor of matrices (out, in) that each layer has side by side, such as q, k, v.

    `rows` are those of each matrix. Muon updates every one of them by itself.
    """
    shape = (layers, sum(rows), columns)
    return TensorSpec(name, shape, init=init, decay=True, matrices=rows, stacked=True)


def element_count(specs: Iterable[TensorSpec]) -> int:
    """Returns the elements of an arena that holds `specs` without gaps."""
    return sum(spec.size for spec in specs)


def bytes_of(specs: Iterable[TensorSpec], x_dtype: np.dtype[np.generic]) -> int:
    """Returns the bytes of an arena that holds `specs` with X = x_dtype, alignment included."""
    return sum(
        _aligned(spec.size * _dtype(spec, x_dtype).itemsize) for spec in specs if not spec.shares
    )


def views(
    specs: Iterable[TensorSpec], x_dtype: np.dtype[np.generic], arena: Array
) -> SimpleNamespace:
    """Returns the tensors as views of a byte arena: `views(...).qkv` has the shape in its spec."""
    named = SimpleNamespace()
    offset = 0
    for spec in specs:
        if spec.shares:
            whole = getattr(named, spec.shares).reshape(-1)
            setattr(named, spec.name, whole[: spec.size].reshape(spec.shape))
            continue
        dtype = _dtype(spec, x_dtype)
        stop = offset + spec.size * dtype.itemsize
        if stop > arena.size:
            raise MemoryError(f"{spec.name}: the arena of {arena.size} bytes is too small")
        setattr(named, spec.name, arena[offset:stop].view(dtype).reshape(spec.shape))
        offset += _aligned(stop - offset)
    return named


def flat_views(specs: Iterable[TensorSpec], arena: Array) -> SimpleNamespace:
    """Returns the tensors as named views of an arena of one dtype without gaps."""
    named = SimpleNamespace()
    for spec, start in offsets(specs):
        setattr(named, spec.name, arena[start : start + spec.size].reshape(spec.shape))
    return named


def by_layer(
    specs: Iterable[TensorSpec], named: SimpleNamespace, n_layer: int
) -> list[SimpleNamespace]:
    """Returns the stacked tensors of each layer, by name and without the first dimension."""
    stacked = [(spec.name, getattr(named, spec.name)) for spec in specs if spec.stacked]
    return [
        SimpleNamespace(**{name: tensor[l % tensor.shape[0]] for name, tensor in stacked})
        for l in range(n_layer)
    ]


def offsets(specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, int]]:
    """Yields each tensor with the index of its first element in an arena without gaps."""
    start = 0
    for spec in specs:
        yield spec, start
        start += spec.size


def _dtype(spec: TensorSpec, x_dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return x_dtype if spec.dtype == "X" else np.dtype(spec.dtype)


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
