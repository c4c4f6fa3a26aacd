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

from gpu_gpt2.config import MAX_RECOMPUTE, ModelConfig
from gpu_gpt2.device.base import Array

ALIGNMENT: Final = 256  # bytes; what cudaMalloc gives, and more than any vector access needs


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor. `dtype` is "X" for the activations' dtype, else "float32" or "int32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "X"
    init: str = ""  # of parameters: "normal", "residual", "ones" or "zeros"
    stacked: bool = False  # the first dimension is the layer; it is 1 if layers take turns
    shares: str = ""  # the tensor whose memory this one uses while that one is not needed

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
        TensorSpec("qkvw", (L, 3 * C, C), init="normal", stacked=True),
        TensorSpec("attprojw", (L, C, C), init="residual", stacked=True),
        TensorSpec("fcw", (L, 4 * C, C), init="normal", stacked=True),
        TensorSpec("fcprojw", (L, C, 4 * C), init="residual", stacked=True),
        TensorSpec("ln1w", (L, C), init="ones", stacked=True),
        TensorSpec("ln1b", (L, C), init="zeros", stacked=True),
        TensorSpec("qkvb", (L, 3 * C), init="zeros", stacked=True),
        TensorSpec("attprojb", (L, C), init="zeros", stacked=True),
        TensorSpec("ln2w", (L, C), init="ones", stacked=True),
        TensorSpec("ln2b", (L, C), init="zeros", stacked=True),
        TensorSpec("fcb", (L, 4 * C), init="zeros", stacked=True),
        TensorSpec("fcprojb", (L, C), init="zeros", stacked=True),
        TensorSpec("lnfw", (C,), init="ones"),
        TensorSpec("lnfb", (C,), init="zeros"),
    )


def parameter_count(c: ModelConfig) -> int:
    """Elements of the parameter arena, padded vocabulary rows included."""
    return sum(spec.size for spec in parameters(c))


def decayed_count(c: ModelConfig) -> int:
    """How many elements at the start of the parameter arena take weight decay: the matrices."""
    return sum(spec.size for spec in parameters(c) if spec.init in ("normal", "residual"))


def activations(
    c: ModelConfig, B: int, T: int, *, recompute: int = 0, training: bool = True
) -> tuple[TensorSpec, ...]:
    """Every tensor of a forward and backward pass besides parameters, for a batch of (B, T).

    The first group is kept from forward to backward, the second is scratch. Each level of
    `recompute` keeps less, and computes it again in the backward pass: 1 the outputs of GELU, 2
    also those of the layernorms, 3 all of a block but its input. Without `training` nothing is
    kept, and there is no backward pass.
    """
    L, C, H, D, Vp = c.n_layer, c.n_embd, c.n_head, c.head_size, c.padded_vocab_size
    N = B * T

    def copies(level: int) -> int:
        """How many layers keep their own copy of what is computed again from `level` on."""
        return L if training and recompute < level else 1

    def stacked(name: str, level: int, *shape: int, dtype: str = "X") -> TensorSpec:
        return TensorSpec(name, (copies(level), *shape), dtype, stacked=True)

    kept = (
        TensorSpec("embedded", (N, C)),
        stacked("ln1", 2, N, C),
        stacked("ln1_mean", 2, N, dtype="float32"),
        stacked("ln1_rstd", 2, N, dtype="float32"),
        stacked("qkv", 3, B, T, 3, H, D),
        stacked("lse", 3, B, H, T, dtype="float32"),
        stacked("att", 3, B, T, H, D),
        stacked("res_att", 3, N, C),  # residual stream after attention
        stacked("ln2", 2, N, C),
        stacked("ln2_mean", 2, N, dtype="float32"),
        stacked("ln2_rstd", 2, N, dtype="float32"),
        stacked("fc", 3, N, 4 * C),
        stacked("gelu", 1, N, 4 * C),
        stacked("res_mlp", MAX_RECOMPUTE + 1, N, C),  # residual stream after the MLP
        TensorSpec("lnf", (N, C)),
        TensorSpec("lnf_mean", (N,), "float32"),
        TensorSpec("lnf_rstd", (N,), "float32"),
        TensorSpec("logits", (N, Vp)),  # their gradient, after the classifier
        TensorSpec("losses", (N,), "float32"),
    )
    scratch = (
        TensorSpec("branch", (N, C)),  # a projection before it joins the residual; its gradient
        TensorSpec("tokens", (B, T), "int32"),
        TensorSpec("targets", (N,), "int32"),
    )
    backward = (
        TensorSpec("dres", (N, C)),  # gradient of the residual stream
        TensorSpec("dfc", (N, 4 * C)),
        TensorSpec("dqkv", (B, T, 3, H, D), shares="dfc"),
        TensorSpec("delta", (B, H, T), "float32"),
        TensorSpec("order", (N,), "int32"),
    )
    return (*kept, *scratch, *backward) if training else (*kept, *scratch)


def bytes_of(specs: Iterable[TensorSpec], x_dtype: np.dtype[np.generic]) -> int:
    """Bytes of an arena that holds `specs` with X = x_dtype, alignment included."""
    return sum(
        _aligned(spec.size * _dtype(spec, x_dtype).itemsize) for spec in specs if not spec.shares
    )


def views(
    specs: Iterable[TensorSpec], x_dtype: np.dtype[np.generic], arena: Array
) -> SimpleNamespace:
    """The tensors as named views of a byte arena: `views(...).qkv` has the shape in its spec."""
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
    """The tensors as named views of an arena of one dtype, without gaps: for parameters."""
    named = SimpleNamespace()
    for spec, start in offsets(specs):
        setattr(named, spec.name, arena[start : start + spec.size].reshape(spec.shape))
    return named


def by_layer(
    specs: Iterable[TensorSpec], named: SimpleNamespace, n_layer: int
) -> list[SimpleNamespace]:
    """The stacked tensors of each layer, without the first dimension, under the same names."""
    stacked = [(spec.name, getattr(named, spec.name)) for spec in specs if spec.stacked]
    return [
        SimpleNamespace(**{name: tensor[l % tensor.shape[0]] for name, tensor in stacked})
        for l in range(n_layer)
    ]


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
