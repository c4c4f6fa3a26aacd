"""GPT-2 (Radford et al. 2019): its tables of tensors, and its forward and backward pass as ops.

The same lines run on every device: `ops` decides whether an op is NumPy or a kernel.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import MAX_RECOMPUTE, ModelConfig
from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import TensorSpec, by_layer, bytes_of, element_count, flat_views, views
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.ops.table import Ops

# Batch shapes whose views and graphs are kept. Training, validation, HellaSwag and a sample have
# about twelve together on a GPU. On a CPU sampling has a new shape with every token.
SHAPES_KEPT: Final = 16
# Sequence lengths that change from call to call are padded to a multiple of this many tokens. A
# context of 1,024 has then 16 shapes, whose graphs can all be kept.
PADDED_LENGTH: Final = 64


def parameters(c: ModelConfig) -> tuple[TensorSpec, ...]:
    """Returns the sixteen parameter tensors, stacked over layers, those with weight decay first.

    Weights are (out, in). Names are llm.c's. "residual" initialises like "normal" with the
    standard deviation divided by sqrt(2 L) (Radford et al. 2019, section 2.3).
    """
    L, C, Vp = c.n_layer, c.n_embd, c.padded_vocab_size
    return (
        TensorSpec("wte", (Vp, C), init="normal", decay=True, rows=c.vocab_size),
        TensorSpec("wpe", (c.n_positions, C), init="normal", decay=True),
        TensorSpec("qkvw", (L, 3 * C, C), init="normal", decay=True, stacked=True),
        TensorSpec("attprojw", (L, C, C), init="residual", decay=True, stacked=True),
        TensorSpec("fcw", (L, 4 * C, C), init="normal", decay=True, stacked=True),
        TensorSpec("fcprojw", (L, C, 4 * C), init="residual", decay=True, stacked=True),
        TensorSpec("ln1w", (L, C), init="ones", stacked=True),
        TensorSpec("ln1b", (L, C), init="zeros", stacked=True),
        TensorSpec("qkvb", (L, 3 * C), init="zeros", stacked=True),
        TensorSpec("attprojb", (L, C), init="zeros", stacked=True),
        TensorSpec("ln2w", (L, C), init="ones", stacked=True),
        TensorSpec("ln2b", (L, C), init="zeros", stacked=True),
        TensorSpec("fcb", (L, 4 * C), init="zeros", stacked=True),
        TensorSpec("fcprojb", (L, C), init="zeros", stacked=True),
        TensorSpec("lnfw", (C,), init="ones"),
        TensorSpec("lnfb", (C,), init="zeros"),
    )


def parameter_count(c: ModelConfig) -> int:
    """Returns the elements of the parameter arena, padded vocabulary rows included."""
    return element_count(parameters(c))


def decayed_count(c: ModelConfig) -> int:
    """Returns how many elements, at the start of the parameter arena, have weight decay."""
    return element_count(spec for spec in parameters(c) if spec.decay)


def activations(
    c: ModelConfig, B: int, T: int, *, recompute: int = 0, training: bool = True
) -> tuple[TensorSpec, ...]:
    """Returns every tensor of a forward and backward pass but the parameters, for a batch (B, T).

    Tensors of the first group are kept from the forward to the backward pass; the others are
    scratch. Each level of `recompute` keeps fewer tensors and recomputes the others in the backward
    pass: level 1 recomputes the outputs of GELU, level 2 also those of the layernorms, and level 3
    all of a block but its input. Tensors that are recomputed share one buffer across layers.
    Without `training` there is no backward pass, and all stacked tensors share.
    """
    L, C, H, D, Vp = c.n_layer, c.n_embd, c.n_head, c.head_size, c.padded_vocab_size
    N = B * T

    def copies(level: int) -> int:
        """Returns the number of buffers of a tensor that is recomputed from `level` on."""
        return L if training and recompute < level else 1

    def stacked(name: str, level: int, *shape: int, dtype: str = "X") -> TensorSpec:
        return TensorSpec(name, (copies(level), *shape), dtype, stacked=True)

    kept = (
        TensorSpec("embedded", (N, C)),
        stacked("ln1", 2, N, C),
        stacked("ln1_mean", 2, N, dtype="float32"),
        stacked("ln1_rstd", 2, N, dtype="float32"),
        stacked("qkv", 3, B, T, 3, H, D),
        stacked("lse", 3, B, H, T, dtype="float32"),
        stacked("att", 3, B, T, H, D),
        stacked("res_att", 3, N, C),  # residual stream after attention
        stacked("ln2", 2, N, C),
        stacked("ln2_mean", 2, N, dtype="float32"),
        stacked("ln2_rstd", 2, N, dtype="float32"),
        stacked("fc", 3, N, 4 * C),
        stacked("gelu", 1, N, 4 * C),
        stacked("res_mlp", MAX_RECOMPUTE + 1, N, C),  # residual stream after the MLP
        TensorSpec("lnf", (N, C)),
        TensorSpec("lnf_mean", (N,), "float32"),
        TensorSpec("lnf_rstd", (N,), "float32"),
        TensorSpec("logits", (N, Vp)),  # their gradient, after the classifier
        TensorSpec("losses", (N,), "float32"),
    )
    scratch = (
        # The output of a projection, before it is added to the residual stream. In the backward
        # pass the gradient of the output of a layernorm or of attention.
        TensorSpec("proj", (N, C)),
        TensorSpec("tokens", (B, T), "int32"),
        TensorSpec("starts", (B,), "int32"),  # position of the first token of each sequence
        TensorSpec("targets", (N,), "int32"),
    )
    backward = (
        TensorSpec("dres", (N, C)),  # gradient of the residual stream
        TensorSpec("dfc", (N, 4 * C)),
        TensorSpec("dqkv", (B, T, 3, H, D), shares="dfc"),
        TensorSpec("delta", (B, H, T), "float32"),
        TensorSpec("order", (N,), "int32"),
    )
    return (*kept, *scratch, *backward) if training else (*kept, *scratch)


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


class GPT2:
    """Weights and activations of one model on one device.

    `params` are the weights in X and `grads` their float32 gradients: named views of two arenas
    (see arena.py) that are allocated here, once, together with an arena for the activations of up
    to `max_batch` sequences of `max_seq_len` tokens. `recompute`, 0 to 3, trades memory for work in
    the backward pass without changing a bit: see `activations`. Without `training` there are no
    gradients. X is the dtype of `ops`.
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
    ) -> None:
        check_seq_len(max_seq_len, config)
        self.config = config
        self.ops = ops
        self.x_dtype = X_DTYPES[ops.dtype]
        self.max_batch, self.max_seq_len = max_batch, max_seq_len
        self.recompute, self.training = recompute, training
        specs = parameters(config)
        n = parameter_count(config)
        device = ops.device
        self.param_arena = device.zeros((n,), self.x_dtype)
        self.params = flat_views(specs, self.param_arena)
        self._layer_params = by_layer(specs, self.params, config.n_layer)
        self.grad_arena = device.zeros((n if training else 1,), FLOAT32)
        if training:
            self.grads = flat_views(specs, self.grad_arena)
            self._layer_grads = by_layer(specs, self.grads, config.n_layer)
        self._act_arena = device.empty(
            (bytes_of(self._act_specs(max_batch, max_seq_len), self.x_dtype),), np.uint8
        )
        self._shapes: dict[tuple[int, int], _Shape] = {}  # the least recently used first
        self._unscaled = device.empty((1,), FLOAT32)
        device.upload(self._unscaled, np.ones(1, np.float32))

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

    def forward(self, tokens: npt.NDArray[np.int32], *, last_only: bool = False) -> Array:
        """Returns the logits (B * T, Vp) X of tokens (B, T) int32 on the host, each in [0, V).

        With `last_only`, for generation, B must be 1, and only the last token's logits (1, Vp) are
        computed; the tokens are padded to `padded_length`.
        """
        B, T = tokens.shape
        if last_only:
            tokens = np.pad(tokens, ((0, 0), (0, self.padded_length(T) - T)))
        shape = self._shape(*tokens.shape)
        a = shape.views
        self.ops.device.upload(a.tokens, tokens)
        self._run(shape, ("hidden",), lambda model: model._hidden(a))
        return self._logits(a, slice(T - 1, T) if last_only else slice(0, B * T))

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

    def _run(self, shape: _Shape, key: tuple[object, ...], work: Callable[[GPT2], None]) -> None:
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
        self._hidden(a)
        self._logits(a, slice(None))
        if first:
            o.device.fill_zero(a.losses)
        dloss = 1.0 / (a.targets.size * micro_steps)
        o.classifier_fwd_bwd(
            a.losses, a.logits, a.targets, loss_scale, self.config.vocab_size, dloss
        )
        self._backward(a, accumulate=not first)

    def _add_losses(self, a: SimpleNamespace) -> None:
        """`add_losses` of the tokens and targets that lie in the activations `a`."""
        self._hidden(a)
        self._logits(a, slice(None))
        self.ops.classifier_fwd(a.losses, a.logits, a.targets, self.config.vocab_size)

    def _hidden(self, a: SimpleNamespace) -> None:
        """Forward pass of the tokens that lie in `a`, up to and including the last layernorm."""
        c, p, o = self.config, self.params, self.ops
        (B, T), C, eps = a.tokens.shape, c.n_embd, c.layer_norm_epsilon
        o.device.fill_zero(a.starts)
        o.embedding_fwd(a.embedded.reshape(B, T, C), a.tokens, a.starts, p.wte, p.wpe)
        self._first_layernorm(a, 0)
        for l in range(c.n_layer):
            x, w = a.layers[l], self._layer_params[l]
            self._block(a, l)
            o.matmul(a.proj, x.gelu, w.fcprojw.T)
            residual = x.res_att, a.proj, w.fcprojb
            if l + 1 < c.n_layer:
                y, v = a.layers[l + 1], self._layer_params[l + 1]
                o.residual_layernorm_fwd(
                    x.res_mlp, y.ln1, y.ln1_mean, y.ln1_rstd, *residual, v.ln1w, v.ln1b, eps
                )
            else:
                o.residual_layernorm_fwd(
                    x.res_mlp, a.lnf, a.lnf_mean, a.lnf_rstd, *residual, p.lnfw, p.lnfb, eps
                )

    def _logits(self, a: SimpleNamespace, rows: slice) -> Array:
        """Returns the logits of some rows of `a`, whose forward pass `_hidden` has made."""
        self.ops.matmul(a.logits[rows], a.lnf[rows], self.params.wte.T)  # (rows, Vp)
        return a.logits[rows]

    def _first_layernorm(self, a: SimpleNamespace, l: int) -> None:
        o, x, w = self.ops, a.layers[l], self._layer_params[l]
        eps = self.config.layer_norm_epsilon
        o.layernorm_fwd(x.ln1, x.ln1_mean, x.ln1_rstd, x.residual, w.ln1w, w.ln1b, eps)

    def _block(self, a: SimpleNamespace, l: int) -> None:
        """Layer l after its first layernorm, up to and including GELU."""
        o, x, w = self.ops, a.layers[l], self._layer_params[l]
        N, C = a.proj.shape
        qkv = x.qkv.reshape(N, 3 * C)
        o.matmul(qkv, x.ln1, w.qkvw.T)
        o.bias_fwd(qkv, w.qkvb)
        o.attention_fwd(x.att, x.lse, x.qkv)
        o.matmul(a.proj, x.att.reshape(N, C), w.attprojw.T)
        residual, eps = (x.residual, a.proj, w.attprojb), self.config.layer_norm_epsilon
        o.residual_layernorm_fwd(
            x.res_att, x.ln2, x.ln2_mean, x.ln2_rstd, *residual, w.ln2w, w.ln2b, eps
        )
        o.matmul(x.fc, x.ln2, w.fcw.T)
        o.gelu_fwd(x.gelu, x.fc, w.fcb)

    def _recompute(self, a: SimpleNamespace, l: int) -> None:
        """Recomputes the activations that layer l shares with other layers.

        Those of the last layer are still in the buffer.
        """
        if self.recompute == 0 or l == self.config.n_layer - 1:
            return
        o, x, w = self.ops, a.layers[l], self._layer_params[l]
        if self.recompute >= 2:
            self._first_layernorm(a, l)
        if self.recompute == 3:
            self._block(a, l)
            return
        if self.recompute == 2:
            eps = self.config.layer_norm_epsilon
            o.layernorm_fwd(x.ln2, x.ln2_mean, x.ln2_rstd, x.res_att, w.ln2w, w.ln2b, eps)
        o.gelu_fwd(x.gelu, x.fc, w.fcb)

    def _backward(self, a: SimpleNamespace, *, accumulate: bool) -> None:
        """Gradients of every parameter from the gradient of the logits."""
        c, p, g, o = self.config, self.params, self.grads, self.ops
        (B, T), C = a.tokens.shape, c.n_embd
        N = B * T
        if not accumulate:
            # The matmuls of the first micro-step overwrite; all other ops only add.
            o.device.fill_zero(g.wpe)
            o.device.fill_zero(self.grad_arena[decayed_count(c) :])
        dlogits, dres, dln = a.logits, a.dres, a.proj
        o.matmul(dln, dlogits, p.wte)
        o.matmul(g.wte, dlogits.T, a.lnf, accumulate=accumulate)
        o.device.fill_zero(dres)
        last = a.layers[-1].res_mlp
        o.layernorm_bwd(dres, g.lnfw, g.lnfb, dln, last, p.lnfw, a.lnf_mean, a.lnf_rstd)
        for l in reversed(range(c.n_layer)):
            x, w, dw = a.layers[l], self._layer_params[l], self._layer_grads[l]
            self._recompute(a, l)
            # The MLP. dres is the gradient of fcproj's output and, unchanged, of res_att.
            self._linear_bwd(a.dfc, dw.fcprojw, dw.fcprojb, dres, x.gelu, w.fcprojw, accumulate)
            o.gelu_bwd(a.dfc, a.dfc, x.fc, w.fcb)
            self._linear_bwd(dln, dw.fcw, dw.fcb, a.dfc, x.ln2, w.fcw, accumulate)
            o.layernorm_bwd(dres, dw.ln2w, dw.ln2b, dln, x.res_att, w.ln2w, x.ln2_mean, x.ln2_rstd)
            # Attention. dres is the gradient of attproj's output and of the layer's input.
            att = x.att.reshape(N, C)
            self._linear_bwd(dln, dw.attprojw, dw.attprojb, dres, att, w.attprojw, accumulate)
            datt = dln.reshape(x.att.shape)
            o.attention_bwd(a.dqkv, a.delta, datt, x.qkv, x.att, x.lse)
            dqkv = a.dqkv.reshape(N, 3 * C)
            self._linear_bwd(dln, dw.qkvw, dw.qkvb, dqkv, x.ln1, w.qkvw, accumulate)
            o.layernorm_bwd(dres, dw.ln1w, dw.ln1b, dln, x.residual, w.ln1w, x.ln1_mean, x.ln1_rstd)
        o.embedding_bwd(g.wte, g.wpe, dres.reshape(B, T, C), a.tokens, a.order)

    def _linear_bwd(
        self, dx: Array, dw: Array, db: Array, dy: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        """dx (N, I) =; dw (O, I) = or +=; db (O,) +=; from dy (N, O), x (N, I), w (O, I)."""
        self.ops.bias_bwd(db, dy)
        self.ops.matmul(dw, dy.T, x, accumulate=accumulate)
        self.ops.matmul(dx, dy, w)

    def _act_specs(self, B: int, T: int) -> tuple[TensorSpec, ...]:
        return activations(self.config, B, T, recompute=self.recompute, training=self.training)

    def _shape(self, B: int, T: int) -> _Shape:
        """Returns the views of a batch of (B, T), with its stager and graphs, from the cache."""
        shape = self._shapes.pop((B, T), None)
        if shape is None:
            shape = _Shape(self._activations(B, T))
            if len(self._shapes) == SHAPES_KEPT:
                # The device may still be reading memory of the stager that is dropped.
                self.ops.device.synchronize()
                del self._shapes[next(iter(self._shapes))]
        self._shapes[B, T] = shape
        return shape

    def _activations(self, B: int, T: int) -> SimpleNamespace:
        """Returns the activations of a batch of (B, T) by name, and `layers`, those of each layer.

        The activations of all shapes lie in the same memory.
        """
        check_seq_len(T, self.config)
        specs = self._act_specs(B, T)
        a = views(specs, self.x_dtype, self._act_arena)
        a.layers = by_layer(specs, a, self.config.n_layer)
        residual = a.embedded
        for layer in a.layers:
            layer.residual = residual  # the residual stream that enters the layer
            residual = layer.res_mlp
        return a
