"""The training loop, which turns a configuration into a trained checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.run import Run
from gpu_gpt2.training.checkpoint import TrainingState
from gpu_gpt2.training.stop_signal import StopSignal


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run: its last checkpoint and step, and whether it was interrupted."""

    checkpoint: Path
    step: int
    interrupted: bool


def train(config: TrainConfig, console: Console, resumed: TrainingState | None = None) -> Outcome:
    """Trains from the start or from a saved state, and saves checkpoints in config.run_dir.

    Ctrl-C, SIGTERM and SIGHUP end the run after the current step, with a checkpoint. Raises
    UserError if something is wrong with the data, the sizes, the device or the disk.
    """
    micro_steps = config.grad_accum_steps
    with StopSignal(console) as stop, Run(config, console, resumed, stop) as run:
        while True:
            # 1. Checkpoint, validation, HellaSwag and sample, each if it is due. The checkpoint
            # comes first, so that an error in the others cannot lose the steps done so far.
            if run.finished or run.is_due(config.save_every):
                run.save()
            run.validate()
            run.answer_hellaswag()
            run.sample()
            if run.finished or stop.requested:
                break

            # 2. The micro-steps. Their gradients add up to the gradient of the step.
            for micro_step in range(micro_steps):
                losses = run.model.forward_backward(
                    run.next_batch(),
                    first=micro_step == 0,
                    micro_steps=micro_steps,
                    loss_scale=run.optimizer.loss_scale,
                )

            # 3. The update of the weights.
            lr = run.learning_rate()
            pending = run.optimizer.step(lr, losses, micro_steps=micro_steps)

            # 4. The log. A GPU has only enqueued this step, so the step before is logged now.
            run.count_step(lr, pending)
        path = run.save()  # does nothing unless Ctrl-C ended the run between two checkpoints
        run.finish()
    return Outcome(path, run.step, interrupted=stop.requested and not run.complete)
