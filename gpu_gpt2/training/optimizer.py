"""AdamW with gradient clipping and loss scaling, over the whole parameter arena at once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import DEFAULTS, ModelConfig
from gpu_gpt2.device.base import FLOAT16, FLOAT32, Array, AsyncRead
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import TensorSpec, element_count
from gpu_gpt2.models.families import parameter_count, parameters
from gpu_gpt2.models.model import Model
from gpu_gpt2.ops.table import (
    MIN_LOSS_SCALE,
    SKIPPED,
    WINDOW,
    AdamWSettings,
    Counts,
    Factors,
    Report,
)

INITIAL_LOSS_SCALE: Final = 2.0**16  # just above float16's largest number
MAX_LOSS_SCALE: Final = 2.0**24
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateState:
    """Update counter, loss-scaler state and outlier windows, saved in checkpoints.

    Raises ConfigError for values that no run can have. Windows may be given as lists.
    """

    updates: int  # made so far; a step that is skipped makes none
    good_steps: int  # updates since the loss scale last changed: the growth tracker
    loss_scale: float
    losses: tuple[float, ...] = ()  # the finite losses of the last WINDOW steps, oldest first
    grad_norms: tuple[float, ...] = ()  # the finite gradient norms of the same steps

    def with_initial_scale(self) -> UpdateState:
        """Returns this state as it continues in another dtype, whose loss scale starts anew."""
        return replace(self, good_steps=0, loss_scale=INITIAL_LOSS_SCALE)

    def __post_init__(self) -> None:
        numbers = (self.updates, self.good_steps, self.loss_scale)
        counts = all(type(number) is int and number >= 0 for number in numbers[:2])
        if not counts or not MIN_LOSS_SCALE <= self.loss_scale <= MAX_LOSS_SCALE:
            raise ConfigError(
                f"updates, good_steps and loss_scale must be two counts and {MIN_LOSS_SCALE:g} to "
                f"{MAX_LOSS_SCALE:g}, not {', '.join(map(repr, numbers))}"
            )
        for name in ("losses", "grad_norms"):
            object.__setattr__(self, name, _window(name, getattr(self, name)))


def _window(name: str, values: object) -> tuple[float, ...]:
    """Returns a window as a tuple; ConfigError unless it is one of at most WINDOW float32s."""
    if (
        not isinstance(values, (list, tuple))
        or len(values) > WINDOW
        or not all(type(value) in (int, float) and abs(value) <= MAX_FLOAT32 for value in values)
    ):
        raise ConfigError(f"{name} must be a list of at most {WINDOW} finite numbers")
    return tuple(map(float, values))


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, and whether it made an update."""

    loss: float  # mean over the tokens of the step, in nats
    grad_norm: float  # before clipping, without the loss scale
    loss_scale: float  # loss scale of the next step
    scaled_by: float = MIN_LOSS_SCALE  # loss scale of this step
    loss_zscore: float = math.nan  # of the loss among the last WINDOW; NaN until there are so many
    grad_zscore: float = math.nan  # of the gradient norm, likewise
    skipped: str = ""  # one of SKIPPED: why there was no update, or ""

    @property
    def updated(self) -> bool:
        """True if the weights were updated."""
        return not self.skipped

    @property
    def diverged(self) -> bool:
        """True if a number is not finite and no smaller loss scale can help."""
        lowest = self.scaled_by <= MIN_LOSS_SCALE
        return not math.isfinite(self.loss) or (not math.isfinite(self.grad_norm) and lowest)


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that is enqueued; `result` waits until the device has finished it."""

    report: AsyncRead

    def result(self) -> StepResult:
        report = Report(*map(float, self.report.result()))
        return StepResult(
            loss=report.loss,
            grad_norm=report.norm,
            loss_scale=report.loss_scale,
            scaled_by=report.scaled_by,
            loss_zscore=report.loss_zscore,
            grad_zscore=report.grad_zscore,
            skipped=SKIPPED[int(report.skipped)],
        )


class AdamW:
    """Optimizer state and float32 master weights of a model, on its device.

    `m` and `master` are (n,) float32 arenas in the order of families.parameters. `v` is an arena of
    the tensors in `second_moments`: all of them here, fewer in a subclass. With float32 weights,
    `master` is the model's own arena. `loss_scale` (1,) float32, by which the model must multiply
    the loss, is 1 unless the weights are float16.

    A step makes no update if its loss or its gradient norm is not finite, or if the z-score of one
    of them is above `max_loss_zscore` or `max_grad_zscore` (0 turns a limit off). With `halt`, a
    step that diverged stops all later updates until `load_state`, so the weights are still its own
    when its result is read, even if the next step is already enqueued.
    """

    def __init__(
        self,
        model: Model,
        *,
        beta1: float = DEFAULTS["beta1"],
        beta2: float = DEFAULTS["beta2"],
        eps: float = DEFAULTS["eps"],
        weight_decay: float = 0.0,
        max_grad_norm: float = DEFAULTS["max_grad_norm"],
        max_loss_zscore: float = 0.0,
        max_grad_zscore: float = 0.0,
        halt: bool = True,
    ) -> None:
        self.model = model
        self.settings = AdamWSettings(
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            max_loss_scale=MAX_LOSS_SCALE if model.x_dtype == FLOAT16 else MIN_LOSS_SCALE,
            max_loss_zscore=max_loss_zscore,
            max_grad_zscore=max_grad_zscore,
            halt=halt,
        )
        device = model.ops.device
        n = parameter_count(model.config)
        self.m = device.zeros((n,), FLOAT32)
        self.v = device.zeros((element_count(self.second_moments(model.config)),), FLOAT32)
        if model.x_dtype == FLOAT32:
            self.master: Array = model.param_arena
        else:
            self.master = device.zeros((n,), FLOAT32)
        self.decayed = model.decayed
        self.loss_scale = device.zeros((1,), FLOAT32)
        self._grad_sq = device.zeros((1,), FLOAT32)
        self._lr = device.zeros((1,), FLOAT32)
        self._factors = device.zeros((len(Factors._fields),), FLOAT32)
        self._report = device.zeros((len(Report._fields),), FLOAT32)
        self._counts = device.zeros((len(Counts._fields),), FLOAT32)
        self._windows = device.empty((2, WINDOW), FLOAT32)
        self._stage_lr = device.stager(self._lr)
        self._graphs: dict[tuple[int, int, int], Callable[[], None]] = {}
        self.load_state(UpdateState(updates=0, good_steps=0, loss_scale=INITIAL_LOSS_SCALE))

    @property
    def saved_arrays(self) -> tuple[Array, Array, Array]:
        """The arrays of a checkpoint: master weights, m and v."""
        return self.master, self.m, self.v

    @staticmethod
    def second_moments(config: ModelConfig) -> tuple[TensorSpec, ...]:
        """Returns the parameters of a model of which the optimizer keeps a second moment."""
        return parameters(config)

    @staticmethod
    def scratch(config: ModelConfig) -> tuple[TensorSpec, ...]:
        """Returns the tensors that an update needs besides the optimizer state."""
        return ()

    def load(
        self,
        weights: npt.NDArray[np.float32],
        m: npt.NDArray[np.float32] | None = None,
        v: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Sets master weights, and the model's with them, and moments from host arenas float32."""
        device = self.model.ops.device
        device.upload(self.master, weights)
        if self.master is not self.model.param_arena:
            self.model.ops.cast(self.model.param_arena, self.master)
        if m is not None and v is not None:
            device.upload(self.m, m)
            device.upload(self.v, v)
        device.synchronize()  # the host arrays are no longer needed

    def load_state(self, state: UpdateState) -> None:
        """Continues from a saved state, also after a step that diverged.

        Without loss scaling the scale becomes 1.
        """
        device = self.model.ops.device
        scale = min(state.loss_scale, self.settings.max_loss_scale)
        device.upload(self.loss_scale, np.array([scale], np.float32))
        counts = Counts(updates=state.updates, good_steps=state.good_steps, halted=0)
        device.upload(self._counts, np.array(counts, np.float32))
        windows = np.full((2, WINDOW), np.nan, np.float32)
        for window, values in zip(windows, (state.losses, state.grad_norms), strict=True):
            window[WINDOW - len(values) :] = values
        device.upload(self._windows, windows)

    def state(self) -> UpdateState:
        """Returns the state after the last update; waits for the device."""
        device = self.model.ops.device
        counts = Counts(*device.download(self._counts))
        scale = device.download(self.loss_scale)
        losses, norms = (row[~np.isnan(row)] for row in device.download(self._windows))
        return UpdateState(
            updates=int(counts.updates),
            good_steps=int(counts.good_steps),
            loss_scale=float(scale[0]),
            losses=tuple(losses.tolist()),
            grad_norms=tuple(norms.tolist()),
        )

    def step(self, lr: float, losses: Array, *, micro_steps: int = 1) -> PendingStep:
        """Enqueues an update of the model's weights with its gradients.

        `losses` (B * T,) float32 is what the last of `micro_steps` calls of
        Model.forward_backward returned. On a GPU the update is a CUDA graph.
        """
        device = self.model.ops.device
        key = (device.address(losses), losses.size, micro_steps)
        if key not in self._graphs:
            optimizer = weakref.proxy(self)  # it holds the graph, which must not hold it
            self._graphs[key] = device.graph(lambda: optimizer._update(losses, micro_steps))
        self._stage_lr(np.array([lr], np.float32))
        self._graphs[key]()
        return PendingStep(device.read_async(self._report))

    def _update(self, losses: Array, micro_steps: int) -> None:
        model, ops = self.model, self.model.ops
        ops.squared_norm(self._grad_sq, model.grad_arena)
        ops.prepare_update(
            self._factors,
            self._report,
            self.loss_scale,
            self._counts,
            self._windows,
            losses,
            self._grad_sq,
            self._lr,
            1.0 / (losses.size * micro_steps),
            self.settings,
        )
        self._update_weights()

    def _update_weights(self) -> None:
        """Enqueues the update of all weights with the scalars in `_factors`."""
        self._adamw(slice(None), self.v, self.decayed)

    def _adamw(self, part: slice, v: Array, decayed: int) -> None:
        """Updates a part of the arenas, whose first `decayed` elements have weight decay."""
        model = self.model
        master = self.master[part]
        param = master if self.master is model.param_arena else model.param_arena[part]
        model.ops.adamw(
            master,
            self.m[part],
            v,
            param,
            model.grad_arena[part],
            self._factors,
            decayed,
            self.settings,
        )
