"""Ctrl-C and other signals, as a request to end a run in good order."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Final

from rich.console import Console

# SIGHUP comes when a terminal or a connection is closed; Windows does not have it.
SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class StopSignal:
    """Catches Ctrl-C, SIGTERM and SIGHUP: the first sets `requested`, a second one ends at once.

    A signal that the program was started to ignore, as by nohup, is still ignored.
    """

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
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
        self.release()

    def release(self) -> None:
        """Gives the signals back to the handlers that they had before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if number == getattr(signal, "SIGHUP", None):
            self._console.quiet = True  # the terminal is gone, and writing to it would fail
        self._console.print("stopping after this step; Ctrl-C again stops at once, without saving")
