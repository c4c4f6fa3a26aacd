"""Muon (Jordan et al. 2024) for the matrices of the layers, and AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.arena import TensorSpec, bytes_of, element_count, offsets, views
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.model import Model
from gpu_gpt2.training.optimizer import AdamW

MOMENTUM: Final = 0.95  # decay rate of the mean of the gradients, that of the authors and PyTorch
ITERATIONS: Final = 5  # of Newton-Schulz, as many as the authors and PyTorch use
# Root mean square of the update of a matrix, as a fraction of the learning rate. AdamW's is about
# as large, so that its --lr and --weight-decay suit Muon too (Liu et al. 2025, "Muon is scalable
# for LLM training", section 2.2; "match_rms_adamw" of torch.optim.Muon).
UPDATE_RMS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix (rows, columns) that begins at element `start` of the parameter arena."""

    start: int
    rows: int
    columns: int

    @property
    def part(self) -> slice:
        """The elements of the matrix in an arena."""
        return slice(self.start, self.start + self.rows * self.columns)

    @property
    def smaller(self) -> int:
        """The smaller of both sizes, that of the Gram matrix."""
        return min(self.rows, self.columns)


def matrices(config: ModelConfig) -> Iterator[Matrix]:
    """Yields the matrices of all layers, in the order in which they lie in the parameter arena.

    q, k and v, and the gate and the up projection of a Llama, are matrices of their own.
    """
    for spec, start in offsets(parameters(config)):
        if spec.matrices:
            layers, _, columns = spec.shape
            for rows in spec.matrices * layers:
                yield Matrix(start, rows, columns)
                start += rows * columns


class Muon(AdamW):
    """AdamW whose matrices of layers are updated by Muon: no second moment, and orthogonal steps.

    Muon replaces the mean of a matrix's gradients by a matrix with the same singular vectors, whose
    singular values are all close to 1. The matrices keep `m` only. The iteration is computed in the
    dtype of the model; float16 has the range for it (docs/numerics.md). The settings are AdamW's;
    `beta1` and `beta2` do not apply to the matrices.
    """

    def __init__(self, model: Model, **settings: Any) -> None:
        super().__init__(model, **settings)
        specs = self.scratch(model.config)
        memory = model.ops.device.empty((bytes_of(specs, model.x_dtype),), np.uint8)
        self._scratch = views(specs, model.x_dtype, memory)
        self._matrices = tuple(matrices(model.config))
        self._first, self._stop = self._matrices[0].start, self._matrices[-1].part.stop
        # The matrices are the last tensors with weight decay, without a gap between them.
        assert self._stop == self.decayed
        assert self._stop - self._first == self.m.size - self.v.size

    @staticmethod
    def second_moments(config: ModelConfig) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in parameters(config) if not spec.matrices)

    @staticmethod
    def scratch(config: ModelConfig) -> tuple[TensorSpec, ...]:
        """Returns the tensors of an update, which all matrices share."""
        largest = max(matrix.rows * matrix.columns for matrix in matrices(config))
        smaller = max(matrix.smaller for matrix in matrices(config)) ** 2
        return (
            TensorSpec("x", (largest,)),
            TensorSpec("next_x", (largest,)),
            TensorSpec("gram", (smaller,)),
            TensorSpec("square", (smaller,), "float32"),
            TensorSpec("p", (smaller,)),
        )

    def _update_weights(self) -> None:
        self._adamw(slice(0, self._first), self.v[: self._first], self._first)
        for matrix in self._matrices:
            self._update_matrix(matrix)
        self._adamw(slice(self._stop, self.m.size), self.v[self._first :], 0)

    def _update_matrix(self, matrix: Matrix) -> None:
        """Enqueues the update of one matrix: see kernels/muon.cu."""
        model, ops, part, s = self.model, self.model.ops, matrix.part, self._scratch
        shape, K = (matrix.rows, matrix.columns), matrix.smaller
        x, next_x = (a[: matrix.rows * matrix.columns].reshape(shape) for a in (s.x, s.next_x))
        gram, square, p = (a[: K * K].reshape(K, K) for a in (s.gram, s.square, s.p))
        m, grad = self.m[part].reshape(shape), model.grad_arena[part].reshape(shape)
        ops.muon_momentum(x, m, grad, self._factors, MOMENTUM)
        for _ in range(ITERATIONS):
            if matrix.rows > matrix.columns:
                ops.matmul(gram, x.T, x)
            else:
                ops.matmul(gram, x, x.T)
            ops.matmul(square, gram, gram)
            ops.muon_polynomial(p, gram, square)
            if matrix.rows > matrix.columns:
                ops.matmul(next_x, x, p)
            else:
                ops.matmul(next_x, p, x)
            x, next_x = next_x, x
        master = self.master[part]
        ops.muon_update(
            master,
            master if self.master is model.param_arena else model.param_arena[part],
            x.reshape(-1),
            self._factors,
            UPDATE_RMS * math.sqrt(max(shape)),
            self.settings.weight_decay,
        )


def muon_count(config: ModelConfig) -> int:
    """Returns the elements of the matrices that Muon updates."""
    return element_count(spec for spec in parameters(config) if spec.matrices)


# The optimizers by their names on the command line.
OPTIMIZERS: Final[dict[str, type[AdamW]]] = {"adamw": AdamW, "muon": Muon}
