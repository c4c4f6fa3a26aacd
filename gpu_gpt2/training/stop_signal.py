"""Turns Ctrl-C, SIGTERM, SIGHUP and a closed pipe into a request to save and stop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from types import FrameType, TracebackType
from typing import Any, Final, TextIO, cast

from rich.console import Console

# SIGHUP comes when a terminal or a connection is closed; Windows does not have it.
SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopSignal:
    """Catches Ctrl-C, SIGTERM and SIGHUP; a context manager.

    The first signal sets `requested`. A second one raises KeyboardInterrupt. A signal that was
    ignored when the program started, as under nohup, is still ignored.

    If standard output fails, later output is discarded. If it is a pipe whose reader has ended,
    `requested` is set. A terminal that closes without SIGHUP, as for a job that the shell has
    disowned, does not stop the run.
    """

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console
        self._old: dict[int, Any] = {}
        self._stdout: AbstractContextManager[object] = nullcontext()
        if sys.stdout is not None:  # a program may be started without one
            stdout = cast(TextIO, _Stdout(sys.stdout, self._output_lost))
            self._stdout = redirect_stdout(stdout)

    def __enter__(self) -> StopSignal:
        self._stdout.__enter__()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stdout.__exit__(kind, error, trace)
        self.release()

    def release(self) -> None:
        """Restores the signal handlers that were set before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._console.print("stopping after this step; Ctrl-C again stops at once, without saving")

    def _output_lost(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self.requested = True


class _Stdout:
    """Standard output that never fails: after an error it calls `lost` and becomes /dev/null."""

    def __init__(self, stream: TextIO, lost: Callable[[OSError], None]) -> None:
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._throw_away(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._throw_away(error)

    def _throw_away(self, error: OSError) -> None:
        self._lost(error)
        with suppress(OSError):  # the stream may not be a file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
