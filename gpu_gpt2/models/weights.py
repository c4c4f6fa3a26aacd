"""Sources of a model's weights, piece by piece; every model file is read and written this way.

A piece is a parameter tensor, or one layer of a stacked one, in our layout: (out, in) matrices, wte
without padding rows. Reading and writing by pieces keeps the memory at one piece, however large the
model is. A writer puts each piece where it belongs, so pieces may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import GPT2_VOCAB_SIZE, ModelConfig
from gpu_gpt2.models.arena import flat_views
from gpu_gpt2.models.families import parameter_count, parameters

FloatArray: TypeAlias = npt.NDArray[np.float32]
Weights: TypeAlias = npt.NDArray[Any]  # float32, float16 or ml_dtypes.bfloat16

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter tensor, or one layer of it."""

    name: str  # name of the tensor in families.parameters
    layer: int | None  # None if the tensor is not stacked
    shape: tuple[int, ...]  # (V, C) for wte, without padding rows


class WeightSource(Protocol):
    """A model whose weights can be read: a file, an arena, a random number generator."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The widest dtype among the pieces, which holds all of them exactly."""
        ...

    @property
    def eot(self) -> int | None:
        """The id of <|endoftext|>, the token that ends a text, if it is known."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder with the model's config.json and training state, if it has one."""
        ...

    @property
    def tokenizer_path(self) -> Path | None:
        """The file or folder with the model's own tokenizer, if it has one."""
        ...

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        """Yields every piece once, in any order, with its values.

        The values may be overwritten when the next piece is asked for.
        """
        ...


def gpt2_eot(config: ModelConfig) -> int | None:
    """The id of <|endoftext|> in a model with GPT-2's vocabulary, in which it is the last token."""
    return GPT2_VOCAB_SIZE - 1 if config.vocab_size == GPT2_VOCAB_SIZE else None


def pieces(config: ModelConfig) -> Iterator[Piece]:
    """All pieces of a model, tensor by tensor in the order of families.parameters."""
    for spec in parameters(config):
        if spec.stacked:
            for layer in range(config.n_layer):
                yield Piece(spec.name, layer, spec.shape[1:])
        else:
            yield Piece(spec.name, None, (spec.rows or spec.shape[0], *spec.shape[1:]))


def part_of(piece: Piece, named: dict[str, Weights]) -> Weights:
    """The view of a piece in the stacked and padded tensors `named`."""
    tensor = named[piece.name]
    return tensor[: piece.shape[0]] if piece.layer is None else tensor[piece.layer]


def named(config: ModelConfig, arena: Weights) -> dict[str, Weights]:
    """The tensors of a parameter arena (n,) by their names in families.parameters, as views."""
    return vars(flat_views(parameters(config), arena))


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """A parameter arena (n,) float32 as a source of weights."""

    config: ModelConfig
    weights: FloatArray
    eot: int | None = None
    folder: ClassVar[Path | None] = None
    tokenizer_path: ClassVar[Path | None] = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weights.dtype

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        tensors = named(self.config, self.weights)
        for piece in pieces(self.config):
            yield piece, part_of(piece, tensors)


def load_arena(source: WeightSource) -> FloatArray:
    """Reads all weights of a source into a parameter arena (n,) float32; padding rows are zero."""
    weights = np.zeros(parameter_count(source.config), np.float32)
    tensors = named(source.config, weights)
    for piece, values in source.read():
        part_of(piece, tensors)[...] = values
    return weights
