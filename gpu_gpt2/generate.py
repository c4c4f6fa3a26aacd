"""Generates text with a model: a batch of prompts is continued token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.models.decoder import Decoder, Sampling

Int32 = npt.NDArray[np.int32]


class HostSampler(Protocol):
    """Chooses the tokens of one sequence on the host, as another program does."""

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Returns the next token, given logits (V,) float32."""
        ...


def generate(
    decoder: Decoder,
    prompts: Sequence[Int32],
    *,
    max_tokens: int,
    sampling: Sampling | Sequence[HostSampler],
    stop: frozenset[int] = frozenset(),
) -> Iterator[list[int | None]]:
    """Yields the next token of each sequence, up to `max_tokens` times.

    `prompts` are token ids (n,) int32, 1 <= n <= decoder.length, one for each sequence of the
    decoder. A token of `stop` is the last of its sequence: later items have None there, and the
    last item is the one in which all sequences have ended. `sampling` draws on the device, or on
    the host with one sampler for each sequence.

    When the longest sequence has filled the cache, the window slides: the decoder reads the last
    half of the cache's length of each sequence again, and continues from there.

    Raises ConfigError for an impossible prompt, and CheckpointError if the logits are not numbers.
    """
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= decoder.length:
            raise ConfigError(
                f"prompt {i} has {len(prompt)} tokens, expected 1 to {decoder.length}, the context"
            )
    if max_tokens < 0:
        raise ConfigError(f"max_tokens must be 0 or more, not {max_tokens}")
    if max_tokens == 0:
        return
    texts = [np.asarray(prompt, np.int32).tolist() for prompt in prompts]
    ended = [False] * len(texts)
    decoder.prefill(prompts)
    if isinstance(sampling, Sampling):
        steps = _on_device(decoder, sampling, texts, max_tokens)
    else:
        steps = _on_host(decoder, sampling, texts, max_tokens)
    for tokens in steps:
        if min(tokens) < 0:
            raise CheckpointError(
                "the model's weights are damaged: its logits are not finite numbers"
            )
        for i, token in enumerate(tokens):
            texts[i].append(token)
        yield [None if end else token for end, token in zip(ended, tokens, strict=True)]
        ended = [end or token in stop for end, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return


def _on_device(
    decoder: Decoder, sampling: Sampling, texts: list[list[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Yields tokens that the device draws; the caller appends them to `texts`."""
    is_async = decoder.model.ops.device.is_async
    decoder.sample(sampling)
    for left in reversed(range(max_tokens)):
        drawn = decoder.read_tokens()
        # On a GPU the next step is enqueued first, so that it runs while Python handles this token.
        ahead = is_async and left > 0 and not decoder.full
        if ahead:
            decoder.step(sampling)
        yield drawn.result()[:, 0].tolist()
        if left == 0 or ahead:
            continue
        if decoder.full:
            _slide(decoder, texts)
            decoder.sample(sampling)
        else:
            decoder.step(sampling)


def _on_host(
    decoder: Decoder,
    samplers: Sequence[HostSampler],
    texts: list[list[int]],
    max_tokens: int,
) -> Iterator[list[int]]:
    """Yields tokens that the samplers choose; the caller appends them to `texts`."""
    for left in reversed(range(max_tokens)):
        logits = decoder.read_logits()
        if not np.isfinite(logits.max()):  # also if one of them is a NaN
            yield [-1] * len(texts)
        tokens = [sampler.choose(row) for sampler, row in zip(samplers, logits, strict=True)]
        yield tokens
        if left == 0:
            return
        decoder.feed(np.array(tokens, np.int32))
        if decoder.full:
            _slide(decoder, texts)
        else:
            decoder.decode()


def _slide(decoder: Decoder, texts: Sequence[list[int]]) -> None:
    """Reads the last half of the cache's length of each text again, from position 0."""
    kept = max(1, decoder.length // 2)
    tails = [np.array(text[-kept:], np.int32) for text in texts]
    decoder.prefill(tails, window=decoder.window + 1)
