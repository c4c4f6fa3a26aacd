"""AdamW with gradient clipping and loss scaling over the whole parameter arena at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import FLOAT16, FLOAT32, Array
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.gpt2 import GPT2, decayed_count, parameter_count
from gpu_gpt2.ops.table import MIN_LOSS_SCALE, AdamWSettings

FIRST_LOSS_SCALE: Final = 2.0**16  # of float16, whose largest number is just below it
MAX_LOSS_SCALE: Final = 2.0**24


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCounts:
    """What decides the next update besides weights, moments and gradient: part of a checkpoint."""

    updates: int  # made so far; a gradient that is not finite makes none
    in_a_row: int  # of these, since the loss scale last changed
    loss_scale: float

    def __post_init__(self) -> None:
        numbers = (self.updates, self.in_a_row, self.loss_scale)
        whole = all(type(number) is int and number >= 0 for number in numbers[:2])
        if not whole or not MIN_LOSS_SCALE <= self.loss_scale <= MAX_LOSS_SCALE:
            raise ConfigError(
                f"updates, in_a_row and loss_scale must be two counts and {MIN_LOSS_SCALE:g} to "
                f"{MAX_LOSS_SCALE:g}, not {', '.join(map(repr, numbers))}"
            )


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step tells people; a norm that is not finite means that there was no update."""

    loss: float  # mean over the tokens of the step, in nats
    grad_norm: float  # before clipping, without the loss scale
    loss_scale: float  # of the next step

    @property
    def updated(self) -> bool:
        return math.isfinite(self.grad_norm)

    @property
    def diverged(self) -> bool:
        """Whether something is not finite that no smaller loss scale can mend."""
        at_the_bottom = self.loss_scale <= MIN_LOSS_SCALE
        return not math.isfinite(self.loss) or (not self.updated and at_the_bottom)


class AdamW:
    """Moments and float32 master weights of a model, on its device.

    `m`, `v` and `master` are (n,) float32 arenas in the order of parameters; with float32
    weights, `master` is the model's own arena. With float16 weights the loss is scaled.
    """

    def __init__(
        self,
        model: GPT2,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.model = model
        self.settings = AdamWSettings(
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            max_loss_scale=MAX_LOSS_SCALE if model.dtype == FLOAT16 else MIN_LOSS_SCALE,
        )
        device = model.ops.device
        n = parameter_count(model.config)
        self.m = device.zeros((n,), FLOAT32)
        self.v = device.zeros((n,), FLOAT32)
        if model.dtype == FLOAT32:
            self.master: Array = model.param_arena
        else:
            self.master = device.zeros((n,), FLOAT32)
        self.decayed = decayed_count(model.config)
        self._grad_sq = device.zeros((1,), FLOAT32)
        self._lr = device.zeros((1,), FLOAT32)
        self._factors = device.zeros((5,), FLOAT32)
        self._report = device.zeros((3,), FLOAT32)
        self._counts = device.zeros((2,), FLOAT32)
        self._feed_lr = device.feeder(self._lr)
        self.load_counts(UpdateCounts(updates=0, in_a_row=0, loss_scale=FIRST_LOSS_SCALE))

    def load(
        self,
        weights: npt.NDArray[np.float32],
        m: npt.NDArray[np.float32] | None = None,
        v: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Sets master weights, and the model's with them, from host arenas (n,) float32."""
        device = self.model.ops.device
        device.upload(self.master, weights)
        if self.master is not self.model.param_arena:
            self.model.ops.cast(self.model.param_arena, self.master)
        if m is not None and v is not None:
            device.upload(self.m, m)
            device.upload(self.v, v)
        device.synchronize()  # the host arrays are no longer needed

    def load_counts(self, counts: UpdateCounts) -> None:
        """Goes on from these counts; without loss scaling the scale is 1 whatever they say."""
        device = self.model.ops.device
        scale = min(counts.loss_scale, self.settings.max_loss_scale)
        device.upload(self.model.loss_scale, np.array([scale], np.float32))
        device.upload(self._counts, np.array([counts.updates, counts.in_a_row], np.float32))

    def counts(self) -> UpdateCounts:
        """The counts after the last update; waits for the device."""
        device = self.model.ops.device
        updates, in_a_row = device.download(self._counts)
        scale = device.download(self.model.loss_scale)
        return UpdateCounts(
            updates=int(updates), in_a_row=int(in_a_row), loss_scale=float(scale[0])
        )

    def step(self, lr: float, *, micro_steps: int = 1) -> None:
        """Updates the model's weights from the gradients of `micro_steps` micro-steps."""
        self.set_lr(lr)
        self.update(micro_steps=micro_steps)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the updates from now on."""
        self._feed_lr(np.array([lr], np.float32))

    def update(self, *, micro_steps: int) -> None:
        """`step` with the learning rate that is set: work of the device alone."""
        model, ops = self.model, self.model.ops
        losses = model.acts.losses
        ops.squared_norm(self._grad_sq, model.grad_arena)
        ops.prepare_update(
            self._factors,
            self._report,
            model.loss_scale,
            self._counts,
            losses,
            self._grad_sq,
            self._lr,
            1.0 / (losses.size * micro_steps),
            self.settings,
        )
        ops.adamw(
            self.master,
            self.m,
            self.v,
            model.param_arena,
            model.grad_arena,
            self._factors,
            self.decayed,
            self.settings,
        )

    def report(self) -> Callable[[], StepReport]:
        """What the last update found; the result waits until the device has got there."""
        numbers = self.model.ops.device.fetch(self._report)
        return lambda: StepReport(*map(float, numbers()))
