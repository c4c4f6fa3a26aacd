"""AdamW with gradient clipping over the whole parameter arena at once."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gpu_gpt2 import layout
from gpu_gpt2.device.base import FLOAT32, Array
from gpu_gpt2.model import GPT2
from gpu_gpt2.ops.interface import AdamWStep


class AdamW:
    """Moments and float32 master weights of a model, on its device.

    `m`, `v` and `master` are (n,) float32 arenas in the order of layout.parameters; with float32
    weights, `master` is the model's own arena. `grad_sq` (1,) float32 is the squared norm of the
    gradient of the last step.
    """

    def __init__(self, model: GPT2) -> None:
        self.model = model
        device = model.ops.device
        n = layout.parameter_count(model.config)
        self.m = device.zeros((n,), FLOAT32)
        self.v = device.zeros((n,), FLOAT32)
        if model.dtype == FLOAT32:
            self.master: Array = model.param_arena
        else:
            self.master = device.zeros((n,), FLOAT32)
        self.grad_sq = device.zeros((1,), FLOAT32)
        self.decayed = layout.decayed_count(model.config)

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

    def step(self, hyper: AdamWStep) -> None:
        """Updates the model's weights from its gradients."""
        model, ops = self.model, self.model.ops
        ops.squared_norm(self.grad_sq, model.grad_arena)
        ops.adamw(
            self.master,
            self.m,
            self.v,
            model.param_arena,
            model.grad_arena,
            self.grad_sq,
            self.decayed,
            hyper,
        )

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping; waits for the device."""
        return math.sqrt(float(self.model.ops.device.download(self.grad_sq)[0]))
