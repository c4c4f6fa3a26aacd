"""Loss on text the model was not trained on."""

from __future__ import annotations

from typing import Final

from gpu_gpt2.data.loader import sequential_batches
from gpu_gpt2.formats.tokens import Tokens
from gpu_gpt2.model import GPT2

MAX_TOKENS: Final = 1 << 20  # of a long validation file: enough for three digits of the loss


def validation_loss(model: GPT2, tokens: Tokens, B: int, T: int) -> float:
    """Mean cross-entropy in nats over the first MAX_TOKENS of tokens (count,) uint16."""
    total, count = 0.0, 0
    for batch in sequential_batches(tokens[:MAX_TOKENS], B, T):
        losses = model.losses(batch.tokens, batch.targets)
        total += float(losses.sum(dtype="float64"))
        count += losses.size
    return total / count
