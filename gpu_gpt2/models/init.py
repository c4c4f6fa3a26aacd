"""The weights a model starts from: llm.c's, to the last bit, drawn piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.gpt2 import parameters
from gpu_gpt2.models.weights import FloatArray, Piece, load_arena, pieces
from gpu_gpt2.rng.mersenne import MersenneTwister

INIT_STD: Final = np.float32(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """A new model as a source of weights: matrices normal, layernorm weights 1, biases 0.

    Projections into the residual stream start smaller, by sqrt(2 L) (Radford et al. 2019, section
    2.3). The same seed gives the same weights as llm.c; its own is 42.
    """

    config: ModelConfig
    seed: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self) -> Iterator[tuple[Piece, FloatArray]]:
        twister = MersenneTwister(self.seed)
        shrink = np.float32(1) / np.sqrt(np.float32(2 * self.config.n_layer))
        std = {"normal": INIT_STD, "residual": INIT_STD * shrink}
        inits = {spec.name: spec.init for spec in parameters(self.config)}
        # llm.c draws layer by layer, after what stands in no layer.
        order = sorted(pieces(self.config), key=_layer)
        memory = np.empty(max(math.prod(piece.shape) for piece in order), np.float32)
        for piece in order:
            values = memory[: math.prod(piece.shape)]
            init = inits[piece.name]
            if init in std:
                twister.fill_normal(values, float(std[init]))
            else:
                values.fill(1.0 if init == "ones" else 0.0)
            yield piece, values.reshape(piece.shape)


def initial_weights(config: ModelConfig, seed: int) -> FloatArray:
    """A parameter arena (n,) float32 as a model starts, padding rows of wte zero."""
    return load_arena(InitialWeights(config=config, seed=seed))


def _layer(piece: Piece) -> int:
    return -1 if piece.layer is None else piece.layer
