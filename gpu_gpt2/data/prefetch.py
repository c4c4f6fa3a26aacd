"""Reads batches ahead in a thread, so that the device does not wait for the disk."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Any, Final, Protocol

from gpu_gpt2.models.batch import Batch

DEPTH: Final = 2  # batches read ahead: one being taken, and one to spare
POLL_S: Final = 0.1  # the thread looks this often whether it should stop


class Loader(Protocol):
    """A source of batches without end, such as BatchLoader."""

    def next_batch(self) -> Batch: ...

    def state(self) -> dict[str, Any]: ...


class Prefetcher:
    """Gives a loader's batches, in its order, inside a `with`; only the thread uses the loader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._state = loader.state()
        self._ready: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def next_batch(self) -> Batch:
        """The loader's next batch; raises the exception that reading it raised."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # the next call raises it again, as no batch will come
            raise item
        batch, self._state = item
        return batch

    def state(self) -> dict[str, Any]:
        """The loader's state before the batch that next_batch gives next."""
        return self._state

    def _read(self) -> None:
        while not self._stop.is_set():
            item: tuple[Batch, dict[str, Any]] | BaseException
            try:
                item = self._loader.next_batch(), self._loader.state()
            except BaseException as error:  # next_batch raises it in the trainer's thread
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=POLL_S)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
