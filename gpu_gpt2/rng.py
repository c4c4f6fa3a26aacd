"""llm.c's random numbers: the Mersenne Twister as torch.manual_seed starts it.

Source: M. Matsumoto and T. Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class MersenneTwister:
    """Draws of 32 bits; the same seed gives the same draws as llm.c and PyTorch on a CPU."""

    def __init__(self, seed: int) -> None:
        """seed: 0 to 2**32 - 1."""
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed)

    def draw(self, n: int) -> npt.NDArray[np.uint32]:
        """The next draws (n,) uint32."""
        raw: npt.NDArray[np.uint64] = self._bits.random_raw(n)
        return raw.astype(np.uint32)

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """0 to n - 1 in random order, (n,): takes n - 1 draws."""
        order = np.arange(n)
        self.shuffle(order)
        return order

    def shuffle(self, order: npt.NDArray[np.int64]) -> None:
        """Puts order (n,) in random order, from its last element down: takes n - 1 draws."""
        # On a list, because single elements of an array are slow.
        values = order.tolist()
        draws = self.draw(max(0, len(values) - 1)).tolist()
        for i, draw in zip(range(len(values) - 1, 0, -1), draws, strict=True):
            j = draw % (i + 1)
            values[i], values[j] = values[j], values[i]
        order[:] = values

    def state(self) -> tuple[npt.NDArray[np.uint32], int]:
        """The generator's words (624,) uint32 and how many of them are drawn."""
        state: Any = self._bits.state
        return state["state"]["key"].astype(np.uint32), int(state["state"]["pos"])

    def restore(self, words: npt.NDArray[np.uint32], drawn: int) -> None:
        """Goes on from a `state()`."""
        self._bits.state = {
            "bit_generator": "MT19937",
            "state": {"key": words, "pos": drawn},
        }
