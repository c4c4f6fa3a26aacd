"""The one table of every tensor a training run holds: names, shapes, offsets, views.

Parameters lie in one flat arena per kind (weights, gradients, moments), activations in another,
so that pointers never move, one launch updates all weights, and memory is known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import numpy as np

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device.base import Array

ALIGNMENT: Final = 256  # bytes; what cudaMalloc gives, and more than any vector access needs


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor. `dtype` is "X" for the activations' dtype, else "float32" or "int32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "X"
    init: str = ""  # of parameters: "normal", "residual", "ones" or "zeros"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def parameters(c: ModelConfig) -> tuple[TensorSpec, ...]:
    """The sixteen parameter tensors, stacked over layers, decayed ones first.

    Weights are (out, in). Names are llm.c's. "residual" initialises like "normal" with the
    standard deviation divided by sqrt(2 L) (Radford et al. 2019, section 2.3).
    """
    L, C, Vp = c.n_layer, c.n_embd, c.padded_vocab_size
    return (
        TensorSpec("wte", (Vp, C), init="normal"),
        TensorSpec("wpe", (c.n_positions, C), init="normal"),
        TensorSpec("qkvw", (L, 3 * C, C), init="normal"),
        TensorSpec("attprojw", (L, C, C), init="residual"),
        TensorSpec("fcw", (L, 4 * C, C), init="normal"),
        TensorSpec("fcprojw", (L, C, 4 * C), init="residual"),
        TensorSpec("ln1w", (L, C), init="ones"),
        TensorSpec("ln1b", (L, C), init="zeros"),
        TensorSpec("qkvb", (L, 3 * C), init="zeros"),
        TensorSpec("attprojb", (L, C), init="zeros"),
        TensorSpec("ln2w", (L, C), init="ones"),
        TensorSpec("ln2b", (L, C), init="zeros"),
        TensorSpec("fcb", (L, 4 * C), init="zeros"),
        TensorSpec("fcprojb", (L, C), init="zeros"),
        TensorSpec("lnfw", (C,), init="ones"),
        TensorSpec("lnfb", (C,), init="zeros"),
    )


def parameter_count(c: ModelConfig) -> int:
    """Elements of the parameter arena, padded vocabulary rows included."""
    return sum(spec.size for spec in parameters(c))


def decayed_count(c: ModelConfig) -> int:
    """How many elements at the start of the parameter arena take weight decay: the matrices."""
    return sum(spec.size for spec in parameters(c) if spec.init in ("normal", "residual"))


def widest(c: ModelConfig) -> int:
    """The most columns whose sums a backward pass needs: the MLP's inner width."""
    return 4 * c.n_embd


def activations(c: ModelConfig, B: int, T: int) -> tuple[TensorSpec, ...]:
    """Every tensor of a forward and backward pass besides parameters, for a batch of (B, T).

    The first group is kept from forward to backward, the second is scratch.
    """
    L, C, H, D, Vp = c.n_layer, c.n_embd, c.n_head, c.head_size, c.padded_vocab_size
    N = B * T
    return (
        TensorSpec("embedded", (N, C)),
        TensorSpec("ln1", (L, N, C)),
        TensorSpec("ln1_mean", (L, N), "float32"),
        TensorSpec("ln1_rstd", (L, N), "float32"),
        TensorSpec("qkv", (L, B, T, 3, H, D)),
        TensorSpec("lse", (L, B, H, T), "float32"),
        TensorSpec("att", (L, B, T, H, D)),
        TensorSpec("res_att", (L, N, C)),  # residual stream after attention
        TensorSpec("ln2", (L, N, C)),
        TensorSpec("ln2_mean", (L, N), "float32"),
        TensorSpec("ln2_rstd", (L, N), "float32"),
        TensorSpec("fc", (L, N, 4 * C)),
        TensorSpec("gelu", (L, N, 4 * C)),
        TensorSpec("res_mlp", (L, N, C)),  # residual stream after the MLP
        TensorSpec("lnf", (N, C)),
        TensorSpec("lnf_mean", (N,), "float32"),
        TensorSpec("lnf_rstd", (N,), "float32"),
        TensorSpec("logits", (N, Vp)),  # their gradient, after the classifier
        TensorSpec("losses", (N,), "float32"),
        # scratch
        TensorSpec("branch", (N, C)),  # a projection before it joins the residual; its gradient
        TensorSpec("dres", (N, C)),  # gradient of the residual stream
        TensorSpec("dfc", (N, 4 * C)),
        TensorSpec("dqkv", (B, T, 3, H, D)),
        TensorSpec("delta", (B, H, T), "float32"),
        TensorSpec("tokens", (B, T), "int32"),
        TensorSpec("targets", (N,), "int32"),
        TensorSpec("order", (N,), "int32"),
    )


def bytes_of(specs: Iterable[TensorSpec], x_dtype: np.dtype[np.generic]) -> int:
    """Bytes of an arena that holds `specs` with X = x_dtype, alignment included."""
    return sum(_aligned(spec.size * _dtype(spec, x_dtype).itemsize) for spec in specs)


def views(
    specs: Iterable[TensorSpec], x_dtype: np.dtype[np.generic], arena: Array
) -> SimpleNamespace:
    """The tensors as named views of a byte arena: `views(...).qkv` has the shape in its spec."""
    named = SimpleNamespace()
    offset = 0
    for spec in specs:
        dtype = _dtype(spec, x_dtype)
        stop = offset + spec.size * dtype.itemsize
        if stop > arena.size:
            raise MemoryError(f"{spec.name}: the arena of {arena.size} bytes is too small")
        setattr(named, spec.name, arena[offset:stop].view(dtype).reshape(spec.shape))
        offset += _aligned(stop - offset)
    return named


def flat_views(specs: Iterable[TensorSpec], arena: Array) -> SimpleNamespace:
    """The tensors as named views of an arena of one dtype, without gaps: for parameters."""
    named = SimpleNamespace()
    for spec, start in offsets(specs):
        setattr(named, spec.name, arena[start : start + spec.size].reshape(spec.shape))
    return named


def offsets(specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, int]]:
    """Each tensor with its first element's index in an arena without gaps."""
    start = 0
    for spec in specs:
        yield spec, start
        start += spec.size


def _dtype(spec: TensorSpec, x_dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return x_dtype if spec.dtype == "X" else np.dtype(spec.dtype)


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
