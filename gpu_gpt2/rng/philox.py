"""Philox4x32-10, a random number generator without state: a counter and a key give four numbers.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". kernels/philox.cuh is the
same in CUDA C.
"""

from __future__ import annotations

from typing import Final, TypeAlias

Words: TypeAlias = tuple[int, int, int, int]  # of 32 bits each

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, times 2^32
MASK: Final = 0xFFFFFFFF


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Returns the four words of `counter` under `key`; all are words of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3
