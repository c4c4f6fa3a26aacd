"""Sends the numbers of a run to TensorBoard and Weights & Biases while it trains."""

from __future__ import annotations

import importlib
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from gpu_gpt2.errors import ConfigError

TENSORBOARD_DIR: Final = "tensorboard"  # in the run folder
WANDB_DIR: Final = "wandb"  # in the run folder; W&B chooses this name
WANDB_ID_FILE: Final = "id.txt"  # in WANDB_DIR: the id that all parts of a resumed run share
WANDB_PROJECT: Final = "gpu-gpt2"
# Longest time that the end of a run waits for uploads, in seconds. Without a network they would
# never end. The files stay in the run folder, and `wandb sync` uploads them later.
LONGEST_UPLOAD_S: Final = 300.0


class Sink(Protocol):
    """A receiver of a run's numbers. If it raises anything but UserError, the log removes it."""

    @property
    def name(self) -> str:
        """The name of the sink in warnings."""
        ...

    def start(self, step: int) -> None:
        """Starts, resumes or rewinds the run after `step` steps; later steps will be logged again.

        Raises ConfigError if the user has to set something up first.
        """
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers by name after `step` steps; one step may be logged in several calls."""
        ...

    def close(self) -> None:
        """Ends this part of the run. May be called without `start`."""
        ...


class TensorBoardSink:
    """Writes event files for `tensorboard --logdir RUN`, into RUN/tensorboard.

    Every `start` opens a new file, which begins with the event SessionLog.START. Because of this
    event TensorBoard ignores what earlier files have for the same and later steps.
    """

    name = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError if the package tensorboard is not installed."""
        self._proto: Any = _imported("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._records: Any = _imported("tensorboard.summary.writer.record_writer", "tensorboard")
        self._folder = run_dir / TENSORBOARD_DIR
        self._file: BinaryIO | None = None
        self._parts = 0

    def start(self, step: int) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, which begin with the time.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._folder / f"{name}.{self._parts}").open("xb")
        self._parts += 1
        self._writer = self._records.RecordWriter(self._file)
        proto = self._proto
        self._write(file_version="brain.Event:2")
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._write(step=step + 1, session_log=start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(
            value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._write(step=step, summary=summary)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _write(self, **event: Any) -> None:
        self._writer.write(self._proto.Event(wall_time=time.time(), **event).SerializeToString())
        self._writer.flush()


class WandbSink:
    """Logs to Weights & Biases, in the project "gpu-gpt2"; its local files go into RUN/wandb.

    The usual environment variables work: WANDB_MODE=offline, WANDB_ENTITY, WANDB_PROJECT, and so
    on. All parts of a resumed run share one id. W&B cannot replace a step: when steps are logged
    again after a resume or a rewind, it keeps the first numbers.
    """

    name = "W&B"

    def __init__(self, run_dir: Path, settings: Mapping[str, object]) -> None:
        """`settings` are shown as the run's config.

        Raises ConfigError if the package wandb is not installed.
        """
        self._wandb: Any = _imported("wandb", "wandb")
        self._run_dir = run_dir
        self._settings = dict(settings)
        self._run: Any = None
        self._newest = 0  # the highest step that W&B has

    def start(self, step: int) -> None:
        if self._run is not None:  # a rewind, which W&B does not support
            return
        wandb = self._wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=self._run_dir.resolve().name,
                dir=str(self._run_dir),
                id=self._id(resumed=step > 0),
                resume="allow",
                config=self._settings,
                settings=wandb.Settings(
                    console="off",  # W&B would copy every update of the progress bar
                    finish_timeout=LONGEST_UPLOAD_S,
                ),
            )
        except wandb.errors.UsageError as error:
            raise ConfigError(
                f"W&B: {' '.join(str(error).split()).rstrip('.')}; run `wandb login`, or set "
                f"WANDB_MODE=offline"
            ) from error
        self._newest = max(int(self._run.step) - 1, 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._newest:
            self._run.log(dict(values), step=step)
            self._newest = step

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

    def _id(self, *, resumed: bool) -> str:
        """Returns the id of the run in W&B: the saved one if `resumed`, else a new random one."""
        path = self._run_dir / WANDB_DIR / WANDB_ID_FILE
        if resumed and path.is_file():
            return path.read_text(encoding="utf-8").strip()
        drawn = secrets.token_hex(4)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{drawn}\n", encoding="utf-8")
        return drawn


def _imported(module: str, extra: str) -> Any:
    """Returns the module; raises ConfigError, which names the extra, if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"--{extra} needs the package {extra} ({error}); install it: "
            f"pip install 'gpu-gpt2[{extra}]'"
        ) from error
