"""The log of a run: progress on the terminal, and one record for each step in metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gpu_gpt2.errors import CheckpointError, ConfigError

METRICS_FILE: Final = "metrics.jsonl"
LINE_EVERY_S: Final = 5.0  # seconds between lines of progress where output is not a terminal
SMOOTHING: Final = 0.9  # weight of the past in the displayed loss, an exponential moving average


class RunLog:
    """The progress of one run, as a context manager that locks the run folder.

    metrics.jsonl gets one JSON object a line. A training step has step (steps done), loss (nats per
    token), lr, grad_norm (before clipping; null if there was no update), step_ms and tokens_per_s.
    A validation has step, val_loss (nats per token) and val_bits_per_byte.
    """

    def __init__(self, run_dir: Path, console: Console, *, first_step: int, steps: int) -> None:
        self.console = console
        self._steps = steps
        self._path = run_dir / METRICS_FILE
        self._loss: float | None = None
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn(
                "{task.description}loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"
            ),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(
            "", total=steps, completed=first_step, loss=float("nan"), speed=0.0
        )
        self._lock = _locked(run_dir)
        try:
            _cut_after(self._path, first_step)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from error

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
        if self._lock is not None:
            os.close(self._lock)

    def training(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float | None,
        step_ms: float,
        tokens: int,
    ) -> None:
        """Logs a step over `tokens` tokens; a grad_norm of None says that there was no update."""
        speed = tokens / step_ms * 1000
        self._write(
            step=step, loss=loss, lr=lr, grad_norm=grad_norm, step_ms=step_ms, tokens_per_s=speed
        )
        smooth = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        self._loss = smooth
        self._progress.update(self._task, completed=step, loss=smooth, speed=speed)
        if not self.console.is_terminal and (
            step == self._steps or time.monotonic() - self._last_line > LINE_EVERY_S
        ):
            self._last_line = time.monotonic()
            left = (self._steps - step) * step_ms / 1000
            self.console.print(
                f"step {step}/{self._steps}  loss {smooth:.3f}  {speed:,.0f} tokens/s  "
                f"{left:.0f} s left"
            )

    def doing(self, what: str) -> None:
        """Shows on the progress bar what is being done besides training; "" ends it."""
        self._progress.update(self._task, description=f"{what}, " if what else "")

    def validation(self, step: int, *, loss: float, bits_per_byte: float) -> None:
        """Logs the mean loss, in nats per token, on the held-out text after `step` steps."""
        self._write(step=step, val_loss=loss, val_bits_per_byte=bits_per_byte)
        self.console.print(
            f"step {step}  validation loss {loss:.4f}  {bits_per_byte:.3f} bits per byte"
        )

    def sample(self, text: str) -> None:
        """Prints a generated text between two rules."""
        self.console.rule("sample", style="dim")
        self.console.print(text, markup=False, highlight=False, emoji=False)
        self.console.rule(style="dim")

    def _write(self, **record: Any) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free some space, then continue "
                f"with --resume"
            ) from error


def _locked(run_dir: Path) -> int | None:
    """Locks the run folder and returns the lock's descriptor; closing it, or our end, unlocks."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return None
    lock = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"{run_dir} is in use by another training; wait for it or choose another --run-dir"
        ) from None
    except OSError:  # some network file systems have no locks either
        pass
    return lock


def _cut_after(path: Path, step: int) -> None:
    """Drops the records after `step`: a resumed run repeats the steps after its checkpoint.

    The file is replaced as a whole, so that a crash leaves the old one or the new one.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line for line in lines if _step_of(line) <= step), "utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    """Returns the step of a record, or infinity for a line that a crash left incomplete."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
