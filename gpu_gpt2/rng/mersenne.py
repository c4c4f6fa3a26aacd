"""llm.c's random numbers: the Mersenne Twister, seeded as torch.manual_seed does.

Source: M. Matsumoto and T. Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998); normal numbers by
G. Box and M. Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Stat. 29
(1958).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.rng.libm import FloatArray, logf, sinf_cosf

WORDS: Final = 624  # uint32 words of a generator's state
GROUP: Final = 16  # normal numbers are made in groups of 8 cosines and then their 8 sines
CHUNK: Final = 1 << 13  # normal numbers made at once, so that temporaries stay in the cache


class MersenneTwister:
    """A generator of 32-bit draws; a seed gives the same draws as in llm.c and PyTorch on a CPU."""

    def __init__(self, seed: int) -> None:
        """seed: 0 to 2**32 - 1."""
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed)

    def draw(self, n: int) -> npt.NDArray[np.uint32]:
        """The next draws (n,) uint32."""
        raw: npt.NDArray[np.uint64] = self._bits.random_raw(n)
        return raw.astype(np.uint32)

    def uniform(self, n: int) -> FloatArray:
        """Uniform numbers (n,) float32 in [0, 1), each from the low 24 bits of a draw."""
        uniform = (self.draw(n) & 0xFFFFFF).astype(np.float32)
        uniform *= 2.0**-24
        return uniform

    def fill_normal(self, out: FloatArray, std: float) -> None:
        """Fills out (n,) float32, contiguous, with normal numbers of mean 0, as llm.c does.

        Takes n draws, and GROUP more if n is above GROUP but not a multiple of it. If n is below
        GROUP, takes 4 draws for every two numbers.
        """
        n = out.size
        if n < GROUP:
            out[:] = self._few_normals(n, std)
            return
        for start in range(0, n, CHUNK):
            uniform = self.uniform(min(CHUNK, n - start))
            whole = uniform.size // GROUP * GROUP
            out[start : start + whole] = _normal_groups(uniform[:whole], std)
        if n % GROUP:  # llm.c draws the last GROUP numbers again, which overlap the group before
            out[-GROUP:] = _normal_groups(self.uniform(GROUP), std)

    def _few_normals(self, n: int, std: float) -> FloatArray:
        """Normal numbers (n,) float32, n < GROUP: each pair from two uniform numbers of 53 bits."""
        words = self.draw(4 * math.ceil(n / 2)).astype(np.uint64).reshape(-1, 2, 2)
        bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64((1 << 53) - 1)
        uniform = (bits * 2.0**-53).astype(np.float32)
        cosines, sines = _box_muller(1 - uniform[:, 1], uniform[:, 0], std)
        return np.stack((cosines, sines), axis=1).reshape(-1)[:n]

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """The numbers 0 to n - 1 in random order, (n,); takes n - 1 draws."""
        order = np.arange(n)
        self.shuffle(order)
        return order

    def shuffle(self, order: npt.NDArray[np.int64]) -> None:
        """Shuffles order (n,) in place, from its last element down; takes n - 1 draws."""
        # A list is used because single elements of an array are slow.
        values = order.tolist()
        draws = self.draw(max(0, len(values) - 1)).tolist()
        for i, draw in zip(range(len(values) - 1, 0, -1), draws, strict=True):
            j = draw % (i + 1)
            values[i], values[j] = values[j], values[i]
        order[:] = values

    def state(self) -> tuple[npt.NDArray[np.uint32], int]:
        """The generator's words (WORDS,) uint32 and the number of them that have been drawn."""
        state: Any = self._bits.state
        return state["state"]["key"].astype(np.uint32), int(state["state"]["pos"])

    def restore(self, words: npt.NDArray[np.uint32], drawn: int) -> None:
        """Continues from a `state()`."""
        self._bits.state = {
            "bit_generator": "MT19937",
            "state": {"key": words, "pos": drawn},
        }


def _normal_groups(uniform: FloatArray, std: float) -> FloatArray:
    """Normal numbers (n,) from uniform numbers (n,), n a multiple of GROUP."""
    groups = uniform.reshape(-1, 2, GROUP // 2)
    cosines, sines = _box_muller(1 - groups[:, 0], groups[:, 1], std)
    return np.stack((cosines, sines), axis=1).reshape(-1)


def _box_muller(u: FloatArray, v: FloatArray, std: float) -> tuple[FloatArray, FloatArray]:
    """Two normal numbers from each pair of uniform u and v in [0, 1], all float32.

    Every step rounds to float32 where llm.c rounds.
    """
    radius = np.sqrt(-2 * logf(u + np.float32(1e-12)))
    sine, cosine = sinf_cosf((2 * math.pi * v.astype(np.float64)).astype(np.float32))
    factor = np.float32(std)
    # llm.c adds the mean even if it is 0, which turns -0 into 0.
    return radius * cosine * factor + 0, radius * sine * factor + 0
