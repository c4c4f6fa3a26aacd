"""Saves checkpoints in a thread: training waits for a copy in memory, not for the disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from gpu_gpt2.device.base import FLOAT32, Array, Device
from gpu_gpt2.models.weights import FloatArray
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.checkpoint import Retention, Tokenizer, TrainingState

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves the checkpoints of a run in a thread, one after the other; a context manager.

    To save, copy the device's arrays with `host_copies`, put the copies into a TrainingState, and
    call `start`. Training may change the arrays as soon as `host_copies` returns. If a save fails,
    every later call raises its error.
    """

    def __init__(
        self, run_dir: Path, device: Device, sizes: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        """Allocates one float32 array of each size in host memory, or raises DeviceError."""
        self._run_dir, self._device, self._tokenizer = run_dir, device, tokenizer
        self._buffers = [device.host_empty((n,), FLOAT32) for n in sizes]
        for buffer in self._buffers:
            buffer.fill(0)  # the system provides memory at the first write, so write now
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the save in progress; raises its error unless another error ends the run.

        After KeyboardInterrupt, the second Ctrl-C, it does not wait.
        """
        if error is None:
            self.wait()
            return
        if isinstance(error, KeyboardInterrupt):
            return
        self._join()
        if self._error is not None and self._error is not error:
            logger.error("%s", self._error)

    def host_copies(self, *arrays: Array) -> tuple[FloatArray, ...]:
        """Returns host copies of device arrays of the sizes; the next call overwrites them.

        Waits for the save in progress first, because that save reads the same host memory.
        """
        self.wait()
        for buffer, array in zip(self._buffers, arrays, strict=True):
            self._device.download_into(buffer, array)
        return tuple(self._buffers)

    def start(self, state: TrainingState, retention: Retention) -> Path:
        """Starts to save a state whose arrays are `host_copies`; returns the folder it will have.

        The folder exists when `wait` has returned.
        """
        self.wait()
        # The thread is a daemon, so that a second Ctrl-C ends the program at once. The files that
        # the thread has written by then are in a hidden folder, which the next save removes.
        self._thread = threading.Thread(
            target=self._save, args=(state, retention), name="checkpoint", daemon=True
        )
        self._thread.start()
        return checkpoint.folder_of(self._run_dir, state.step)

    def check(self) -> None:
        """Raises the error of a save that has failed; does not wait for one in progress."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits until the save in progress is on the disk. Raises CheckpointError if it failed."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(self, state: TrainingState, retention: Retention) -> None:
        try:
            checkpoint.save(self._run_dir, state, self._tokenizer, retention)
        except BaseException as error:  # `check` and `wait` raise it in the trainer's thread
            self._error = error
