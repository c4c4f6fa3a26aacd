"""Generates tokens of a batch of sequences one position at a time, with a KV cache."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import INT32, AsyncRead
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.kv_cache import KVCache
from gpu_gpt2.models.model import Model

Int32 = npt.NDArray[np.int32]

MAX_SEED: Final = 2**64 - 1  # the key of the random numbers has 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of the draw of a token on the device: see Ops.sample. Raises ConfigError."""

    temperature: float = 0.8  # divisor of the logits; 0 takes the likeliest token
    top_k: int = 40  # draw among this many of the likeliest; 0 means all
    top_p: float = 1.0  # draw among the likeliest that have this share of the probability; 1: all
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a finite number >= 0, not {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (all tokens), not {self.top_p}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")


class Decoder:
    """Reads prompts, and then computes one new token of each sequence at a time.

    `batch` sequences of up to `length` tokens have their keys and values in a KVCache. Everything
    that a step reads lies in device memory: `tokens` (B, 1) int32, the newest token of each
    sequence, and `starts` (B,) int32, its position. So a step is one CUDA graph at all positions.
    `logits` (B, Vp) X are those of the newest tokens.
    """

    def __init__(self, model: Model, *, batch: int, length: int) -> None:
        if length > model.max_seq_len:
            raise ConfigError(
                f"a KV cache of {length} tokens is longer than the {model.max_seq_len} that the "
                f"model was made for"
            )
        self.model, self.batch, self.length = model, batch, length
        config, device = model.config, model.ops.device
        self._cache = KVCache(config, device, model.x_dtype, batch=batch, length=length)
        self.tokens = device.zeros((batch, 1), INT32)
        self.starts = device.zeros((batch,), INT32)
        self.logits = device.zeros((batch, config.padded_vocab_size), model.x_dtype)
        self._rows = device.zeros((batch, 1), INT32)  # last row of each prompt in a prefill
        self._key = device.zeros((2,), INT32)  # key of the random numbers
        self._key_on_device = (0, 0)
        self.window = 0  # how often the window has moved: see `prefill`
        self._positions = np.zeros(batch, np.int32)  # `starts` after all that is enqueued
        self._graphs: dict[tuple[object, ...], Callable[[], None]] = {}
        self._step_views = model.views_of(batch, 1)
        self._step_views.tokens, self._step_views.starts = self.tokens, self.starts
        self._step_views.cache, self._step_views.decoding = self._cache, True

    @property
    def full(self) -> bool:
        """True if the cache has no place for the newest token of the longest sequence."""
        return int(self._positions.max()) >= self.length

    def prefill(self, prompts: Sequence[Int32], *, window: int = 0) -> None:
        """Reads one prompt (n,) int32 for each sequence, 1 <= n <= length, in one forward pass.

        Everything that was read before is forgotten. Shorter prompts are padded on the right, which
        changes nothing because attention is causal. A random number of `sample` follows from the
        seed, the sequence, the position and `window`: a window that is moved to a later part of the
        same text needs a number of its own, because its positions begin at 0 again.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        if len(prompts) != self.batch or not (1 <= lengths.min() and lengths.max() <= self.length):
            raise ValueError(
                f"prefill of prompts of {lengths.tolist()} tokens, expected {self.batch} prompts "
                f"of 1 to {self.length}"
            )
        model, device = self.model, self.model.ops.device
        T = model.padded_length(int(lengths.max()))
        tokens = np.zeros((self.batch, T), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        a = model.views_of(self.batch, T)
        a.cache, a.decoding = self._cache, False
        device.upload(a.tokens, tokens)
        device.upload(self._rows, (np.arange(self.batch) * T + lengths - 1)[:, None].astype("i4"))
        self._run(("prefill", T), lambda decoder: decoder._prefill(a))
        self._set_positions(lengths - 1)
        self.window = window

    def decode(self) -> None:
        """Computes `logits` from `tokens` at the positions `starts`, and extends the cache."""
        self._run(("decode",), lambda decoder: decoder._decode())

    def sample(self, sampling: Sampling) -> None:
        """Draws the next `tokens` from `logits` on the device, and advances `starts`."""
        self._set_key(sampling.seed)
        self._run(("sample", _constants(sampling)), lambda decoder: decoder._sample(sampling))
        self._positions = self._positions + np.int32(1)

    def step(self, sampling: Sampling) -> None:
        """`decode` and then `sample`, as one CUDA graph."""
        self._set_key(sampling.seed)

        def work(decoder: Decoder) -> None:
            decoder._decode()
            decoder._sample(sampling)

        self._run(("step", _constants(sampling)), work)
        self._positions = self._positions + np.int32(1)

    def feed(self, tokens: Int32) -> None:
        """Sets the next token of each sequence, (B,) int32, as `sample` does."""
        self.model.ops.device.upload(self.tokens, tokens[:, None])
        self._set_positions(self._positions + np.int32(1))

    def read_tokens(self) -> AsyncRead:
        """Starts a copy of `tokens` (B, 1) to the host."""
        return self.model.ops.device.read_async(self.tokens)

    def read_logits(self) -> npt.NDArray[np.float32]:
        """Returns `logits` (B, V) float32 on the host, without padding columns."""
        logits = self.model.ops.device.download(self.logits)
        return logits[:, : self.model.config.vocab_size].astype(np.float32)

    def _prefill(self, a: SimpleNamespace) -> None:
        model, ops = self.model, self.model.ops
        ops.device.fill_zero(a.starts)
        model.hidden(a)
        last = a.proj[: self.batch]  # scratch that is free after the last layer
        # The op that looks up embeddings picks the rows of the last tokens.
        ops.token_embedding_fwd(last.reshape(self.batch, 1, -1), self._rows, a.lnf)
        model.classify(self.logits, last)

    def _decode(self) -> None:
        model = self.model
        model.hidden(self._step_views)
        model.classify(self.logits, self._step_views.lnf)

    def _sample(self, sampling: Sampling) -> None:
        self.model.ops.sample(
            self.tokens.reshape(-1),
            self.starts,
            self.logits,
            self._key,
            self.model.config.vocab_size,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
        )

    def _set_key(self, seed: int) -> None:
        low, high = seed % 2**32, seed // 2**32
        key = (low, high ^ self.window)
        if key != self._key_on_device:
            self.model.ops.device.upload(self._key, np.array(key, np.uint32).view(np.int32))
            self._key_on_device = key

    def _set_positions(self, positions: Int32) -> None:
        self._positions = positions  # never changed in place: the copy may still read it
        self.model.ops.device.upload(self.starts, positions)

    def _run(self, key: tuple[object, ...], work: Callable[[Decoder], None]) -> None:
        """Runs `work` as a graph, which is made when `key` comes for the first time.

        `work` must use the decoder that it is given: the decoder holds the graph, so a graph that
        held the decoder would keep it from being freed.
        """
        if key not in self._graphs:
            decoder = weakref.proxy(self)
            self._graphs[key] = self.model.ops.device.graph(lambda: work(decoder))
        self._graphs[key]()


def _constants(sampling: Sampling) -> tuple[object, ...]:
    """The part of the settings that a graph holds; the seed lies in device memory."""
    return sampling.temperature, sampling.top_k, sampling.top_p
