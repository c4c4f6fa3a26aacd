"""Generates text with a model, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.models.model import Model


def generate(
    model: Model,
    prompt: npt.NDArray[np.int32],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> Iterator[int]:
    """Yields `max_tokens` tokens that continue prompt (n,) int32, n >= 1.

    Each is drawn from the `top_k` likeliest (0 = from all) with logits divided by `temperature`
    (0 = always the likeliest). The model sees as much of the end of the text as it was made for.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature must be a finite number >= 0, not {temperature}")
    if min(top_k, max_tokens, seed) < 0:
        raise ConfigError("top_k, max_tokens and seed must not be negative")
    rng = np.random.default_rng(seed)
    context = prompt[-model.max_seq_len :]
    for _ in range(max_tokens):
        logits = model.forward(context[None])
        last = model.ops.device.download(logits)[-1, : model.config.vocab_size]
        token = _draw(last.astype(np.float64), temperature, top_k, rng)
        yield token
        context = np.append(context, np.int32(token))[-model.max_seq_len :]


def _draw(
    logits: npt.NDArray[np.float64], temperature: float, top_k: int, rng: np.random.Generator
) -> int:
    if not np.isfinite(logits).all():
        raise CheckpointError("the model's weights are damaged: its logits are not finite numbers")
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < logits.size:
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    p = np.exp((logits - logits.max()) / temperature)
    return int(rng.choice(p.size, p=p / p.sum()))
