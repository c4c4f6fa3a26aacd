"""Loss on text the model was not trained on."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_gpt2.data.loader import Batch, sequential_batches
from gpu_gpt2.formats.tokens import Tokens
from gpu_gpt2.model import GPT2


def validation_loss(model: GPT2, tokens: Tokens, B: int, T: int) -> float:
    """Mean cross-entropy in nats over tokens (count,): all but the first are predicted."""
    return mean_loss(model, sequential_batches(tokens, B, T))


def mean_loss(model: GPT2, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy in nats of all targets of the batches, which may differ in size."""
    total, count = 0.0, 0
    for batch in batches:
        losses = model.losses(batch.tokens, batch.targets)
        total += float(losses.sum(dtype="float64"))
        count += losses.size
    return total / count
