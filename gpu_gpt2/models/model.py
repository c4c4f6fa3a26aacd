"""The base of all models: memory, graphs, losses, gradients and the steps of text generation.

A family of models, such as gpt2.py, adds its tables of tensors, and its forward and backward pass
as lists of ops. The same lines run on every device: `ops` decides whether an op is NumPy or a
kernel.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import (
    TensorSpec,
    by_layer,
    bytes_of,
    element_count,
    flat_views,
    views,
)
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.ops.table import Ops

# Batch shapes whose views and graphs are kept. Training, validation, HellaSwag and a sample have
# about twelve together on a GPU. On a CPU sampling has a new shape with every token.
SHAPES_KEPT: Final = 16
# Sequence lengths that change from call to call are padded to a multiple of this many tokens. A
# context of 1,024 has then 16 shapes, whose graphs can all be kept.
PADDED_LENGTH: Final = 64


def check_seq_len(T: int, config: ModelConfig) -> None:
    """Raises ConfigError if a sequence of T tokens is longer than the model's context."""
    if T > config.n_positions:
        raise ConfigError(
            f"sequence length {T} is longer than the model's context of {config.n_positions}; "
            f"use --seq-len {config.n_positions} or less"
        )


@dataclass(slots=True, eq=False)
class _Shape:
    """The views of one batch shape, with the stager and the graphs that use them."""

    views: SimpleNamespace
    stager: Callable[..., None] | None = None
    graphs: dict[tuple[object, ...], Callable[[], None]] = field(default_factory=dict)


class Model(ABC):
    """Weights and activations of one model on one device.

    `params` are the weights in X and `grads` their float32 gradients: named views of two arenas
    (see arena.py) that are allocated here, once, together with an arena for the activations of up
    to `max_batch` sequences of `max_seq_len` tokens. `recompute`, 0 to 3, trades memory for work in
    the backward pass without changing a bit: see the family's `activations`. Without `training`
    there are no gradients. Without `with_logits`, for a Decoder, there is no room for the logits of
    all tokens. X is the dtype of `ops`.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        max_batch: int,
        max_seq_len: int,
        recompute: int = 0,
        training: bool = True,
        with_logits: bool = True,
    ) -> None:
        check_seq_len(max_seq_len, config)
        self.config = config
        self.ops = ops
        self.x_dtype = X_DTYPES[ops.dtype]
        self.max_batch, self.max_seq_len = max_batch, max_seq_len
        self.recompute, self.training, self._with_logits = recompute, training, with_logits
        specs = self.parameters(config)
        n = element_count(specs)
        # Number of elements, at the start of the parameter arena, that have weight decay.
        self.decayed = element_count(spec for spec in specs if spec.decay)
        device = ops.device
        self.param_arena = device.zeros((n,), self.x_dtype)
        self.params = flat_views(specs, self.param_arena)
        self._layer_params = by_layer(specs, self.params, config.n_layer)
        self.grad_arena = device.zeros((n if training else 1,), FLOAT32)
        if training:
            self.grads = flat_views(specs, self.grad_arena)
            self._layer_grads = by_layer(specs, self.grads, config.n_layer)
        self._act_arena = device.empty(
            (bytes_of(self.act_specs(max_batch, max_seq_len), self.x_dtype),), np.uint8
        )
        self._shapes: dict[tuple[int, int], _Shape] = {}  # the least recently used first
        self._unscaled = device.empty((1,), FLOAT32)
        device.upload(self._unscaled, np.ones(1, np.float32))

    @staticmethod
    @abstractmethod
    def parameters(c: Any) -> tuple[TensorSpec, ...]:
        """Returns the parameter tensors, stacked over layers, those with weight decay first.

        `c` is the configuration of the family.
        """

    @staticmethod
    @abstractmethod
    def activations(
        c: Any,
        B: int,
        T: int,
        *,
        recompute: int = 0,
        training: bool = True,
        with_logits: bool = True,
    ) -> tuple[TensorSpec, ...]:
        """Returns every tensor of a forward and backward pass but the parameters.

        They are those of a batch (B, T). Tensors of the first group are kept from the forward to
        the backward pass; the others are scratch. Each level of `recompute` keeps fewer tensors and
        recomputes the others in the backward pass: level 1 recomputes the outputs of the MLP's
        activation function, level 2 also those of the norms, and level 3 all of a block but its
        input. Tensors that are recomputed share one buffer across layers. Without `training` there
        is no backward pass, and all stacked tensors share. Without `with_logits` there are neither
        logits nor losses.
        """

    @staticmethod
    def constants(c: Any, T: int) -> tuple[TensorSpec, ...]:
        """Returns the tensors that are computed once, for sequences of up to T tokens."""
        return ()

    @abstractmethod
    def hidden(self, a: SimpleNamespace) -> None:
        """Forward pass of the tokens that lie in `a`, up to and including the last norm, a.lnf."""

    @abstractmethod
    def _backward(self, a: SimpleNamespace, *, accumulate: bool) -> None:
        """Gradients of every parameter from the gradient of the logits, which lies in a.logits."""

    @property
    @abstractmethod
    def head(self) -> Array:
        """The weight (Vp, C) of the last matmul, which computes the logits."""

    def load(self, weights: npt.NDArray[np.float32]) -> None:
        """Sets all weights from a float32 parameter arena (n,) on the host, rounded to X."""
        self.ops.device.upload(self.param_arena, weights.astype(self.x_dtype, copy=False))

    def padded_length(self, T: int) -> int:
        """Returns the length to which sequences of T tokens should be padded on the right.

        Attention is causal, so padding changes nothing before it. On a device with graphs the
        length is a multiple of PADDED_LENGTH, at most max_seq_len, because every shape needs a
        graph of its own; on any other device it is T.
        """
        if not self.ops.device.is_async:  # only asynchronous devices have graphs
            return T
        whole = math.ceil(T / PADDED_LENGTH) * PADDED_LENGTH
        return max(T, min(whole, self.max_seq_len))

    def forward(self, tokens: npt.NDArray[np.int32]) -> Array:
        """Returns the logits (B * T, Vp) X of tokens (B, T) int32 on the host, each in [0, V)."""
        shape = self._shape(*tokens.shape)
        a = shape.views
        self.ops.device.upload(a.tokens, tokens)
        self._run(shape, ("logits",), lambda model: model._logits(a))
        return a.logits

    def losses(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Returns the cross-entropy (B * T,) of each target on the host, in nats; no gradients."""
        return self.ops.device.download(self.add_losses(batch))

    def add_losses(self, batch: Batch, *, first: bool = True) -> Array:
        """Enqueues a forward pass, and adds the loss of each target to a buffer on the device.

        Returns the buffer, losses (B * T,) float32 in nats: at each position the sum over all
        batches of this shape since the `first`, which overwrites the buffer. Between batches that
        add up no other method of the model may run, because all shapes share one memory. On a GPU
        the pass is a CUDA graph, one for each shape of batch.
        """
        shape = self._shape(*batch.tokens.shape)
        a = shape.views
        self._stage(shape, batch)
        if first:
            self.ops.device.fill_zero(a.losses)
        self._run(shape, ("losses",), lambda model: model._add_losses(a))
        return a.losses

    def forward_backward(
        self,
        batch: Batch,
        *,
        first: bool = True,
        micro_steps: int = 1,
        loss_scale: Array | None = None,
    ) -> Array:
        """Enqueues one of the `micro_steps` micro-steps whose gradients make one update.

        Gradients are those of the mean loss over all micro-steps, times `loss_scale` (1,) float32
        on the device (1 if not given). The `first` micro-step overwrites the gradients of the step
        before, the others add to them. Returns losses (B * T,) float32 on the device: at each
        position the sum over the micro-steps so far, in nats. On a GPU the micro-step is a CUDA
        graph, one for each shape of batch.
        """
        shape = self._shape(*batch.tokens.shape)
        a = shape.views
        scale = self._unscaled if loss_scale is None else loss_scale
        self._stage(shape, batch)
        self._run(
            shape,
            ("micro_step", first, micro_steps, self.ops.device.address(scale)),
            lambda model: model._micro_step(a, scale, first=first, micro_steps=micro_steps),
        )
        return a.losses

    def _stage(self, shape: _Shape, batch: Batch) -> None:
        """Copies a batch to the device, which may still be working on the batch before."""
        a = shape.views
        if shape.stager is None:
            order = (a.order,) if self.training else ()
            shape.stager = self.ops.device.stager(a.tokens, a.targets, *order)
        order = (batch.order,) if self.training else ()
        shape.stager(batch.tokens, batch.targets.reshape(-1), *order)

    def _run(self, shape: _Shape, key: tuple[object, ...], work: Callable[[Model], None]) -> None:
        """Runs `work` as a graph, which is made when `key` comes for the first time.

        `work` must use the model that it is given: the model holds the graph, so a graph that held
        the model would keep it from being freed.
        """
        if key not in shape.graphs:
            model = weakref.proxy(self)
            shape.graphs[key] = self.ops.device.graph(lambda: work(model))
        shape.graphs[key]()

    def _micro_step(
        self, a: SimpleNamespace, loss_scale: Array, *, first: bool, micro_steps: int
    ) -> None:
        """`forward_backward` of the tokens and targets that lie in the activations `a`."""
        o = self.ops
        self._logits(a)
        if first:
            o.device.fill_zero(a.losses)
        dloss = 1.0 / (a.targets.size * micro_steps)
        o.classifier_fwd_bwd(
            a.losses, a.logits, a.targets, loss_scale, self.config.vocab_size, dloss
        )
        self._backward(a, accumulate=not first)

    def _add_losses(self, a: SimpleNamespace) -> None:
        """`add_losses` of the tokens and targets that lie in the activations `a`."""
        self._logits(a)
        self.ops.classifier_fwd(a.losses, a.logits, a.targets, self.config.vocab_size)

    def _logits(self, a: SimpleNamespace) -> None:
        """Forward pass of sequences that lie in `a` and begin at position 0, up to the logits."""
        self.ops.device.fill_zero(a.starts)
        self.hidden(a)
        self.classify(a.logits, a.lnf)

    def classify(self, logits: Array, lnf: Array) -> None:
        """logits (N, Vp) = the last norm (N, C) times the head."""
        self.ops.matmul(logits, lnf, self.head.T)

    def _attention(self, a: SimpleNamespace, l: int) -> None:
        """Attention of layer l: over the tokens of `a`, or over a KV cache while it decodes.

        With a cache, the keys and values of the tokens are first appended to it.
        """
        o, x = self.ops, a.layers[l]
        if a.cache is not None:
            k, v = a.cache.layers[l]
            o.kv_append(k, v, x.qkv, a.starts)
            if a.decoding:
                o.attention_decode(x.att, x.qkv, k, v, a.starts)
                return
        o.attention_fwd(x.att, x.lse, x.qkv)

    def _matmul_bwd(
        self, dx: Array, dw: Array, dy: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        """dx (N, I) =; dw (O, I) = or +=; from dy (N, O), x (N, I), w (O, I)."""
        self.ops.matmul(dw, dy.T, x, accumulate=accumulate)
        self.ops.matmul(dx, dy, w)

    def act_specs(self, B: int, T: int) -> tuple[TensorSpec, ...]:
        """Returns the tensors of a pass over a batch (B, T) as this model computes it."""
        return self.activations(
            self.config,
            B,
            T,
            recompute=self.recompute,
            training=self.training,
            with_logits=self._with_logits,
        )

    def _shape(self, B: int, T: int) -> _Shape:
        """Returns the views of a batch of (B, T), with its stager and graphs, from the cache."""
        shape = self._shapes.pop((B, T), None)
        if shape is None:
            shape = _Shape(self.views_of(B, T))
            if len(self._shapes) == SHAPES_KEPT:
                # The device may still be reading memory of the stager that is dropped.
                self.ops.device.synchronize()
                del self._shapes[next(iter(self._shapes))]
        self._shapes[B, T] = shape
        return shape

    def views_of(self, B: int, T: int) -> SimpleNamespace:
        """Returns the activations of a batch of (B, T) by name, and `layers`, those of each layer.

        The activations of all shapes lie in the same memory.
        """
        check_seq_len(T, self.config)
        specs = self.act_specs(B, T)
        a = views(specs, self.x_dtype, self._act_arena)
        a.cache = None
        a.layers = by_layer(specs, a, self.config.n_layer)
        residual = a.embedded
        for layer in a.layers:
            layer.residual = residual  # the residual stream that enters the layer
            residual = layer.res_mlp
        return a
