"""One training step, enqueued as a whole: what repeats goes to the device as graphs."""

from __future__ import annotations

from collections.abc import Callable

from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.gpt2 import GPT2
from gpu_gpt2.training.optimizer import AdamW, StepReport


class TrainingStep:
    """The step of a model whose gradients add up over `micro_steps` batches of one size.

    Three pieces of work repeat: the first micro-step, which overwrites gradients, the others, which
    add to them, and the update. `say` hears of it if the device cannot make graphs of them.
    """

    def __init__(
        self, model: GPT2, optimizer: AdamW, *, micro_steps: int, say: Callable[[str], None]
    ) -> None:
        def first() -> None:
            model.micro_step(first=True, micro_steps=micro_steps)

        def another() -> None:
            model.micro_step(first=False, micro_steps=micro_steps)

        def update() -> None:
            optimizer.update(micro_steps=micro_steps)

        self._model, self._optimizer, self._micro_steps = model, optimizer, micro_steps
        graph = model.ops.device.graph
        self._first, self._another, self._update = (
            graph(work, say) for work in (first, another, update)
        )

    def __call__(self, next_batch: Callable[[], Batch], lr: float) -> Callable[[], StepReport]:
        """Enqueues a step on the next batches; the result waits until the device has done it."""
        for micro_step in range(self._micro_steps):
            batch = next_batch()
            self._model.upload(batch.tokens, batch.targets, batch.order)
            (self._another if micro_step else self._first)()
        self._optimizer.set_lr(lr)
        self._update()
        return self._optimizer.report()
