"""One batch of tokens, as a model's forward and backward passes read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B sequences of T tokens on the host, with the token to predict at each position."""

    tokens: Int32  # (B, T), each in [0, V)
    targets: Int32  # (B, T), the token after each
    order: Int32  # (B * T,), the stable argsort of the flattened tokens: see Ops.embedding_bwd

    @classmethod
    def of(cls, tokens: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Batch:
        """Returns the batch of tokens and targets (B, T), of any integer dtype."""
        # NumPy's stable sort of 16-bit integers is a radix sort: it costs next to nothing.
        order = np.argsort(tokens, axis=None, kind="stable")
        return cls(
            np.ascontiguousarray(tokens, np.int32),
            np.ascontiguousarray(targets, np.int32),
            order.astype(np.int32),
        )
