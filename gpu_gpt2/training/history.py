"""Reads metrics.jsonl of a run into arrays, and computes moving averages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError

METRICS_FILE: Final = "metrics.jsonl"  # in the run folder; RunLog describes its records

GROWTH: Final = 0.125  # growth of the moving average's window per value, from one value on

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class History:
    """The numbers that a run has logged, as arrays in the order of the steps.

    There are n training steps and m validations. The first training step has number 1.
    """

    steps: IntArray  # (n,), increasing
    loss: FloatArray  # (n,) in nats per token
    lr: FloatArray  # (n,)
    grad_norm: FloatArray  # (n,) before clipping; NaN where the norm is not finite
    tokens_per_s: FloatArray  # (n,)
    skipped: npt.NDArray[np.bool_]  # (n,): True where the weights were not updated
    val_steps: IntArray  # (m,), increasing
    val_loss: FloatArray  # (m,) in nats per token


def read_history(run_dir: Path) -> History:
    """Returns the log of the run in `run_dir`.

    An incomplete last line is ignored: a run may be writing it, or a crash has cut it off. Raises
    DataError if there is no log, no training step in it, or a damaged line.
    """
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; give the folder of a training run"
        ) from error
    training: list[tuple[float, ...]] = []
    validations: list[tuple[float, ...]] = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if "loss" in record:
                training.append(_training(record))
            elif "val_loss" in record:
                validations.append((_step(record), float(record["val_loss"])))
            else:
                _step(record)
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}: line {number} is damaged: {line.strip()[:40]!r}; delete this line"
            ) from None
    if not training:
        raise DataError(f"{path} holds no training step yet; wait for the first one")
    steps, loss, lr, grad_norm, tokens_per_s, skipped = np.array(training, np.float64).T
    val_steps, val_loss = np.array(validations, np.float64).reshape(-1, 2).T
    for name, values in (("training step", steps), ("validation of step", val_steps)):
        if (wrong := np.flatnonzero(np.diff(values) <= 0)).size:
            before, after = values[wrong[0]], values[wrong[0] + 1]
            raise DataError(
                f"{path}: {name} {after:.0f} comes after {before:.0f}; delete the older of the "
                f"records that are there twice"
            )
    return History(
        steps.astype(np.int64),
        loss,
        lr,
        grad_norm,
        tokens_per_s,
        skipped != 0,
        val_steps.astype(np.int64),
        val_loss,
    )


def smoothed(values: FloatArray, window: float) -> FloatArray:
    """Returns the exponential moving average of values (n,) over about `window` values.

    The sum is divided by the sum of its weights, so that the first averages are not biased towards
    zero. The window starts at one value and grows by GROWTH per value, because an average over many
    values would lag behind the steep start of a loss. Values that are not finite are ignored.
    """
    result = np.full(len(values), np.nan)
    total = weight = 0.0
    for i, value in enumerate(values.tolist()):
        decay = 1 - 1 / min(window, 1 + GROWTH * i)
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        if weight:
            result[i] = total / weight
    return result


def _training(record: dict[str, Any]) -> tuple[float, ...]:
    norm = record["grad_norm"]
    return (
        _step(record),
        _number(record["loss"]),
        float(record["lr"]),
        _number(norm),
        float(record["tokens_per_s"]),
        float(norm is None or bool(record.get("skipped"))),
    )


def _number(value: float | None) -> float:
    """Returns a number of the log as a float; null, which stands for not finite, as NaN."""
    return float("nan") if value is None else float(value)


def _step(record: dict[str, Any]) -> int:
    step = record["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}")
    return step
