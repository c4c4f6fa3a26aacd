"""The random numbers with which llm.c and llama2.c sample tokens: xorshift64*.

Source: S. Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", ACM
TOMS 42 (2016).
"""

from __future__ import annotations

from typing import Final

import numpy as np

MULTIPLIER: Final = 0x2545F4914F6CDD1D  # M32 of the paper, as in both programs
MASK: Final = (1 << 64) - 1  # keeps the lower 64 bits, as uint64 does in C


class Xorshift64Star:
    """A generator whose 64-bit state starts as the seed; a seed of 0 would give only zeros."""

    def __init__(self, seed: int) -> None:
        """seed: 1 to 2**64 - 1."""
        self.state = seed

    def draw(self) -> int:
        """Returns the next draw, 0 to 2**32 - 1."""
        s = self.state
        s ^= s >> 12
        s ^= s << 25 & MASK
        s ^= s >> 27
        self.state = s
        return (s * MULTIPLIER & MASK) >> 32

    def uniform(self) -> np.float32:
        """Returns a uniform number in [0, 1) from the high 24 bits of the next draw."""
        uniform: np.float32 = np.float32((self.draw() >> 8) / (1 << 24))
        return uniform
