"""Samplers of llm.c and llama2.c: they choose the token that these programs choose.

All arithmetic is float32 in the order of the C programs, except where they use double. NumPy's
exponential may differ from the C library's `expf` in the last bit, so a coin within a rounding
error of the border between two tokens may choose the other one.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gpu_gpt2.rng.xorshift import Xorshift64Star

FloatArray: TypeAlias = npt.NDArray[np.float32]


class LlmcSampler:
    """llm.c's sampler of one sequence: draws from the softmax, without temperature or top-k."""

    def __init__(self, seed: int) -> None:
        """seed: 1 to 2**64 - 1; llm.c uses 1337 for every sample."""
        self._rng = Xorshift64Star(seed)

    def choose(self, logits: FloatArray) -> int:
        """Returns the token that is drawn from logits (V,).

        llm.c does not subtract the largest logit, so logits above 88 overflow as they do there.
        """
        coin = self._rng.uniform()
        with np.errstate(over="ignore"):
            unnormalized = np.exp(logits)
            cdf = np.cumsum(unnormalized)
            norm = np.cumsum(unnormalized, dtype=np.float64)[-1]
            scaled = np.float32(np.float64(coin) * norm)
        return _first_above(cdf, scaled)


class Llama2cSampler:
    """llama2.c's sampler of one sequence: temperature, then the nucleus of top-p."""

    def __init__(self, *, temperature: float, top_p: float, seed: int) -> None:
        """temperature >= 0: 0 takes the likeliest token and draws no random number.

        top_p: the probability mass of the nucleus; 0 or less, or 1 or more, turn the nucleus off.
        seed: 1 to 2**64 - 1.
        """
        with np.errstate(over="ignore"):  # it becomes infinite, and all tokens equally likely
            self._temperature = np.float32(temperature)
        self._top_p = np.float32(top_p)
        self._rng = Xorshift64Star(seed)

    def choose(self, logits: FloatArray) -> int:
        """Returns the token that is drawn from logits (V,).

        A temperature so low that logits overflow acts as 0. llama2.c then computes with NaNs.
        """
        if self._temperature == 0:
            return int(logits.argmax())
        coin = self._rng.uniform()
        with np.errstate(over="ignore"):
            scaled = logits / self._temperature
        if not np.isfinite(scaled).all():
            return int(logits.argmax())
        p = _softmax(scaled)
        if not 0 < self._top_p < 1:
            return _first_above(np.cumsum(p), coin)
        return self._from_nucleus(p, coin)

    def _from_nucleus(self, p: FloatArray, coin: np.float32) -> int:
        """Draws from the likeliest tokens whose probabilities p (V,) together exceed top-p."""
        # All tokens of a nucleus but its first have at least this probability. llama2.c sorts only
        # these. If top-p is below 1 / V, none may be left, where llama2.c reads outside its array.
        cutoff = (np.float32(1) - self._top_p) / np.float32(max(1, p.size - 1))
        kept = np.flatnonzero(p >= cutoff)
        if not kept.size:
            return int(p.argmax())
        ranked = kept[np.argsort(-p[kept], kind="stable")]
        cdf = np.cumsum(p[ranked])
        last = _first_above(cdf, self._top_p)
        return int(ranked[_first_above(cdf[: last + 1], coin * cdf[last])])


def _softmax(logits: FloatArray) -> FloatArray:
    """Returns the probabilities (V,) of logits (V,), summed from the first to the last."""
    unnormalized: FloatArray = np.exp(logits - logits.max())
    # np.sum adds in pairs; np.cumsum adds one after the other, as C does.
    p: FloatArray = unnormalized / np.cumsum(unnormalized)[-1]
    return p


def _first_above(cdf: FloatArray, value: np.float32) -> int:
    """Returns the first index at which the ascending cdf (n,) is > value, or n - 1 if none is."""
    return min(int(np.searchsorted(cdf, value, side="right")), cdf.size - 1)
