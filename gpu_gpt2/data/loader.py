"""Batches from a row of tokens: shuffled without end for training, once in order for validation."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.tokens import Tokens

Int32 = npt.NDArray[np.int32]
CHECKED_TOKENS: Final = 1 << 20  # whose checksum tells one text from another


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one micro-step reads."""

    tokens: Int32  # (B, T)
    targets: Int32  # (B, T): the token after each
    order: Int32  # (B * T,): stable argsort of the flattened tokens, for the embedding's gradient


class BatchLoader:
    """Rows of T tokens in a new order every epoch; its whole state is (epoch, position).

    An epoch cuts the tokens into rows from an offset below T on, so that every epoch has other
    row ends, and takes each row once. Offset and order follow from (seed, epoch) alone. A batch
    that the epoch cannot fill goes on with the next one.
    """

    def __init__(self, tokens: Tokens, B: int, T: int, seed: int = 0) -> None:
        """tokens (count,) uint16; DataError if count is below T + 1."""
        if len(tokens) < T + 1:
            raise DataError(
                f"{len(tokens)} tokens of training text are too few: one row of {T} and the token "
                f"after it need {T + 1}; give more text or a smaller --seq-len"
            )
        self._tokens = tokens
        self._B, self._T = B, T
        self._seed = seed
        self._crc32 = zlib.crc32(tokens[:CHECKED_TOKENS].tobytes(), len(tokens))
        self._open(0)

    def next_batch(self) -> Batch:
        """The next B rows."""
        starts = np.empty(self._B, np.int64)
        filled = 0
        while filled < self._B:
            taken = self._starts[self._position : self._position + self._B - filled]
            starts[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._position += len(taken)
            if self._position == len(self._starts):
                self._open(self._epoch + 1)
        return _batch(self._tokens[starts[:, None] + np.arange(self._T + 1)])

    def state(self) -> dict[str, int]:
        """Where the next batch begins, and a checksum of the data it belongs to."""
        return {"epoch": self._epoch, "position": self._position, "crc32": self._crc32}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on at a saved place, with the batches that would have come then.

        The loader must have the same tokens, T and seed; DataError says where it has not.
        """
        try:
            epoch, position, crc32 = (int(state[key]) for key in ("epoch", "position", "crc32"))
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"cannot go on: the saved place in the data is damaged ({e})") from e
        if crc32 != self._crc32:
            raise DataError(
                "cannot go on: the training tokens are not those of the saved run, its text or "
                "tokenizer has changed; begin a new run with another --run-dir"
            )
        if epoch < 0:
            raise DataError(f"cannot go on in epoch {epoch}; the saved state is damaged")
        self._open(epoch)
        if not 0 <= position < len(self._starts):
            raise DataError(
                f"cannot go on at row {position} of {len(self._starts)} in epoch {epoch}; "
                f"the run was saved with another --seq-len"
            )
        self._position = position

    def _open(self, epoch: int) -> None:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        last = len(self._tokens) - 1 - self._T  # where the last possible row begins
        offset = int(rng.integers(min(self._T, last + 1)))
        self._starts = rng.permutation(np.arange(offset, last + 1, self._T))
        self._epoch, self._position = epoch, 0


def sequential_batches(tokens: Tokens, B: int, T: int) -> Iterator[Batch]:
    """Batches in which every token but the first is a target exactly once, in order.

    Full batches are (B, T); then come the rows left over, (b, T) with b < B, and at last the
    tokens left over, (1, t) with t < T. A mean over all tokens weighs each batch by its size.
    The first token has no prediction. DataError if there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise DataError(
            f"{len(tokens)} tokens of validation text are too few: a prediction needs 2; "
            f"give more text"
        )
    rows = (len(tokens) - 1) // T
    for first in range(0, rows, B):
        starts = np.arange(first, min(first + B, rows)) * T
        yield _batch(tokens[starts[:, None] + np.arange(T + 1)])
    if rows * T < len(tokens) - 1:
        yield _batch(tokens[None, rows * T :])


def _batch(rows: Tokens) -> Batch:
    """rows (b, t + 1) uint16."""
    inputs = np.ascontiguousarray(rows[:, :-1])
    # NumPy's stable sort of 16-bit integers is a radix sort: it costs next to nothing.
    order = np.argsort(inputs, axis=None, kind="stable")
    return Batch(
        inputs.astype(np.int32),
        np.ascontiguousarray(rows[:, 1:], np.int32),
        order.astype(np.int32),
    )
