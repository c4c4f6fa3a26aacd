"""What a run says: one line a step on the terminal and the same numbers in metrics.jsonl."""

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
PLAIN_EVERY_S: Final = 5.0  # between lines where there is no terminal to draw a bar on
SMOOTHING: Final = 0.9  # of the loss on the bar


class RunLog:
    """Progress of one run, used as a context manager.

    metrics.jsonl gets one JSON object a line: step (steps done), loss (nats per token), lr,
    grad_norm (before clipping; null if there was no update), step_ms, tokens_per_s; or step,
    val_loss, val_bits_per_byte.
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
        """One step over `tokens` tokens; without a grad_norm there was no update."""
        speed = tokens / step_ms * 1000
        self._write(
            step=step, loss=loss, lr=lr, grad_norm=grad_norm, step_ms=step_ms, tokens_per_s=speed
        )
        smooth = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        self._loss = smooth
        self._progress.update(self._task, completed=step, loss=smooth, speed=speed)
        if not self.console.is_terminal and (
            step == self._steps or time.monotonic() - self._last_line > PLAIN_EVERY_S
        ):
            self._last_line = time.monotonic()
            left = (self._steps - step) * step_ms / 1000
            self.console.print(
                f"step {step}/{self._steps}  loss {smooth:.3f}  {speed:,.0f} tokens/s  "
                f"{left:.0f} s left"
            )

    def doing(self, what: str) -> None:
        """Says on the bar what else than a step is being done; "" when it is over."""
        self._progress.update(self._task, description=f"{what}, " if what else "")

    def validation(self, step: int, *, loss: float, bits_per_byte: float) -> None:
        self._write(step=step, val_loss=loss, val_bits_per_byte=bits_per_byte)
        self.console.print(
            f"step {step}  validation loss {loss:.4f}  {bits_per_byte:.3f} bits per byte"
        )

    def sample(self, text: str) -> None:
        """A piece of generated text."""
        self.console.rule("sample", style="dim")
        self.console.print(text, markup=False, highlight=False, emoji=False)
        self.console.rule(style="dim")

    def _write(self, **record: Any) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free some space, then go on with "
                f"--resume"
            ) from error


def _locked(run_dir: Path) -> int | None:
    """A descriptor that keeps other processes out of the run until it is closed, or we end."""
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
    except OSError:  # nor have some network file systems
        pass
    return lock


def _cut_after(path: Path, step: int) -> None:
    """Drops the records after a step, for what came after the checkpoint is done again.

    The file is replaced as a whole: a crash leaves the old one or the new one.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line for line in lines if _step_of(line) <= step), "utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    """The step of a record; infinity if the line is damaged, as by a crash while writing it."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
