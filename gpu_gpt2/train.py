"""The training loop, in the order time passes."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from gpu_gpt2 import checkpoint, layout, plan
from gpu_gpt2.config import ModelConfig, TrainConfig, model_config
from gpu_gpt2.data.dataset import Dataset, prepare
from gpu_gpt2.data.loader import BatchLoader
from gpu_gpt2.data.prefetch import Prefetcher
from gpu_gpt2.device.select import open_device
from gpu_gpt2.errors import CheckpointError, TrainingError
from gpu_gpt2.evaluate import validation_loss
from gpu_gpt2.generate import generate
from gpu_gpt2.init import initial_weights
from gpu_gpt2.model import GPT2, check_seq_len
from gpu_gpt2.ops.interface import AdamWStep
from gpu_gpt2.ops.select import ops_for
from gpu_gpt2.optimizer import AdamW
from gpu_gpt2.runlog import RunLog
from gpu_gpt2.schedule import warmup_cosine
from gpu_gpt2.tokenizer import vocab_size_of

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
    model, optimizer = _build(config, sizes, resumed)
    step = resumed.step if resumed else 0
    if resumed:
        loader.restore(resumed.loader)
    _make_run_dir(run_dir)
    _announce(console, config, data, sizes)

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
        warnings.simplefilter("ignore", RuntimeWarning)  # overflow: _check_finite says it better
        with _stop_signal(console) as stopping:
            while step < config.steps and not stopping():
                started = time.perf_counter()
                lr = _learning_rate(config, step)
                for micro_step in range(config.grad_accum_steps):
                    batch = batches.next_batch()
                    model.forward_backward(
                        batch.tokens,
                        batch.targets,
                        batch.order,
                        micro_step=micro_step,
                        micro_steps=config.grad_accum_steps,
                    )
                optimizer.step(_hyper(config, step, lr))
                losses = model.ops.device.download(model.acts.losses)
                loss = float(losses.mean(dtype="float64")) / config.grad_accum_steps
                grad_norm = optimizer.grad_norm()
                _check_finite(run_dir, step, loss, grad_norm)
                step += 1
                log.training(
                    step,
                    loss=loss,
                    lr=lr,
                    grad_norm=grad_norm,
                    step_ms=(time.perf_counter() - started) * 1000,
                    tokens=config.total_batch_tokens,
                )
                # What is periodic comes after the step; the end has its own turn below.
                if step < config.steps and not stopping():
                    if config.eval_every and step % config.eval_every == 0:
                        save()
                        evaluate()
                    if config.sample_every and step % config.sample_every == 0:
                        show_sample()
                    log.doing("")
            path = save()
        if step == config.steps:  # from here on Ctrl-C ends at once: all is saved
            evaluate()
            show_sample()
    return Outcome(path, step, interrupted=step < config.steps)


def _build(
    config: TrainConfig, sizes: ModelConfig, resumed: checkpoint.TrainingState | None
) -> tuple[GPT2, AdamW]:
    device = open_device(config.device)
    ops = ops_for(device, config.dtype)
    model = GPT2(
        sizes,
        ops,
        dtype=config.dtype,
        max_batch=config.batch_size,
        max_seq_len=config.seq_len,
        recompute=config.recompute,
    )
    optimizer = AdamW(model)
    if resumed:
        optimizer.load(resumed.weights, resumed.m, resumed.v)
    else:
        optimizer.load(initial_weights(sizes, config.seed))
    return model, optimizer


def _state(
    config: TrainConfig, model: GPT2, optimizer: AdamW, step: int, place: dict[str, Any]
) -> checkpoint.TrainingState:
    download = model.ops.device.download
    return checkpoint.TrainingState(
        model=model.config,
        train=config,
        step=step,
        tokens=step * config.total_batch_tokens,
        loader=place,
        weights=download(optimizer.master),
        m=download(optimizer.m),
        v=download(optimizer.v),
    )


def _hyper(config: TrainConfig, step: int, lr: float) -> AdamWStep:
    return AdamWStep(
        step=step + 1,
        lr=lr,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def _learning_rate(config: TrainConfig, step: int) -> float:
    return warmup_cosine(
        step,
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        steps=config.steps,
        final_lr_fraction=config.final_lr_fraction,
    )


def _check_finite(run_dir: Path, step: int, loss: float, grad_norm: float) -> None:
    # With a gradient that is not finite the update was skipped: see Ops.adamw.
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _diverged(run_dir, f"step {step + 1}: loss {loss}, gradient norm {grad_norm}")


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


def _announce(console: Console, config: TrainConfig, data: Dataset, sizes: ModelConfig) -> None:
    console.print(
        f"GPT-2 {config.model}: {layout.parameter_count(sizes):,} parameters, {config.dtype} on "
        f"{config.device}\n"
        f"{data.name}: {sum(map(len, data.train)):,} tokens to train on, "
        f"{len(data.val):,} held out, "
        f"tokenizer {config.tokenizer}\n"
        f"{config.steps} steps of {config.total_batch_tokens:,} tokens "
        f"({config.grad_accum_steps} x {config.batch_size} x {config.seq_len}) into "
        f"{config.run_dir}",
        highlight=False,
        markup=False,
    )
    console.print(
        plan.table(
            plan.memory_plan(
                sizes, config.dtype, config.batch_size, config.seq_len, config.recompute
            )
        )
    )


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
