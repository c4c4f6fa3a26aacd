"""Evaluates a model: mean loss on text, and accuracy on multiple-choice questions (HellaSwag).

A completion's score is the mean loss of its tokens, given the context; the lowest wins, the first
of equals. This is llm.c's rule, and the accuracy is what lm-evaluation-harness calls acc_norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.data.loader import sequential_batches
from gpu_gpt2.device.base import Array
from gpu_gpt2.errors import CheckpointError, ConfigError, DataError
from gpu_gpt2.formats.multiple_choice import COMPLETIONS, Example
from gpu_gpt2.formats.tokens import Tokens
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.model import Model

# Batches whose losses add up on the device before the host waits for the sums. A GPU loses no time
# on one wait in 16 batches; with more, Ctrl-C would wait longer and the progress would run ahead.
BATCHES_PER_SUM: Final = 16


def validation_loss(
    model: Model,
    tokens: Tokens,
    B: int,
    T: int,
    *,
    advance: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> float | None:
    """Returns the `mean_loss` in nats over tokens (count,): all but the first are predicted."""
    return mean_loss(model, sequential_batches(tokens, B, T), advance=advance, stop=stop)


def mean_loss(
    model: Model,
    batches: Iterable[Batch],
    *,
    advance: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> float | None:
    """Returns the mean cross-entropy in nats of all targets of the batches, of any shapes.

    After each batch `advance` is called with the number of targets so far. Before each batch `stop`
    is asked; once it returns True, the result is None.

    The losses of up to k = BATCHES_PER_SUM batches of one shape add up on the device in float32,
    position by position; the host adds these sums in float64. Losses are not negative, so the k - 1
    additions at a position change the mean by less than (k - 1) 2^-24 of it, which is 9e-7.
    """
    total, count = 0.0, 0
    for _, same_shape in itertools.groupby(batches, key=lambda batch: batch.tokens.shape):
        sums: Array = None
        for i, batch in enumerate(same_shape):
            if stop is not None and stop():
                return None
            sums = model.add_losses(batch, first=i % BATCHES_PER_SUM == 0)
            if i % BATCHES_PER_SUM == BATCHES_PER_SUM - 1:
                total += _sum(model, sums)
                sums = None
            count += batch.targets.size
            if advance is not None:
                advance(count)
        if sums is not None:
            total += _sum(model, sums)
    return total / count


def _sum(model: Model, losses: Array) -> float:
    """Returns the sum of losses (N,) on the device; waits until they are there."""
    return float(model.ops.device.download_view(losses).sum(dtype=np.float64))


def check_examples(
    examples: Sequence[Example], vocab_size: int, B: int, T: int, where: str
) -> None:
    """Raises ConfigError or DataError unless batches (B, T) can hold the examples of file `where`.

    DataError also if a token is not below `vocab_size`.
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
    """Returns the positions that the context and the longest completion take.

    The last token takes none, because nothing follows it.
    """
    return len(example.context) + max(map(len, example.completions)) - 1


def hellaswag_accuracy(
    model: Model,
    examples: Sequence[Example],
    *,
    advance: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[int, int] | None:
    """Returns the number of examples that the model answers right, and the number of examples.

    The examples have passed check_examples for the model's (max_batch, max_seq_len). After each
    example `advance` is called with the number of examples so far. Before each example `stop` is
    asked; once it returns True, the result is None. Raises CheckpointError as `answers` does.
    """
    correct = 0
    found = answers(model, examples)
    for done in range(1, len(examples) + 1):
        if stop is not None and stop():
            return None
        correct += next(found)
        if advance is not None:
            advance(done)
    return correct, len(examples)


def answers(model: Model, examples: Sequence[Example]) -> Iterator[bool]:
    """Yields, for each example, True if the model finds the right completion likeliest.

    The examples have passed check_examples for the model's (max_batch, max_seq_len). Raises
    CheckpointError if a loss is not a finite number.
    """
    for example, losses in zip(examples, completion_losses(model, examples), strict=True):
        if not np.isfinite(losses).all():
            raise CheckpointError("a loss is not a finite number: the model's weights are damaged")
        yield int(losses.argmin()) == example.label


def completion_losses(
    model: Model, examples: Sequence[Example]
) -> Iterator[npt.NDArray[np.float64]]:
    """Yields, for each example, the mean loss in nats per token of each completion.

    Each item is (COMPLETIONS,). A batch holds as many examples as the model has rows for.
    """
    fitting = model.max_batch // COMPLETIONS
    for first in range(0, len(examples), fitting):
        batch = examples[first : first + fitting]
        # Attention is causal, so the padding of a row changes nothing before it.
        T = model.padded_length(max(map(row_length, batch)))
        shape = (len(batch) * COMPLETIONS, T)
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
