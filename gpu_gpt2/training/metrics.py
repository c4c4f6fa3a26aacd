"""The log of a run: progress on the terminal, metrics.jsonl, main.log, and other sinks."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from gpu_gpt2.errors import CheckpointError, ConfigError, UserError
from gpu_gpt2.training.curve import MARK, curve_text
from gpu_gpt2.training.history import METRICS_FILE
from gpu_gpt2.training.sinks import Sink

MAIN_LOG: Final = "main.log"  # llm.c's name for its log, whose format this file has
LINE_EVERY_S: Final = 5.0  # seconds between lines of progress where output is not a terminal
SMOOTHING: Final = 0.9  # decay of the exponential moving averages that are displayed
FORECAST_STEPS: Final = (2, 3, 4)  # steps of this process by which the time left is predicted
SHORTEST_FORECAST_S: Final = 10.0  # seconds left below which no forecast is printed
CURVE_HEIGHT: Final = 8  # lines of the loss curve
CURVE_WIDTH: Final = 110  # most columns of the curve; a wider one would look flat
CURVE_WIDTH_ELSEWHERE: Final = 70  # columns of the curve where output is not a terminal

logger = logging.getLogger(__name__)


class RunLog:
    """Logs the progress of one run; a context manager that locks the run folder.

    metrics.jsonl gets one JSON object a line. A training step has step (steps done), loss (nats per
    token), lr, grad_norm (before clipping), step_ms and tokens_per_s, and, if the weights were not
    updated, skipped (the reason); null stands for a number that is not finite. A validation has
    step, val_loss (nats per token) and val_bits_per_byte; a HellaSwag evaluation has step and
    hellaswag_acc_norm.

    main.log gets the losses, learning rates and accuracies in llm.c's format, whose training lines
    count steps from 0. The sinks get the same numbers. A sink that fails is removed after a
    warning, so that it cannot stop the training.
    """

    def __init__(
        self,
        run_dir: Path,
        console: Console,
        *,
        first_step: int,
        steps: int,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Opens the log after `first_step` of `steps` steps; later records are deleted.

        Raises ConfigError if another process trains in the folder, and CheckpointError if the
        files cannot be written.
        """
        self.console = console
        self._first_step = first_step
        self._steps = steps
        self._loss: float | None = None
        self._step_ms: float | None = None
        self._first_times: list[float] = []  # milliseconds of the first steps of this process
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(
            "", total=steps, completed=first_step, numbers=""
        )
        self._metrics = _LogFile(run_dir / METRICS_FILE, _step_of_record)
        self._main_log = _LogFile(run_dir / MAIN_LOG, _step_of_line)
        self._sinks = list(sinks)
        self._lock = _locked(run_dir)
        try:
            self._cut(first_step)
        except BaseException:
            self._close()
            raise

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
        self._close()

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest validation loss of the run, the first of equal ones.

        Validations before a resume count too. None if there was no validation.
        """
        losses = self._recorded["val_loss"].items()
        return min(losses, key=lambda item: (item[1], item[0]), default=None)

    def has(self, kind: str, step: int) -> bool:
        """Returns True if `kind` ("val_loss", "hellaswag_acc_norm") was recorded after `step`."""
        return step in self._recorded[kind]

    def training(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float | None,
        step_ms: float,
        tokens: int,
        skipped: str = "",
    ) -> None:
        """Logs an optimizer step on `tokens` tokens.

        `skipped` is the reason if the step made no update, else "". `grad_norm` is None if the norm
        is not finite.
        """
        speed = tokens / step_ms * 1000
        numbers = {
            "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
            "lr": lr,
            "grad_norm": grad_norm,
            "step_ms": step_ms,
            "tokens_per_s": speed,
        }
        reason = {"skipped": skipped} if skipped else {}
        self._record({"step": step, **numbers, **reason})
        norm = math.nan if grad_norm is None else grad_norm
        self._main_log.write(f"s:{step - 1} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}")
        self._to_sinks(step, {f"train/{name}": x for name, x in numbers.items() if x is not None})

        self._loss = _average(self._loss, loss)
        self._step_ms = _average(self._step_ms, step_ms)
        shown = f"loss {self._loss:.3f}  {speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, numbers=shown)
        self._forecast(step, step_ms)
        if step == self._steps or self._line_is_due():
            left = duration((self._steps - step) * self._step_ms / 1000)
            self._line(f"step {step}/{self._steps}  {shown}  {left} left")

    def validation(self, step: int, *, loss: float, bits_per_byte: float) -> None:
        """Logs the mean loss, in nats per token, on the held-out text after `step` steps."""
        self._record({"step": step, "val_loss": loss, "val_bits_per_byte": bits_per_byte})
        self._main_log.write(f"s:{step} tel:{loss:.4f}")
        self._to_sinks(step, {"val/loss": loss, "val/bits_per_byte": bits_per_byte})
        self.console.print(
            f"step {step}  validation loss {loss:.4f}  {bits_per_byte:.3f} bits per byte"
        )

    def hellaswag(self, step: int, *, correct: int, count: int) -> None:
        """Logs how many of `count` HellaSwag questions the model answers correctly."""
        accuracy = correct / count
        self._record({"step": step, "hellaswag_acc_norm": accuracy})
        self._main_log.write(f"s:{step} eval:{accuracy:.4f}")
        self._to_sinks(step, {"val/hellaswag_acc_norm": accuracy})
        self.console.print(f"step {step}  HellaSwag {correct:,}/{count:,} = {accuracy:.4f}")

    def sample(self, step: int, text: str) -> None:
        """Prints the text that the model generates after `step` steps between two rules."""
        self.console.rule(f"sample after step {step}", style="dim")
        self.console.print(text, markup=False, highlight=False, emoji=False)
        self.console.rule(style="dim")

    def doing(self, what: str, done: int = 0, total: int = 0, unit: str = "tokens") -> None:
        """Shows an activity besides training, such as "validating", and its progress.

        `done` of `total` units are finished; a `total` of 0 means unknown. An empty `what` ends the
        display.
        """
        share = f" {done / total:.0%}" if total else ""
        self._progress.update(self._task, description=f"{what}{share}, " if what else "")
        if done < total and self._line_is_due():
            self._line(f"{what} {done:,}/{total:,} {unit}")

    def rewind(self, step: int) -> None:
        """Deletes all records after `step`, because training returns to a checkpoint."""
        self._cut(step)
        self._loss = self._step_ms = None
        self._progress.update(self._task, completed=step)

    def finish(self) -> None:
        """Prints the loss curve of the whole run, unless the run is too short for one."""
        width = (
            min(self.console.width, CURVE_WIDTH)
            if self.console.is_terminal
            else CURVE_WIDTH_ELSEWHERE
        )
        losses = self._recorded["loss"]
        curve = curve_text(
            list(losses),
            list(losses.values()),
            self._recorded["val_loss"],
            width=width,
            height=CURVE_HEIGHT,
            encoding=self.console.encoding,
        )
        if curve:
            text = Text(curve)
            text.highlight_words([MARK], "bold yellow")
            self.console.print(text, soft_wrap=True)

    def _cut(self, step: int) -> None:
        """Deletes what was logged after `step` steps, because these steps come again."""
        # A new run keeps no old record, not even a validation before the first step.
        last = step if step > 0 else -1
        records = [json.loads(line) for line in self._metrics.cut(last)]
        self._main_log.cut(last)
        self._recorded: dict[str, dict[int, float]] = {
            kind: {r["step"]: r[kind] for r in records if r.get(kind) is not None}
            for kind in ("loss", "val_loss", "hellaswag_acc_norm")
        }
        self._each_sink(lambda sink: sink.start(step))

    def _record(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(json.dumps(record))
        for kind, values in self._recorded.items():
            if record.get(kind) is not None:
                values[record["step"]] = record[kind]

    def _to_sinks(self, step: int, values: Mapping[str, float]) -> None:
        self._each_sink(lambda sink: sink.log(step, values))

    def _each_sink(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except UserError:
                raise
            except Exception as error:  # no error of a library may stop the training
                self._sinks.remove(sink)
                logger.warning(
                    "%s failed and receives no more numbers, but training continues: %s",
                    sink.name,
                    " ".join(str(error).split()) or type(error).__name__,
                )

    def _forecast(self, step: int, step_ms: float) -> None:
        """Prints the predicted time left, once, after the first few steps."""
        last = FORECAST_STEPS[-1]
        if len(self._first_times) == last:
            return
        self._first_times.append(step_ms)
        if len(self._first_times) < last:
            return
        times = [self._first_times[number - 1] for number in FORECAST_STEPS]
        left = self._steps - step
        seconds = left * sum(times) / len(times) / 1000
        if seconds >= SHORTEST_FORECAST_S:
            steps = "step" if left == 1 else "steps"
            self.console.print(
                f"about {duration(seconds)} for the {left:,} {steps} left", highlight=False
            )

    def _line_is_due(self) -> bool:
        """Returns True if a line of progress is due, where output is not a terminal."""
        waited = time.monotonic() - self._last_line
        return not self.console.is_terminal and waited > LINE_EVERY_S

    def _line(self, text: str) -> None:
        if not self.console.is_terminal:
            self._last_line = time.monotonic()
            self.console.print(text)

    def _close(self) -> None:
        self._each_sink(lambda sink: sink.close())
        self._sinks.clear()
        self._metrics.close()
        self._main_log.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: "45 s", "1 min 20 s", "3 h 5 min", "2 d 7 h"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    # Rounding to the smaller unit comes before splitting, to avoid "1 min 60 s".
    for (name, size), (smaller, part) in itertools.pairwise(units):
        count, rest = divmod(round(seconds / part), size // part)
        if count:
            return f"{count} {name} {rest} {smaller}" if rest else f"{count} {name}"
    return f"{round(seconds)} s"


class _LogFile:
    """A text file to which lines are appended, and whose last lines can be deleted."""

    def __init__(self, path: Path, step_of: Callable[[str], float]) -> None:
        """`step_of` returns the step of a line, or infinity if the line is damaged."""
        self._path = path
        self._step_of = step_of
        self._file: TextIO | None = None

    def cut(self, step: int) -> list[str]:
        """Deletes the lines after `step`, opens the file to append, and returns the lines kept.

        The file is replaced as a whole, so that a crash leaves either the old or the new file.
        """
        self.close()
        try:
            kept: list[str] = []
            if self._path.exists():
                text = self._path.read_text(encoding="utf-8", errors="replace")
                lines = text.splitlines(keepends=True)
                kept = [line for line in lines if self._step_of(line) <= step]
                temporary = self._path.with_name(f".{self._path.name}.tmp")
                temporary.write_text("".join(kept), "utf-8")
                temporary.replace(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}") from error
        return kept

    def write(self, line: str) -> None:
        """Appends a line and hands it to the operating system."""
        assert self._file is not None
        try:
            self._file.write(f"{line}\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free some space, then continue "
                f"with --resume"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # `write` has reported this error already
                self._file.close()
            self._file = None


def has_final_records(run_dir: Path, step: int, *, hellaswag: bool) -> bool:
    """Returns True if the log has the validation after the last step, `step`.

    With `hellaswag` it must also have the last HellaSwag accuracy. After a crash they can be
    missing; a resumed run then computes them. Raises CheckpointError if the log cannot be read.
    """
    kinds = {"val_loss", "hellaswag_acc_norm"} if hellaswag else {"val_loss"}
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    last = [json.loads(line) for line in lines if _step_of_record(line) == step]
    return all(any(kind in record for record in last) for kind in kinds)


def _average(average: float | None, value: float) -> float:
    """Returns the moving average after one more value; values that are not finite are ignored."""
    if average is None or not math.isfinite(average):
        return value
    return SMOOTHING * average + (1 - SMOOTHING) * value if math.isfinite(value) else average


def _locked(run_dir: Path) -> int | None:
    """Locks the run folder until the returned descriptor is closed; None if locks do not exist."""
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
    except OSError:  # some network file systems have no locks
        pass
    return lock


def _step_of_record(line: str) -> float:
    """Returns the step of a line of metrics.jsonl, or infinity if a crash left it incomplete."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _step_of_line(line: str) -> float:
    """Returns the steps done at a line of main.log, or infinity for an incomplete line."""
    try:
        step, value, *_ = line.split()
        done = int(step.removeprefix("s:")) + (1 if value.startswith("trl:") else 0)
        return done if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf
