"""Evaluates a model: mean loss on text, and accuracy on multiple-choice questions (HellaSwag).

A completion's score is the mean loss of its tokens, given the context; the lowest wins, the first
of equals. This is llm.c's rule, and the accuracy is what lm-evaluation-harness calls acc_norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpu_gpt2.data.loader import sequential_batches
from gpu_gpt2.errors import CheckpointError, ConfigError, DataError
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example
from gpu_gpt2.formats.tokens import Tokens
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.gpt2 import GPT2


def validation_loss(model: GPT2, tokens: Tokens, B: int, T: int) -> float:
    """Mean cross-entropy in nats over tokens (count,): all but the first are predicted."""
    return mean_loss(model, sequential_batches(tokens, B, T))


def mean_loss(model: GPT2, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy in nats of all targets of the batches, which may differ in size."""
    total, count = 0.0, 0
    for batch in batches:
        losses = model.losses(batch)
        total += float(losses.sum(dtype="float64"))
        count += losses.size
    return total / count


def check_examples(
    examples: Sequence[Example], vocab_size: int, B: int, T: int, where: str
) -> None:
    """UserError unless a model of `vocab_size` tokens can score them in batches (B, T).

    `where` is the file the examples are from.
    """
    if B < COMPLETIONS:
        raise ConfigError(
            f"batch size {B} is too small for {where}: an example takes {COMPLETIONS} rows; use "
            f"--batch-size {COMPLETIONS} or more"
        )
    for index, example in enumerate(examples):
        if (length := row_length(example)) > T:
            raise DataError(
                f"{where}: example {index} takes {length} positions, more than the {T} of a row; "
                f"use --seq-len {length} or more, if the model's context allows"
            )
        largest = max(int(row.max()) for row in (example.context, *example.completions))
        if largest >= vocab_size:
            raise DataError(
                f"{where}: example {index} has token {largest}, outside the vocabulary of "
                f"{vocab_size}; it was made with another tokenizer"
            )


def row_length(example: Example) -> int:
    """Positions that the context and the longest completion take; the last token takes none."""
    return len(example.context) + max(map(len, example.completions)) - 1


def answers(model: GPT2, examples: Sequence[Example]) -> Iterator[bool]:
    """Yields, example by example, whether the model finds the right completion likeliest.

    The examples have passed check_examples for the model's batch. CheckpointError where a loss is
    not a finite number.
    """
    for example, losses in zip(examples, completion_losses(model, examples), strict=True):
        if not np.isfinite(losses).all():
            raise CheckpointError("a loss is not a finite number: the model's weights are damaged")
        yield int(losses.argmin()) == example.label


def completion_losses(
    model: GPT2, examples: Sequence[Example]
) -> Iterator[npt.NDArray[np.float64]]:
    """Mean loss in nats per token of every completion, (COMPLETIONS,), example by example.

    As many examples at a time as the model has rows for.
    """
    fitting = model.max_batch // COMPLETIONS
    for first in range(0, len(examples), fitting):
        batch = examples[first : first + fitting]
        # Causal: what stands behind a row's end changes nothing before it.
        shape = (len(batch) * COMPLETIONS, max(map(row_length, batch)))
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        counted = np.zeros(shape, np.bool_)
        rows = ((example.context, end) for example in batch for end in example.completions)
        for i, (context, completion) in enumerate(rows):
            row = np.concatenate([context, completion])
            n = len(row) - 1
            tokens[i, :n], targets[i, :n] = row[:-1], row[1:]
            counted[i, len(context) - 1 : n] = True
        losses = model.losses(Batch.of(tokens, targets)).reshape(shape)
        yield from losses.mean(axis=1, dtype="float64", where=counted).reshape(-1, COMPLETIONS)
