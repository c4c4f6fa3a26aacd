"""A loader that gives the same few batches again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_gpt2.data.loader import BatchLoader
from gpu_gpt2.models.batch import Batch


class FirstBatches:
    """Yields the first `count` batches of a loader in every step of `count` micro-batches.

    A model that is trained on them must learn them by heart. The state does not change from step
    to step, so it is right after whole steps only.
    """

    def __init__(self, loader: BatchLoader, count: int) -> None:
        self._loader = loader
        self._count = count
        self._next = 0  # index of the batch that comes next
        self._read()

    def next_batch(self) -> Batch:
        """Returns the next of the `count` batches; the first one comes after the last."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % self._count
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the loader's state before the first of the batches."""
        return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues with the first of the batches that follow a saved state. Raises DataError."""
        self._loader.restore(state)
        self._read()

    def _read(self) -> None:
        self._state = self._loader.state()
        self._batches = [self._loader.next_batch() for _ in range(self._count)]
        self._next = 0
