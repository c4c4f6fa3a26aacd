"""The initial weights of a model, bit for bit as llm.c draws them, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.weights import FloatArray, Piece, gpt2_eot, load_arena, pieces
from gpu_gpt2.rng.mersenne import MersenneTwister

INIT_STD: Final = np.float32(0.02)  # standard deviation of the matrices, as GPT-2's


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """A new model as a source of weights: matrices normal, layernorm weights 1, biases 0.

    The projections into the residual stream have a standard deviation smaller by sqrt(2 L)
    (Radford et al. 2019, section 2.3). A seed gives the same weights as in llm.c, which uses 42.
    """

    config: ModelConfig
    seed: int
    folder: ClassVar[Path | None] = None
    tokenizer_path: ClassVar[Path | None] = None

    @property
    def eot(self) -> int | None:
        return gpt2_eot(self.config)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def read(self) -> Iterator[tuple[Piece, FloatArray]]:
        twister = MersenneTwister(self.seed)
        shrink = np.float32(1) / np.sqrt(np.float32(2 * self.config.n_layer))
        std = {"normal": INIT_STD, "residual": INIT_STD * shrink}
        inits = {spec.name: spec.init for spec in parameters(self.config)}
        # llm.c draws the tensors that belong to no layer first, then layer by layer.
        order = sorted(pieces(self.config), key=lambda p: -1 if p.layer is None else p.layer)
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
    """A parameter arena (n,) float32 with initial weights; padding rows of wte are zero."""
    return load_arena(InitialWeights(config=config, seed=seed))
