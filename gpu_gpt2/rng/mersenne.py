"""llm.c's random numbers: the Mersenne Twister as torch.manual_seed starts it.

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

WORDS: Final = 624  # of a generator's state
GROUP: Final = 16  # normal numbers are made in groups: 8 cosines, then their 8 sines
CHUNK: Final = 1 << 13  # numbers at a time, so that what is in between stays in the cache


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

    def uniform(self, n: int) -> FloatArray:
        """Numbers (n,) float32 in [0, 1), the low 24 bits of a draw each."""
        uniform = (self.draw(n) & 0xFFFFFF).astype(np.float32)
        uniform *= 2.0**-24
        return uniform

    def fill_normal(self, out: FloatArray, std: float) -> None:
        """Fills out (n,) float32, contiguous, with normal numbers of mean 0, as llm.c does.

        Takes n draws, and 16 more if n is above 16 but not a multiple of it; 4 for every two
        numbers if n is below 16.
        """
        n = out.size
        if n < GROUP:
            out[:] = self._few_normals(n, std)
            return
        for start in range(0, n, CHUNK):
            uniform = self.uniform(min(CHUNK, n - start))
            whole = uniform.size // GROUP * GROUP
            out[start : start + whole] = _normal_groups(uniform[:whole], std)
        if n % GROUP:  # the last group is drawn once more, and reaches back into the one before
            out[-GROUP:] = _normal_groups(self.uniform(GROUP), std)

    def _few_normals(self, n: int, std: float) -> FloatArray:
        words = self.draw(4 * math.ceil(n / 2)).astype(np.uint64).reshape(-1, 2, 2)
        bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64((1 << 53) - 1)
        uniform = (bits * 2.0**-53).astype(np.float32)
        cosines, sines = _box_muller(1 - uniform[:, 1], uniform[:, 0], std)
        return np.stack((cosines, sines), axis=1).reshape(-1)[:n]

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


def _normal_groups(uniform: FloatArray, std: float) -> FloatArray:
    """Normal numbers (n,) from uniform ones (n,), n a multiple of 16."""
    groups = uniform.reshape(-1, 2, GROUP // 2)
    cosines, sines = _box_muller(1 - groups[:, 0], groups[:, 1], std)
    return np.stack((cosines, sines), axis=1).reshape(-1)


def _box_muller(u: FloatArray, v: FloatArray, std: float) -> tuple[FloatArray, FloatArray]:
    """Two normal numbers from each uniform u in [0, 1] and v in [0, 1], all float32.

    Every step rounds to float32 where llm.c's does.
    """
    radius = np.sqrt(-2 * logf(u + np.float32(1e-12)))
    sine, cosine = sinf_cosf((2 * math.pi * v.astype(np.float64)).astype(np.float32))
    factor = np.float32(std)
    # llm.c adds the mean, and 0 is one that counts: it turns -0 into 0.
    return radius * cosine * factor + 0, radius * sine * factor + 0
