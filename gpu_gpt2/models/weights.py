"""A model's weights piece by piece: what every weight file is read from and written to.

A piece is a parameter tensor, or one layer of a stacked one, in our layout: (out, in) matrices, wte
without padding rows. Reading and writing by pieces keeps memory at one piece, however large the
model; a writer puts each where it belongs, so pieces may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.arena import flat_views
from gpu_gpt2.models.gpt2 import parameter_count, parameters

FloatArray: TypeAlias = npt.NDArray[np.float32]
Weights: TypeAlias = npt.NDArray[Any]  # float32, float16 or ml_dtypes.bfloat16

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece: `layer` is None where the tensor is not stacked."""

    name: str  # as in gpt2.parameters
    layer: int | None
    shape: tuple[int, ...]  # of wte: (V, C)


class WeightSource(Protocol):
    """Where weights come from: a file, an arena, a random number generator."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The widest dtype among the pieces: what keeps all of them exact."""
        ...

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        """Every piece once, in any order, with its values, which the next may overwrite."""
        ...


def pieces(config: ModelConfig) -> Iterator[Piece]:
    """All pieces of a model, tensor by tensor in the order of gpt2.parameters."""
    for spec in parameters(config):
        if spec.stacked:
            for layer in range(config.n_layer):
                yield Piece(spec.name, layer, spec.shape[1:])
        else:
            yield Piece(spec.name, None, (spec.rows or spec.shape[0], *spec.shape[1:]))


def part_of(piece: Piece, named: dict[str, Weights]) -> Weights:
    """The view of the stacked, padded tensors `named` that a piece corresponds to."""
    tensor = named[piece.name]
    return tensor[: piece.shape[0]] if piece.layer is None else tensor[piece.layer]


def named(config: ModelConfig, arena: Weights) -> dict[str, Weights]:
    """The tensors of a parameter arena (n,) by their names in gpt2.parameters, as views."""
    return vars(flat_views(parameters(config), arena))


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """The weights of a parameter arena (n,) float32 as a source."""

    config: ModelConfig
    weights: FloatArray

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weights.dtype

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        tensors = named(self.config, self.weights)
        for piece in pieces(self.config):
            yield piece, part_of(piece, tensors)


def load_arena(source: WeightSource) -> FloatArray:
    """All weights of a source as a parameter arena (n,) float32; padding rows of wte are zero."""
    weights = np.zeros(parameter_count(source.config), np.float32)
    tensors = named(source.config, weights)
    for piece, values in source.read():
        part_of(piece, tensors)[...] = values
    return weights
