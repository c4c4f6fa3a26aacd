"""A training run: the model, optimizer, batches, log and checkpoints that train.py works on."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from rich.console import Console

from gpu_gpt2 import parts
from gpu_gpt2.config import TrainConfig
from gpu_gpt2.data.dataset import of_run
from gpu_gpt2.data.prefetch import Prefetcher
from gpu_gpt2.device import open_device
from gpu_gpt2.errors import TrainingError
from gpu_gpt2.evaluate import hellaswag_accuracy, validation_loss
from gpu_gpt2.generate import generate
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.model import check_seq_len
from gpu_gpt2.plot import PLOT_FILE, plot_runs
from gpu_gpt2.summary import run_summary
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.memory import check_fits, memory_plan, plan_table
from gpu_gpt2.training.metrics import RunLog
from gpu_gpt2.training.optimizer import PendingStep, StepResult
from gpu_gpt2.training.saver import CheckpointSaver
from gpu_gpt2.training.schedule import learning_rate
from gpu_gpt2.training.stop_signal import StopSignal
from gpu_gpt2.training.trace import first_bad_tensor

MAX_SKIPS: Final = 20  # steps in a row without an update that --on-nan skip allows
MAX_ROLLBACKS: Final = 3  # rollbacks that --on-nan rollback allows without a new checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnqueuedStep:
    """A step that has been enqueued on the device but not logged yet."""

    number: int
    lr: float
    pending: PendingStep
    batches: list[Batch]  # micro-batches of the step, to repeat it if a number is not finite


class Run:
    """The configuration, model, optimizer, batches, log and checkpoints of a run.

    `step` is the number of optimizer steps that have been enqueued. The log, the saver of
    checkpoints and the thread that reads batches are open inside a `with`.
    """

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        resumed: checkpoint.TrainingState | None,
        stop: StopSignal,
    ) -> None:
        self.config = config
        self._console = console
        self._stop = stop
        self._run_dir = Path(config.run_dir)
        sizes = resumed.model if resumed else parts.source_of_weights(config).config
        check_seq_len(config.seq_len, sizes)
        self.data = of_run(config)
        self._examples = parts.hellaswag_examples(config, sizes)
        self._loader = parts.batch_loader(config, self.data, sizes)
        if resumed:
            self._loader.restore(resumed.loader)
        device = open_device(config.device, tf32=config.tf32)
        memory = memory_plan(
            sizes,
            config.dtype,
            config.batch_size,
            config.seq_len,
            config.recompute,
            optimizer=config.optimizer,
            host_copies=not device.is_gpu,
        )
        console.print(
            run_summary(config, sizes, self.data), highlight=False, markup=False, soft_wrap=True
        )
        console.print(plan_table(memory))
        check_fits(memory, device.free_memory, resumed=resumed is not None)
        self.model, self.optimizer = parts.model_and_optimizer(config, sizes, device)
        if resumed:
            self._load(resumed)
        else:
            self.optimizer.load(parts.initial_weights(config))
        # The KV cache of samples; it is allocated once, like all other memory of a run.
        self._decoder = Decoder(self.model, batch=1, length=config.seq_len)
        self.step = self._first_step = resumed.step if resumed else 0
        self._saved: tuple[int, Path] | None = None  # step and folder of the newest checkpoint
        if resumed:
            self._saved = resumed.step, checkpoint.folder_of(self._run_dir, resumed.step)
        self._sampled = self._first_step  # the step of the newest sample
        self._step_batches: list[Batch] = []  # micro-batches of the step that is being enqueued
        self._enqueued: deque[EnqueuedStep] = deque()  # oldest first
        self._skips = 0  # steps in a row that were not finite
        self._rollbacks = 0  # since the newest checkpoint was saved
        self._resources = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            parts.make_run_dir(self._run_dir)
            self.log = stack.enter_context(
                RunLog(
                    self._run_dir,
                    self._console,
                    first_step=self._first_step,
                    steps=self.config.steps,
                    sinks=parts.sinks(self._run_dir, self.config),
                )
            )
            parts.write_settings(self._run_dir, self.config)
            aside = checkpoint.set_aside(self._run_dir, self._first_step)
            if aside:
                self._console.print(
                    f"moved later checkpoints to {aside[0].parent}: {len(aside)}", soft_wrap=True
                )
            self._saver = stack.enter_context(
                CheckpointSaver(
                    self._run_dir,
                    self.model.ops.device,
                    [array.size for array in self.optimizer.saved_arrays],
                    self.data.tokenizer,
                )
            )
            self._batches = stack.enter_context(Prefetcher(self._loader))
            stack.enter_context(warnings.catch_warnings())
            # NumPy warns of overflows, which the log of the step reports already.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._resources = stack.pop_all()
        self._last_read = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    @property
    def finished(self) -> bool:
        """True after the last step."""
        return self.step >= self.config.steps

    @property
    def complete(self) -> bool:
        """True when the last step, its validation and its HellaSwag score, if any, are logged."""
        validated = self.finished and self.log.has("val_loss", self.step)
        return validated and (not self._examples or self.log.has("hellaswag_acc_norm", self.step))

    def is_due(self, every: int) -> bool:
        """Returns True after every `every` steps, but not before the first; 0 means never."""
        return every > 0 and self.step > 0 and self.step % every == 0

    def next_batch(self) -> Batch:
        """Returns the next micro-batch of the step."""
        batch = self._batches.next_batch()
        self._step_batches.append(batch)
        return batch

    def learning_rate(self) -> float:
        """Returns the learning rate of the next step."""
        return learning_rate(self.step, self.config)

    def count_step(self, lr: float, pending: PendingStep) -> None:
        """Counts a step that was enqueued, and logs it or, on a GPU, the step before.

        The GPU then computes this step while Python waits for the result of the step before.
        """
        self.step += 1
        self._enqueued.append(EnqueuedStep(self.step, lr, pending, self._step_batches))
        self._step_batches = []
        self._saver.check()
        self._read_enqueued(leave=1 if self.model.ops.device.is_async else 0)

    def save(self) -> Path:
        """Starts to save a checkpoint, unless this step has one, and returns its folder.

        Training waits only until the weights and moments are copied; a thread writes the files.
        """
        if self._saved is None or self._saved[0] != self.step:
            with self._paused("saving"):
                if self._saved is None or self._saved[0] != self.step:  # not after a rollback
                    self._start_saving()
        assert self._saved is not None
        return self._saved[1]

    def validate(self) -> None:
        """Logs the loss on the validation text if it is due and was not recorded yet.

        So a validation that a crash prevented takes place when the run is resumed. A signal to stop
        breaks the validation off, without a record.
        """
        if not self._validation_due():
            return
        with self._paused("validating"):
            loss = self._validation_loss() if self._validation_due() else None
            if loss is None:
                return
            if not math.isfinite(loss):
                raise self._diverged(f"step {self.step}: validation loss {loss}")
            self.log.validation(
                self.step, loss=loss, bits_per_byte=self.data.val_bits_per_byte(loss)
            )
        best = self.log.best
        if self.config.keep_best and best and best[0] == self.step > 0:
            self.save()

    def _validation_due(self) -> bool:
        before_training = self.step == 0 and self.config.eval_every > 0
        due = self.finished or before_training or self.is_due(self.config.eval_every)
        return due and not self._stop.requested and not self.log.has("val_loss", self.step)

    def _validation_loss(self) -> float | None:
        total = len(self.data.val) - 1
        return validation_loss(
            self.model,
            self.data.val,
            self.config.batch_size,
            self.config.seq_len,
            advance=lambda done: self.log.doing("validating", done, total, unit="tokens"),
            stop=lambda: self._stop.requested,
        )

    def answer_hellaswag(self) -> None:
        """Logs the accuracy on HellaSwag if it is due and was not recorded yet."""
        if not self._hellaswag_due():
            return
        with self._paused("HellaSwag"):
            if not self._hellaswag_due():
                return
            total = len(self._examples)
            answered = hellaswag_accuracy(
                self.model,
                self._examples,
                advance=lambda done: self.log.doing("HellaSwag", done, total, unit="examples"),
                stop=lambda: self._stop.requested,
            )
            if answered is not None:
                correct, count = answered
                self.log.hellaswag(self.step, correct=correct, count=count)

    def _hellaswag_due(self) -> bool:
        due = self.finished or self.is_due(self.config.hellaswag_every)
        recorded = self.log.has("hellaswag_acc_norm", self.step)
        return bool(self._examples) and due and not self._stop.requested and not recorded

    def sample(self) -> None:
        """Prints a text that the model generates from the prompt, if a sample is due.

        A signal to stop breaks it off, and nothing is printed.
        """
        if not self._sample_due():
            return
        config, tokenizer = self.config, self.data.tokenizer
        with self._paused("sampling"):
            if not self._sample_due():
                return
            prompt = tokenizer.encode(config.sample_prompt)
            prompt = np.concatenate([np.array([tokenizer.eot], np.int32), prompt])
            drawn = generate(
                self._decoder,
                [prompt[-self._decoder.length :]],
                max_tokens=config.sample_tokens,
                sampling=Sampling(seed=config.seed + self.step),
            )
            tokens = []
            for (token,) in drawn:
                if self._stop.requested:
                    return
                if token is not None:
                    tokens.append(token)
            self.log.sample(self.step, config.sample_prompt + tokenizer.decode(tokens))
            self._sampled = self.step

    def _sample_due(self) -> bool:
        due = self.finished or self.is_due(self.config.sample_every)
        wanted = self.config.sample_tokens > 0 and not self._stop.requested
        return due and wanted and self._sampled != self.step

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk, and prints the loss curve of the run."""
        self._saver.wait()
        self._stop.release()  # everything is saved, so Ctrl-C may now end the program at once
        if self.finished:
            self.log.finish()
            if self.config.plot:
                plot_runs([self._run_dir], self._run_dir / PLOT_FILE)

    @contextmanager
    def _paused(self, doing: str) -> Iterator[None]:
        """Reads all enqueued steps first; the time spent inside is excluded from step_ms."""
        self._read_enqueued(leave=0)
        self.log.doing(doing)
        yield
        self.log.doing("")
        self._last_read = time.perf_counter()

    def _read_enqueued(self, *, leave: int) -> None:
        """Reads, checks and logs the results of all steps but the newest `leave`, in order."""
        while len(self._enqueued) > leave:
            enqueued = self._enqueued.popleft()
            result = enqueued.pending.result()
            if result.diverged and self._handle_divergence(enqueued, result):
                return
            self._log_step(enqueued, result)

    def _log_step(self, enqueued: EnqueuedStep, result: StepResult) -> None:
        if not result.diverged:
            self._skips = 0
        if not (result.updated or result.diverged):
            logger.warning("step %d: %s", enqueued.number, _why_no_update(result))
        now = time.perf_counter()
        self.log.training(
            enqueued.number,
            loss=result.loss,
            lr=enqueued.lr,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            step_ms=(now - self._last_read) * 1000,
            tokens=self.config.total_batch_tokens,
            skipped=result.skipped,
        )
        self._last_read = now

    def _handle_divergence(self, enqueued: EnqueuedStep, result: StepResult) -> bool:
        """Reacts to a step that is not finite as --on-nan says.

        The device made no update, so the step can be repeated op by op to find its cause. Returns
        True after a rollback. Raises TrainingError if the run has to stop.
        """
        what = f"step {enqueued.number}: loss {result.loss}, gradient norm {result.grad_norm}"
        if not self._skips:  # the first of several in a row
            started = time.perf_counter()
            bad = first_bad_tensor(
                self.model,
                enqueued.batches,
                micro_steps=self.config.grad_accum_steps,
                loss_scale=result.scaled_by,
            )
            self._last_read += time.perf_counter() - started  # step_ms excludes the search
            what += f"; {bad}" if bad else ""
        if self.config.on_nan == "skip" and self._skips < MAX_SKIPS:
            self._skips += 1
            logger.warning("%s; no update", what)
            return False
        if self.config.on_nan == "rollback" and self._rollbacks < MAX_ROLLBACKS:
            self._saver.wait()
            if saved := checkpoint.checkpoints(self._run_dir):
                self._roll_back(what, saved[-1])
                return True
        raise self._diverged(what)

    def _roll_back(self, what: str, folder: Path) -> None:
        """Returns to a checkpoint, and continues with the data that comes next."""
        state = checkpoint.load(folder)
        self._load(state)
        self._enqueued.clear()  # the results of these steps are no longer needed
        self._rollbacks += 1
        self.step = state.step
        self._saved = state.step, folder
        self._sampled = min(self._sampled, state.step)
        self.log.rewind(state.step)
        self._last_read = time.perf_counter()
        logger.warning(
            "%s: rolled back to %s; training continues with the data that comes next",
            what,
            folder.name,
        )

    def _load(self, state: checkpoint.TrainingState) -> None:
        self.optimizer.load(state.weights, state.m, state.v)
        same_dtype = state.train.dtype == self.config.dtype
        self.optimizer.load_state(state.update if same_dtype else state.update.with_initial_scale())

    def _start_saving(self) -> None:
        optimizer = self.optimizer
        weights, m, v = self._saver.host_copies(*optimizer.saved_arrays)
        if not np.isfinite(weights).all():
            raise self._diverged(f"step {self.step}: a weight is no longer a finite number")
        state = checkpoint.TrainingState(
            model=self.model.config,
            train=self.config,
            step=self.step,
            tokens=self.step * self.config.total_batch_tokens,
            loader=self._batches.state(),
            weights=weights,
            m=m,
            v=v,
            update=optimizer.state(),
        )
        best = self.log.best if self.config.keep_best else None
        retention = checkpoint.Retention(
            last=self.config.keep_last,
            every=self.config.keep_every,
            best=best[0] if best else None,
        )
        self._saved = self.step, self._saver.start(state, retention)
        self._rollbacks = 0

    def _diverged(self, what: str) -> TrainingError:
        self._saver.wait()
        saved = checkpoint.checkpoints(self._run_dir)
        left = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
        return TrainingError(
            f"{what}: training diverged; {left}; try a lower --lr or a longer --warmup-steps"
        )


def _why_no_update(result: StepResult) -> str:
    if result.skipped == "loss spike":
        return f"loss {result.loss:.4f} is {_deviations(result.loss_zscore)}; no update"
    if result.skipped == "gradient spike":
        height = _deviations(result.grad_zscore)
        return f"gradient norm {result.grad_norm:.3g} is {height}; no update"
    return f"gradient out of range; no update, loss scale now {result.loss_scale:g}"


def _deviations(zscore: float) -> str:
    return f"{zscore:.1f} standard deviations above the mean"
