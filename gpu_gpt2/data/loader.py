"""Batches of tokens: without end and shuffled for training, once and in order for validation."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.tokens import CHECK_BLOCK, Tokens, check_tokens
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.rng.mersenne import WORDS, MersenneTwister

Int32 = npt.NDArray[np.int32]
# Tokens at the beginning of each shard that are compared before training starts: all of a large
# data set would take long to read. The others are compared when their shard is opened.
CHECKED_TOKENS: Final = 1 << 20
MAX_CRC32: Final = (1 << 32) - 1


class BatchLoader:
    """Yields batches without end in llm.c's order, so that runs can be compared batch by batch.

    All ranks together read a block in each micro-step: world_size * B * T consecutive tokens, of
    which each rank takes its own B * T. In an epoch the shards come in random order, and so do the
    blocks of each shard. The tokens left over at a shard's end are not read. A block may begin
    and end inside a document.

    So a batch is one passage of the text, and a small text is learnt badly from such batches. With
    `scattered`, a block is a single row, B random rows make a batch, and the rows begin at another
    offset below T in every epoch.
    """

    def __init__(
        self,
        shards: Sequence[Tokens],
        B: int,
        T: int,
        *,
        scattered: bool,
        vocab_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """shards: each (count,) integers. DataError if one is too short or has tokens >= V."""
        self._shards = shards
        self._T = T
        self._scattered = scattered
        self._blocks_per_batch = B if scattered else 1
        block_rows = 1 if scattered else B
        self._part_tokens = block_rows * T
        self._vocab_size = vocab_size
        self._block_tokens = world_size * block_rows * T
        self._rank_offset = rank * block_rows * T
        self._random = MersenneTwister(seed + rank)
        self._crc32 = 0
        # CRC-32 of all tokens of each shard, None until it has been opened for the first time.
        self._shard_crc32: list[int | None] = [None] * len(shards)
        for shard in shards:
            if len(shard) < self._block_tokens + 1:
                raise DataError(
                    f"{_name(shard)} holds {len(shard)} tokens, too few: batches of "
                    f"{self._block_tokens} and the token after each need "
                    f"{self._block_tokens + 1}; give more text, or a smaller --batch-size or "
                    f"--seq-len"
                )
            self._crc32 = zlib.crc32(shard[:CHECKED_TOKENS].tobytes(), self._crc32 ^ len(shard))
        self._order = np.arange(len(shards))
        self._blocks = np.arange(0)
        self._epoch = -1
        self._next_epoch()

    def next_batch(self) -> Batch:
        """This rank's rows of the next blocks."""
        parts = [self._next_part() for _ in range(self._blocks_per_batch)]
        inputs = np.concatenate([part[:-1] for part in parts]).reshape(-1, self._T)
        targets = np.concatenate([part[1:] for part in parts]).reshape(-1, self._T)
        return Batch.of(inputs, targets)

    def _next_part(self) -> Tokens:
        """This rank's part of the next block, with the token after it as the last target."""
        if self._position == len(self._blocks):
            if self._shard + 1 < len(self._shards):
                self._open(self._shard + 1)
            else:
                self._next_epoch()
        block_start = self._offset + int(self._blocks[self._position]) * self._block_tokens
        start = block_start + self._rank_offset
        self._position += 1
        part: Tokens = self._tokens[start : start + self._part_tokens + 1]
        return part

    def state(self) -> dict[str, Any]:
        """The position of the next batch in the data, and checksums of the data, for JSON."""
        words, drawn = self._before_blocks
        return {
            "epoch": self._epoch,
            "shards": self._order.tolist(),
            "shard": self._shard,
            "position": self._position,
            "generator": base64.b64encode(words.astype("<u4").tobytes()).decode("ascii"),
            "drawn": drawn,
            "crc32": self._crc32,
            "shard_crc32": self._shard_crc32.copy(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved `state()`, with the batches that would have come next.

        DataError if the loader has other shards, sizes or another rank than the saved one. Tokens
        after the first CHECKED_TOKENS of a shard are compared when the shard is opened, and only if
        it had been opened before. A state of an older version lacks "shard_crc32".
        """
        try:
            words = np.frombuffer(base64.b64decode(state["generator"], validate=True), "<u4")
            order = np.array(state["shards"], np.int64)
            epoch, shard, position, drawn, crc32 = (
                int(state[key]) for key in ("epoch", "shard", "position", "drawn", "crc32")
            )
            shard_crc32 = list(state.get("shard_crc32", self._shard_crc32))
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise DataError(f"cannot resume: the saved place in the data is damaged ({e})") from e
        if crc32 != self._crc32:
            raise DataError(
                "cannot resume: the training tokens are not those of the saved run, its text or "
                "tokenizer has changed; begin a new run with another --run-dir"
            )
        if not (
            epoch >= 0
            and words.shape == (WORDS,)
            and 0 <= drawn <= WORDS
            and np.array_equal(np.sort(order), np.arange(len(self._shards)))
            and 0 <= shard < len(self._shards)
            and len(shard_crc32) == len(self._shards)
            and all(crc is None or _is_crc32(crc) for crc in shard_crc32)
        ):
            raise DataError("cannot resume: the saved place in the data is damaged")
        for i, found in enumerate(self._shard_crc32):  # the shard that __init__ has opened
            if found is not None:
                self._compare(i, shard_crc32[i], found)
                shard_crc32[i] = found
        self._shard_crc32 = shard_crc32
        self._epoch, self._order = epoch, order
        self._random.restore(words.astype(np.uint32), drawn)
        self._open(shard)
        if not 0 <= position <= len(self._blocks):
            raise DataError(
                f"cannot resume at block {position} of {len(self._blocks)}; the run was saved with "
                f"another --batch-size or --seq-len"
            )
        self._position = position

    def _next_epoch(self) -> None:
        self._epoch += 1
        self._random.shuffle(self._order)
        self._open(0)

    def _open(self, shard: int) -> None:
        """Moves to the first block of the shard at index `shard` of this epoch's order."""
        self._shard, self._position = shard, 0
        index = int(self._order[shard])
        self._tokens = self._shards[index]
        found = self._checked_crc32(self._tokens)
        self._compare(index, self._shard_crc32[index], found)
        self._shard_crc32[index] = found
        self._before_blocks = self._random.state()
        inputs = len(self._tokens) - 1
        self._offset = 0
        if self._scattered:
            offsets = min(self._T, inputs - self._block_tokens + 1)
            self._offset = int(self._random.draw(1)[0]) % offsets
        self._blocks = self._random.permutation((inputs - self._offset) // self._block_tokens)

    def _checked_crc32(self, tokens: Tokens) -> int:
        """The CRC-32 of all tokens of a shard; DataError if one is outside the vocabulary."""
        crc32 = 0
        for start in range(0, len(tokens), CHECK_BLOCK):
            block = tokens[start : start + CHECK_BLOCK]
            try:
                check_tokens(block, self._vocab_size, _name(tokens))
            except DataError:
                # The message gives the token's position in the shard, not in this block.
                check_tokens(tokens, self._vocab_size, _name(tokens))
                raise
            crc32 = zlib.crc32(np.ascontiguousarray(block).data, crc32)
        return crc32

    def _compare(self, index: int, expected: int | None, found: int) -> None:
        """Raises DataError if the tokens of a shard changed since it was opened before."""
        if expected not in (None, found):
            raise DataError(
                f"{_name(self._shards[index])}: the tokens changed since this run read them first "
                f"(CRC-32 {found:08x}, expected {expected:08x}); restore the file, or begin a new "
                f"run with another --run-dir"
            )


def _is_crc32(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_CRC32


def _name(tokens: Tokens) -> str:
    """The file that `tokens` are mapped from, for messages."""
    return str(getattr(tokens, "filename", None) or "the training text")


def sequential_batches(tokens: Tokens, B: int, T: int) -> Iterator[Batch]:
    """Yields batches in which every token but the first is a target exactly once, in order.

    Full batches are (B, T). After them come the remaining rows, (b, T) with b < B, and then the
    remaining tokens, (1, t) with t < T. A mean over all tokens weighs each batch by its size.
    DataError if there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise DataError(
            f"{len(tokens)} tokens of validation text are too few: a prediction needs 2; "
            f"give more text"
        )
    rows = (len(tokens) - 1) // T
    for first in range(0, rows, B):
        starts = np.arange(first, min(first + B, rows)) * T
        picked = tokens[starts[:, None] + np.arange(T + 1)]
        yield Batch.of(picked[:, :-1], picked[:, 1:])
    if rows * T < len(tokens) - 1:
        yield Batch.of(tokens[None, rows * T : -1], tokens[None, rows * T + 1 :])
