"""The training loop, in the order time passes."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from gpu_gpt2.config import ModelConfig, TrainConfig, model_config
from gpu_gpt2.data.dataset import Dataset, prepare
from gpu_gpt2.data.loader import BatchLoader
from gpu_gpt2.data.prefetch import Prefetcher
from gpu_gpt2.device import open_device
from gpu_gpt2.device.base import Device
from gpu_gpt2.errors import CheckpointError, TrainingError
from gpu_gpt2.evaluate import validation_loss
from gpu_gpt2.generate import generate
from gpu_gpt2.models.gpt2 import GPT2, check_seq_len, parameter_count
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tokenizer import vocab_size_of
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.memory import MemoryPlan, check_fits, memory_plan, plan_table
from gpu_gpt2.training.metrics import RunLog
from gpu_gpt2.training.optimizer import FIRST_LOSS_SCALE, AdamW, StepReport
from gpu_gpt2.training.schedule import warmup_cosine
from gpu_gpt2.training.step import TrainingStep

SAMPLE_TOKENS: Final = 160


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    checkpoint: Path
    step: int
    interrupted: bool


def train(
    config: TrainConfig, console: Console, resumed: checkpoint.TrainingState | None = None
) -> Outcome:
    """Trains from the start, or on from a saved state, and leaves a checkpoint in config.run_dir.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint. UserErrors say what
    is wrong with the data, the sizes, the device or the disk.
    """
    run_dir = Path(config.run_dir)
    sizes = (
        resumed.model if resumed else model_config(config.model, vocab_size_of(config.tokenizer))
    )
    check_seq_len(config.seq_len, sizes)
    data = prepare(config.data, config.tokenizer)
    loader = BatchLoader(
        data.train,
        config.batch_size,
        config.seq_len,
        scattered=not data.shards,
        vocab_size=sizes.vocab_size,
        seed=config.seed,
    )
    step = resumed.step if resumed else 0
    if resumed:
        loader.restore(resumed.loader)
    device = open_device(config.device, tf32=config.tf32)
    memory = memory_plan(sizes, config.dtype, config.batch_size, config.seq_len, config.recompute)
    _announce(console, config, data, sizes, memory)
    check_fits(memory, device.free_memory, resumed=resumed is not None)
    model, optimizer = _build(config, sizes, device, resumed)
    _make_run_dir(run_dir)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def save() -> Path:
        log.doing("saving")
        state = _state(config, model, optimizer, step, batches.state())
        _check_weights(state)
        return checkpoint.save(run_dir, state, data.tokenizer)

    def evaluate() -> None:
        log.doing("validating")
        loss = validation_loss(model, data.val, config.batch_size, config.seq_len)
        if not math.isfinite(loss):
            raise _diverged(run_dir, f"step {step}: validation loss {loss}")
        log.validation(step, loss=loss, bits_per_byte=data.val_bits_per_byte(loss))

    def show_sample() -> None:
        log.doing("sampling")
        start = np.array([data.tokenizer.eot], np.int32)
        tokens = generate(model, start, max_tokens=SAMPLE_TOKENS, seed=config.seed + step)
        log.sample(data.tokenizer.decode(list(tokens)))

    with (
        RunLog(run_dir, console, first_step=step, steps=config.steps) as log,
        Prefetcher(loader) as batches,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow: _Reports says it better
        take_step = TrainingStep(model, optimizer, micro_steps=config.grad_accum_steps, say=say)
        reports = _Reports(config, log, say, ahead=1 if model.ops.device.runs_ahead else 0)
        with _stop_signal(console) as stopping:
            while step < config.steps and not stopping():
                lr = _learning_rate(config, step)
                report = take_step(batches.next_batch, lr)
                step += 1
                reports.add(step, lr, report)
                # What is periodic comes after the step; the end has its own turn below.
                if step < config.steps and not stopping():
                    if config.eval_every and step % config.eval_every == 0:
                        with reports.paused():
                            save()
                            evaluate()
                    if config.sample_every and step % config.sample_every == 0:
                        with reports.paused():
                            show_sample()
                    log.doing("")
            with reports.paused():
                path = save()
        if step == config.steps:  # from here on Ctrl-C ends at once: all is saved
            evaluate()
            show_sample()
    return Outcome(path, step, interrupted=step < config.steps)


class _Reports:
    """Reads, checks and logs what steps report, in order.

    The newest `ahead` reports are left for later, so that the host has enqueued the next step
    before it waits for the last one.
    """

    def __init__(
        self, config: TrainConfig, log: RunLog, say: Callable[[str], None], *, ahead: int
    ) -> None:
        self._config, self._log, self._say, self._ahead = config, log, say, ahead
        self._waiting: deque[tuple[int, float, Callable[[], StepReport]]] = deque()
        self._last_read = time.perf_counter()

    def add(self, step: int, lr: float, report: Callable[[], StepReport]) -> None:
        """Takes the report of a step, and reads those whose time has come."""
        self._waiting.append((step, lr, report))
        self._read(leave=self._ahead)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, all steps have been read; its time counts for none of them."""
        self._read(leave=0)
        yield
        self._last_read = time.perf_counter()

    def _read(self, *, leave: int) -> None:
        while len(self._waiting) > leave:
            step, lr, read = self._waiting.popleft()
            report = read()
            if report.diverged:  # the update was left out: see Ops.prepare_update
                what = f"step {step}: loss {report.loss}, gradient norm {report.grad_norm}"
                raise _diverged(Path(self._config.run_dir), what)
            if not report.updated:
                scale = f"{report.loss_scale:g}"
                self._say(f"step {step}: gradient out of range; no update, loss scale now {scale}")
            now = time.perf_counter()
            self._log.training(
                step,
                loss=report.loss,
                lr=lr,
                grad_norm=report.grad_norm if report.updated else None,
                step_ms=(now - self._last_read) * 1000,
                tokens=self._config.total_batch_tokens,
            )
            self._last_read = now


def _build(
    config: TrainConfig,
    sizes: ModelConfig,
    device: Device,
    resumed: checkpoint.TrainingState | None,
) -> tuple[GPT2, AdamW]:
    ops = ops_for(device, config.dtype)
    model = GPT2(
        sizes,
        ops,
        dtype=config.dtype,
        max_batch=config.batch_size,
        max_seq_len=config.seq_len,
        recompute=config.recompute,
    )
    optimizer = AdamW(
        model,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    if resumed:
        optimizer.load(resumed.weights, resumed.m, resumed.v)
        counts = resumed.counts
        if resumed.train.dtype != config.dtype:
            counts = replace(counts, in_a_row=0, loss_scale=FIRST_LOSS_SCALE)
        optimizer.load_counts(counts)
    else:
        optimizer.load(initial_weights(sizes, config.seed))
    return model, optimizer


def _state(
    config: TrainConfig, model: GPT2, optimizer: AdamW, step: int, place: dict[str, Any]
) -> checkpoint.TrainingState:
    view = model.ops.device.host_view  # it is written before training goes on
    return checkpoint.TrainingState(
        model=model.config,
        train=config,
        step=step,
        tokens=step * config.total_batch_tokens,
        loader=place,
        weights=view(optimizer.master),
        m=view(optimizer.m),
        v=view(optimizer.v),
        counts=optimizer.counts(),
    )


def _learning_rate(config: TrainConfig, step: int) -> float:
    return warmup_cosine(
        step,
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        final_lr_fraction=config.final_lr_fraction,
    )


def _check_weights(state: checkpoint.TrainingState) -> None:
    if not np.isfinite(state.weights).all():
        run_dir = Path(state.train.run_dir)
        raise _diverged(run_dir, f"step {state.step}: a weight is no longer a finite number")


def _diverged(run_dir: Path, what: str) -> TrainingError:
    saved = checkpoint.checkpoints(run_dir)
    left = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
    return TrainingError(
        f"{what}: training diverged; {left}; try a lower --lr or a longer --warmup-steps"
    )


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder {run_dir}: {error.strerror}") from error


def _announce(
    console: Console,
    config: TrainConfig,
    data: Dataset,
    sizes: ModelConfig,
    memory: MemoryPlan,
) -> None:
    console.print(
        f"GPT-2 {config.model}: {parameter_count(sizes):,} parameters, {config.dtype} on "
        f"{config.device}\n"
        f"{data.name}: {sum(map(len, data.train)):,} tokens to train on, "
        f"{len(data.val):,} held out, "
        f"tokenizer {config.tokenizer}\n"
        f"{config.steps} steps of {config.total_batch_tokens:,} tokens "
        f"({config.grad_accum_steps} x {config.batch_size} x {config.seq_len}, "
        f"recompute level {config.recompute}) into "
        f"{config.run_dir}",
        highlight=False,
        markup=False,
    )
    console.print(plan_table(memory))


@contextmanager
def _stop_signal(console: Console) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came; a second one ends at once."""
    came = False

    def handle(number: int, frame: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        console.print("stopping after this step; Ctrl-C again stops at once, without saving")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
