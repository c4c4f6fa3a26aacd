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
    if max_tokens <= 0:
        return
    draw = _on_device if isinstance(sampling, Sampling) else _on_host
    texts = [np.asarray(prompt, np.int32) for prompt in prompts]
    ended = [False] * len(texts)
    decoder.prefill(texts)
    for tokens in draw(decoder, sampling, max_tokens, lambda: _tails(texts, decoder.length // 2)):
        if (tokens < 0).any():
            raise CheckpointError(
                "the model's weights are damaged: its logits are not finite numbers"
            )
        texts = [np.append(text, token) for text, token in zip(texts, tokens, strict=True)]
        yield [None if end else int(t) for end, t in zip(ended, tokens, strict=True)]
        ended = [end or int(t) in stop for end, t in zip(ended, tokens, strict=True)]
        if all(ended):
            return
