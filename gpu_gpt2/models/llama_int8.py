"""A Llama whose matrices are int8, for inference: llama2.c's runq.

A matmul rounds its input to int8 in groups of the same size as the weights, and multiplies integers
(see Ops.matmul_int8). The embedding of a token is a row of wte in X; all other ops are Llama's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import LlamaConfig
from gpu_gpt2.device.base import FLOAT32, INT8, Array
from gpu_gpt2.models.arena import TensorSpec
from gpu_gpt2.models.llama import Llama
from gpu_gpt2.models.weights import FloatArray, Piece, WeightSource, pieces
from gpu_gpt2.ops.table import Ops


@runtime_checkable
class Int8Source(WeightSource, Protocol):
    """A model file whose matrices are int8."""

    @property
    def group_size(self) -> int:
        """The elements that share a scale; 0 if the file holds floats."""
        ...

    @property
    def has_int8_rows(self) -> bool:
        """True if the file holds int8 whose groups lie within rows, as int8 matmuls need."""
        ...

    def read_piece(self, piece: Piece) -> FloatArray:
        """Returns one piece as float32."""
        ...

    def read_int8(
        self,
    ) -> Iterator[tuple[Piece, npt.NDArray[np.int8], npt.NDArray[np.float32]]]:
        """Yields every matrix once: (piece, q (O, I) int8, scales (O, I / group_size) float32)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix:
    """A matrix (O, I) = q * scales, on the device."""

    q: Array  # (O, I) int8
    scales: Array  # (O, J) float32


class LlamaInt8(Llama):
    """A Llama for inference with the int8 matrices of `source`, which is read here.

    For the other arguments see Model.
    """

    def __init__(
        self,
        source: Int8Source,
        ops: Ops,
        *,
        max_batch: int,
        max_seq_len: int,
        with_logits: bool = True,
    ) -> None:
        config = source.config
        assert isinstance(config, LlamaConfig)
        super().__init__(
            config,
            ops,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            training=False,
            with_logits=with_logits,
        )
        self._group_size = source.group_size
        widest = max_batch * max_seq_len * max(config.n_embd, config.n_inner)
        self._q = ops.device.empty((widest,), INT8)  # the rounded input of a matmul
        self._scales = ops.device.empty((widest // self._group_size,), FLOAT32)
        self._head_int8 = self._read(source)

    @staticmethod
    def parameters(c: LlamaConfig) -> tuple[TensorSpec, ...]:
        """Returns the tensors in X: wte, from which tokens are looked up, and the norms."""
        return tuple(
            spec for spec in Llama.parameters(c) if spec.name == "wte" or spec.init == "ones"
        )

    def classify(self, logits: Array, lnf: Array) -> None:
        self._linear(logits, lnf, self._head_int8)

    def _linear(self, y: Array, x: Array, w: Any) -> None:
        (N, I), J = x.shape, x.shape[1] // self._group_size
        q = self._q[: N * I].reshape(N, I)
        scales = self._scales[: N * J].reshape(N, J)
        self.ops.quantize_rows(q, scales, x)
        self.ops.matmul_int8(y, q, scales, w.q, w.scales)

    def _read(self, source: Int8Source) -> Int8Matrix:
        """Reads all weights, and returns the head."""
        own = {spec.name for spec in self.parameters(self.config)}
        for piece in pieces(self.config):
            if piece.name in own:
                values = source.read_piece(piece)
                tensor = getattr(self.params, piece.name)
                part = tensor if piece.layer is None else tensor[piece.layer]
                self._upload(part[: len(values)], values.astype(self.x_dtype))
        matrices = {}
        for piece, q, scales in source.read_int8():
            rows = len(q)
            if piece.layer is None:  # wte or the head, whose logits have padding columns
                rows = self.config.padded_vocab_size
            matrix = Int8Matrix(
                self.ops.device.zeros((rows, q.shape[1]), INT8),
                self.ops.device.zeros((rows, scales.shape[1]), FLOAT32),
            )
            self._upload(matrix.q[: len(q)], q)
            self._upload(matrix.scales[: len(q)], scales)
            if piece.layer is None:
                matrices[piece.name] = matrix
            else:
                setattr(self._layer_params[piece.layer], piece.name, matrix)
        return matrices["wte" if self.config.tie_word_embeddings else "head"]

    def _upload(self, to: Array, values: npt.NDArray[Any]) -> None:
        self.ops.device.upload(to, np.ascontiguousarray(values))
