"""The time that a run takes beside its computation: batches, the log, and everything around them.

Steps of a real run alternate with bare ones, which only compute, so that both see the same machine.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from gpu_gpt2.config import GPT2_VOCAB_SIZE, TrainConfig, defaults_for
from gpu_gpt2.formats.tokens import write_tokens
from gpu_gpt2.run import Run
from gpu_gpt2.tools.bench.step import Size
from gpu_gpt2.training.stop_signal import StopSignal

WARM_UP: Final = 2  # untimed steps of each kind: the memory is touched, and graphs are captured


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds of a step: medians over steps that alternate."""

    bare_ms: float  # forward and backward pass and update alone
    run_ms: float  # the same as a step of a run, with batches and all logs
    around_ms: float  # the part of run_ms outside of it; on a GPU it includes waiting for results


def measure(device: str, dtype: str, size: Size, steps: int) -> Overhead:
    """Times `steps` steps of each kind, with TensorBoard and both outlier detectors turned on.

    Raises UserError if the model does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(
            0, GPT2_VOCAB_SIZE, 50 * size.batch_size * size.seq_len
        )
        write_tokens(Path(folder, "x_train.bin"), tokens)
        config = TrainConfig(
            **{
                **defaults_for(device),
                "data": folder,
                "model": size.model,
                "tokenizer": "gpt2",
                "batch_size": size.batch_size,
                "seq_len": size.seq_len,
                "total_batch_tokens": size.batch_size * size.seq_len,
                "steps": 2 * (steps + WARM_UP),
                "max_loss_zscore": 100.0,
                "max_grad_zscore": 100.0,
                "tensorboard": True,
                "run_dir": str(Path(folder, "run")),
            },
            device=device,
            dtype=dtype,
        )
        console = Console(file=io.StringIO())
        with StopSignal(console) as stop, Run(config, console, None, stop) as run:
            times = [_pair(run) for _ in range(steps + WARM_UP)][WARM_UP:]
    bare, whole, around = (statistics.median(column) for column in zip(*times, strict=True))
    return Overhead(bare_ms=bare, run_ms=whole, around_ms=around)


def _pair(run: Run) -> tuple[float, float, float]:
    """Returns the milliseconds of a bare step, of a step of the run, and of its surroundings."""
    batch = run.next_batch()
    lr = run.learning_rate()
    started = time.perf_counter()
    losses = run.model.forward_backward(batch, loss_scale=run.optimizer.loss_scale)
    run.optimizer.step(lr, losses).result()
    bare = time.perf_counter() - started

    started = time.perf_counter()
    batch = run.next_batch()
    lr = run.learning_rate()
    computing = time.perf_counter()
    losses = run.model.forward_backward(batch, loss_scale=run.optimizer.loss_scale)
    pending = run.optimizer.step(lr, losses)
    computed = time.perf_counter()
    run.count_step(lr, pending)
    ended = time.perf_counter()
    around = (computing - started) + (ended - computed)
    return bare * 1000, (ended - started) * 1000, around * 1000
