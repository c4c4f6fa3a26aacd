"""Training, from a configuration to a checkpoint. `train` has the loop, `Run` what it works on."""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
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
from gpu_gpt2.training.optimizer import AdamW, PendingStep
from gpu_gpt2.training.schedule import warmup_cosine

SAMPLE_TOKENS: Final = 160  # a paragraph: enough to judge the text, short enough to wait for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run: its last checkpoint and step, and whether it was interrupted."""

    checkpoint: Path
    step: int
    interrupted: bool


def train(
    config: TrainConfig, console: Console, resumed: checkpoint.TrainingState | None = None
) -> Outcome:
    """Trains from the start or from a saved state, and leaves a checkpoint in config.run_dir.

    Ctrl-C and SIGTERM end the run after the current step, with a checkpoint. UserErrors say what
    is wrong with the data, the sizes, the device or the disk.
    """
    micro_steps = config.grad_accum_steps
    with Run(config, console, resumed) as run, StopSignal(console) as stop:
        while True:
            # 1. What is due after this many steps: each once, the last step included.
            finished = run.step >= config.steps
            if finished or (run.is_due(config.eval_every) and not stop.requested):
                run.save()
                if finished:
                    stop.release()  # all is saved: from here on Ctrl-C ends the run at once
                run.evaluate()
            if finished or (run.is_due(config.sample_every) and not stop.requested):
                run.sample()
            if finished:
                run.log.finish()
            if finished or stop.requested:
                break

            # 2. The micro-steps, whose gradients add up to those of the whole step.
            for micro_step in range(micro_steps):
                losses = run.model.forward_backward(
                    run.batches.next_batch(),
                    first=micro_step == 0,
                    micro_steps=micro_steps,
                    loss_scale=run.optimizer.loss_scale,
                )

            # 3. The update of the weights.
            lr = run.learning_rate()
            pending = run.optimizer.step(lr, losses, micro_steps=micro_steps)

            # 4. The log. On a GPU all this was only enqueued, and the step before is logged now.
            run.count_step(lr, pending)
        path = run.save()  # after Ctrl-C; a step that is saved already is not saved again
    return Outcome(path, run.step, interrupted=run.step < config.steps)


class Run:
    """A run of training: its configuration, model, optimizer, batches and log.

    `step` is the number of optimizer steps that have been enqueued. As a context manager it keeps
    the log open and the batches coming.
    """

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        resumed: checkpoint.TrainingState | None = None,
    ) -> None:
        self.config = config
        self._console = console
        self._run_dir = Path(config.run_dir)
        sizes = (
            resumed.model
            if resumed
            else model_config(config.model, vocab_size_of(config.tokenizer))
        )
        check_seq_len(config.seq_len, sizes)
        self.data = prepare(config.data, config.tokenizer)
        self._loader = BatchLoader(
            self.data.train,
            config.batch_size,
            config.seq_len,
            scattered=not self.data.shards,
            vocab_size=sizes.vocab_size,
            seed=config.seed,
        )
        if resumed:
            self._loader.restore(resumed.loader)
        device = open_device(config.device, tf32=config.tf32)
        memory = memory_plan(
            sizes, config.dtype, config.batch_size, config.seq_len, config.recompute
        )
        _announce(console, config, self.data, sizes, memory)
        check_fits(memory, device.free_memory, resumed=resumed is not None)
        self.model, self.optimizer = _build(config, sizes, device, resumed)
        self.step = self._first_step = resumed.step if resumed else 0
        self._saved: tuple[int, Path] | None = None  # the step of the newest checkpoint
        # Steps that are enqueued but not logged yet, oldest first: number, learning rate, result.
        self._pending: deque[tuple[int, float, PendingStep]] = deque()
        self._resources = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            _make_run_dir(self._run_dir)
            self.log = stack.enter_context(
                RunLog(
                    self._run_dir,
                    self._console,
                    first_step=self._first_step,
                    steps=self.config.steps,
                )
            )
            self.batches = stack.enter_context(Prefetcher(self._loader))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", RuntimeWarning)  # an overflow: see _read_pending
            self._resources = stack.pop_all()
        self._last_read = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.close()

    def is_due(self, every: int) -> bool:
        """Returns True after each `every` steps of this run; never if `every` is 0."""
        return every > 0 and self.step > self._first_step and self.step % every == 0

    def learning_rate(self) -> float:
        """Returns the learning rate of the next step."""
        config = self.config
        return warmup_cosine(
            self.step,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            final_lr_fraction=config.final_lr_fraction,
        )

    def count_step(self, lr: float, pending: PendingStep) -> None:
        """Counts a step that was enqueued, and logs it or, on a GPU, the step before.

        The GPU has then work to do while Python waits for a result.
        """
        self.step += 1
        self._pending.append((self.step, lr, pending))
        self._read_pending(leave=1 if self.model.ops.device.is_async else 0)

    def save(self) -> Path:
        """Writes a checkpoint, unless this step has one, and returns its folder."""
        if self._saved is None or self._saved[0] != self.step:
            with self._paused("saving"):
                state = self._state()
                if not np.isfinite(state.weights).all():
                    raise self._diverged(f"step {self.step}: a weight is no longer a finite number")
                self._saved = self.step, checkpoint.save(self._run_dir, state, self.data.tokenizer)
        return self._saved[1]

    def evaluate(self) -> None:
        """Logs the loss on the held-out text."""
        config = self.config
        with self._paused("validating"):
            loss = validation_loss(self.model, self.data.val, config.batch_size, config.seq_len)
            if not math.isfinite(loss):
                raise self._diverged(f"step {self.step}: validation loss {loss}")
            bits_per_byte = self.data.val_bits_per_byte(loss)
            self.log.validation(self.step, loss=loss, bits_per_byte=bits_per_byte)

    def sample(self) -> None:
        """Shows a text that the model makes from nothing."""
        tokenizer = self.data.tokenizer
        with self._paused("sampling"):
            start = np.array([tokenizer.eot], np.int32)
            seed = self.config.seed + self.step
            tokens = generate(self.model, start, max_tokens=SAMPLE_TOKENS, seed=seed)
            self.log.sample(self.step, tokenizer.decode(list(tokens)))

    @contextmanager
    def _paused(self, doing: str) -> Iterator[None]:
        """Reads all pending results first; the time spent inside is excluded from step_ms."""
        self._read_pending(leave=0)
        self.log.doing(doing)
        yield
        self.log.doing("")
        self._last_read = time.perf_counter()

    def _read_pending(self, *, leave: int) -> None:
        """Reads, checks and logs the results of all steps but the newest `leave`, in order."""
        while len(self._pending) > leave:
            step, lr, pending = self._pending.popleft()
            result = pending.result()
            if result.diverged:  # there was no update: see Ops.prepare_update
                raise self._diverged(
                    f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
                )
            if not result.updated:
                logger.warning(
                    "step %d: gradient out of range; no update, loss scale now %g",
                    step,
                    result.loss_scale,
                )
            now = time.perf_counter()
            self.log.training(
                step,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm if result.updated else None,
                step_ms=(now - self._last_read) * 1000,
                tokens=self.config.total_batch_tokens,
                skipped="" if result.updated else "gradient out of range",
            )
            self._last_read = now

    def _state(self) -> checkpoint.TrainingState:
        view = self.model.ops.device.download_view  # it is written before training continues
        return checkpoint.TrainingState(
            model=self.model.config,
            train=self.config,
            step=self.step,
            tokens=self.step * self.config.total_batch_tokens,
            loader=self.batches.state(),
            weights=view(self.optimizer.master),
            m=view(self.optimizer.m),
            v=view(self.optimizer.v),
            update=self.optimizer.state(),
        )

    def _diverged(self, what: str) -> TrainingError:
        saved = checkpoint.checkpoints(self._run_dir)
        left = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
        return TrainingError(
            f"{what}: training diverged; {left}; try a lower --lr or a longer --warmup-steps"
        )


class StopSignal:
    """Catches Ctrl-C and SIGTERM: the first sets `requested`, a second one ends at once."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
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
        self._console.print("stopping after this step; Ctrl-C again stops at once, without saving")


def _build(
    config: TrainConfig,
    sizes: ModelConfig,
    device: Device,
    resumed: checkpoint.TrainingState | None,
) -> tuple[GPT2, AdamW]:
    model = GPT2(
        sizes,
        ops_for(device, config.dtype),
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
        same_dtype = resumed.train.dtype == config.dtype
        optimizer.load_state(resumed.update if same_dtype else resumed.update.with_initial_scale())
    else:
        optimizer.load(initial_weights(sizes, config.seed))
    return model, optimizer


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder {run_dir}: {error.strerror}") from error


def _announce(
    console: Console, config: TrainConfig, data: Dataset, sizes: ModelConfig, memory: MemoryPlan
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
