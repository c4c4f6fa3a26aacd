"""GPT-2, forward and backward, as a list of ops (Radford et al. 2019).

The same lines run on every device: `ops` decides whether an op is NumPy or a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import MAX_RECOMPUTE, ModelConfig
from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import TensorSpec, by_layer, bytes_of, element_count, flat_views, views
from gpu_gpt2.ops.table import Ops


def parameters(c: ModelConfig) -> tuple[TensorSpec, ...]:
    """The sixteen parameter tensors, stacked over layers, decayed ones first.

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
    """Elements of the parameter arena, padded vocabulary rows included."""
    return element_count(parameters(c))


def decayed_count(c: ModelConfig) -> int:
    """How many elements at the start of the parameter arena take weight decay: the matrices."""
    return element_count(spec for spec in parameters(c) if spec.decay)


def activations(
    c: ModelConfig, B: int, T: int, *, recompute: int = 0, training: bool = True
) -> tuple[TensorSpec, ...]:
    """Every tensor of a forward and backward pass besides parameters, for a batch of (B, T).

    The first group is kept from forward to backward, the second is scratch. Each level of
    `recompute` keeps less, and computes it again in the backward pass: 1 the outputs of GELU, 2
    also those of the layernorms, 3 all of a block but its input. Without `training` nothing is
    kept, and there is no backward pass.
    """
    L, C, H, D, Vp = c.n_layer, c.n_embd, c.n_head, c.head_size, c.padded_vocab_size
    N = B * T

    def copies(level: int) -> int:
        """How many layers keep their own copy of what is computed again from `level` on."""
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
        TensorSpec("branch", (N, C)),  # a projection before it joins the residual; its gradient
        TensorSpec("tokens", (B, T), "int32"),
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


class GPT2:
    """Weights and activations of one model on one device.

    `params` are the weights in X, `grads` float32 gradients, `acts` the activations of the last
    batch: named views (see arena.py) of arenas allocated here, once, for up to `max_batch`
    sequences of `max_seq_len` tokens. `recompute`, 0 to 3, trades memory for work in the backward
    pass without changing a bit: see activations. Without `training` there are no gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        dtype: str,
        max_batch: int,
        max_seq_len: int,
        recompute: int = 0,
        training: bool = True,
    ) -> None:
        check_seq_len(max_seq_len, config)
        self.config = config
        self.ops = ops
        self.dtype = X_DTYPES[dtype]
        self.max_batch, self.max_seq_len = max_batch, max_seq_len
        self.recompute, self.training = recompute, training
        specs = parameters(config)
        n = parameter_count(config)
        device = ops.device
        self.param_arena = device.zeros((n,), self.dtype)
        self.params = flat_views(specs, self.param_arena)
        self._layer_params = by_layer(specs, self.params, config.n_layer)
        self.grad_arena = device.zeros((n if training else 1,), FLOAT32)
        if training:
            self.grads = flat_views(specs, self.grad_arena)
            self._layer_grads = by_layer(specs, self.grads, config.n_layer)
        self._act_arena = device.empty(
            (bytes_of(self._act_specs(max_batch, max_seq_len), self.dtype),), np.uint8
        )
        self.loss_scale = device.empty((1,), FLOAT32)
        device.upload(self.loss_scale, np.ones(1, np.float32))
        self._feeders: dict[tuple[int, int], Callable[..., None]] = {}
        self._shape = (0, 0)
        self._set_shape(max_batch, max_seq_len)

    def load(self, weights: npt.NDArray[np.float32]) -> None:
        """Sets all weights from a float32 parameter arena (n,) on the host, rounded to X."""
        self.ops.device.upload(self.param_arena, weights.astype(self.dtype, copy=False))

    def forward(self, tokens: npt.NDArray[np.int32], *, last_only: bool = False) -> Array:
        """Logits (B * T, Vp) X of tokens (B, T) int32 on the host, each in [0, V).

        With `last_only`, which is for generating, B is 1 and only the last token's (1, Vp).
        """
        self._set_shape(*tokens.shape)
        self.ops.device.upload(self.acts.tokens, tokens)
        return self._forward(last_only=last_only)

    def losses(
        self, tokens: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Cross-entropy (B * T,) float32 in nats of each target, on the host; no gradients.

        tokens, targets (B, T) int32 on the host, each in [0, V).
        """
        self.forward(tokens)
        o, a = self.ops, self.acts
        o.device.fill_zero(a.losses)
        o.device.upload(a.targets, targets.reshape(-1))
        o.classifier_fwd(a.losses, a.logits, a.targets, self.config.vocab_size)
        return o.device.download(a.losses)

    def forward_backward(
        self,
        tokens: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
        order: npt.NDArray[np.int32],
        *,
        micro_step: int,
        micro_steps: int,
    ) -> None:
        """One micro-batch: losses and gradients, added to those of earlier micro-steps.

        tokens, targets (B, T) int32 and order (B * T,) int32 on the host, order the stable argsort
        of the flattened tokens. Gradients are of the mean loss over all `micro_steps`
        micro-batches; micro-step 0 starts them afresh.
        """
        self.upload(tokens, targets, order)
        self.micro_step(first=micro_step == 0, micro_steps=micro_steps)

    def upload(
        self,
        tokens: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
        order: npt.NDArray[np.int32],
    ) -> None:
        """Copies a batch to where `micro_step` reads it; shapes as in `forward_backward`."""
        self._set_shape(*tokens.shape)
        if self._shape not in self._feeders:
            a = self.acts
            self._feeders[self._shape] = self.ops.device.feeder(a.tokens, a.targets, a.order)
        self._feeders[self._shape](tokens, targets.reshape(-1), order)

    def micro_step(self, *, first: bool, micro_steps: int) -> None:
        """`forward_backward` of the uploaded batch: work of the device alone.

        Gradients are of the loss times `loss_scale` (1,) float32, which the optimizer changes.
        """
        o, a = self.ops, self.acts
        self._forward()
        if first:
            o.device.fill_zero(a.losses)
        dloss = 1.0 / (a.targets.size * micro_steps)
        o.classifier_fwd_bwd(
            a.losses, a.logits, a.targets, self.loss_scale, self.config.vocab_size, dloss
        )
        self._backward(accumulate=not first)

    def _forward(self, *, last_only: bool = False) -> Array:
        """Logits of the uploaded tokens."""
        c, p, o, a = self.config, self.params, self.ops, self.acts
        (B, T), C = a.tokens.shape, c.n_embd
        N = B * T
        o.embedding_fwd(a.embedded.reshape(B, T, C), a.tokens, p.wte, p.wpe)
        self._first_layernorm(0)
        for l in range(c.n_layer):
            x, w = self._layers[l], self._layer_params[l]
            self._block(l)
            o.matmul(a.branch, x.gelu, w.fcprojw.T)
            residual = x.res_att, a.branch, w.fcprojb
            if l + 1 < c.n_layer:
                y, v = self._layers[l + 1], self._layer_params[l + 1]
                o.residual_layernorm_fwd(
                    x.res_mlp, y.ln1, y.ln1_mean, y.ln1_rstd, *residual, v.ln1w, v.ln1b
                )
            else:
                o.residual_layernorm_fwd(
                    x.res_mlp, a.lnf, a.lnf_mean, a.lnf_rstd, *residual, p.lnfw, p.lnfb
                )
        rows = slice(N - 1, N) if last_only else slice(0, N)
        o.matmul(a.logits[rows], a.lnf[rows], p.wte.T)  # (N, Vp)
        return a.logits[rows]

    def _first_layernorm(self, l: int) -> None:
        o, x, w = self.ops, self._layers[l], self._layer_params[l]
        o.layernorm_fwd(x.ln1, x.ln1_mean, x.ln1_rstd, x.residual, w.ln1w, w.ln1b)

    def _block(self, l: int) -> None:
        """Layer l from its first layernorm's output to GELU's: all that its backward pass reads."""
        o, a, x, w = self.ops, self.acts, self._layers[l], self._layer_params[l]
        N, C = a.branch.shape
        qkv = x.qkv.reshape(N, 3 * C)
        o.matmul(qkv, x.ln1, w.qkvw.T)
        o.bias_fwd(qkv, w.qkvb)
        o.attention_fwd(x.att, x.lse, x.qkv)
        o.matmul(a.branch, x.att.reshape(N, C), w.attprojw.T)
        residual = x.residual, a.branch, w.attprojb
        o.residual_layernorm_fwd(
            x.res_att, x.ln2, x.ln2_mean, x.ln2_rstd, *residual, w.ln2w, w.ln2b
        )
        o.matmul(x.fc, x.ln2, w.fcw.T)
        o.gelu_fwd(x.gelu, x.fc, w.fcb)

    def _recompute(self, l: int) -> None:
        """Makes again what layer l did not keep; the last layer's is still there."""
        if self.recompute == 0 or l == self.config.n_layer - 1:
            return
        o, x, w = self.ops, self._layers[l], self._layer_params[l]
        if self.recompute >= 2:
            self._first_layernorm(l)
        if self.recompute == 3:
            self._block(l)
            return
        if self.recompute == 2:
            o.layernorm_fwd(x.ln2, x.ln2_mean, x.ln2_rstd, x.res_att, w.ln2w, w.ln2b)
        o.gelu_fwd(x.gelu, x.fc, w.fcb)

    def _backward(self, *, accumulate: bool) -> None:
        """Gradients of every parameter from the gradient of the logits."""
        c, p, g, o, a = self.config, self.params, self.grads, self.ops, self.acts
        (B, T), C = a.tokens.shape, c.n_embd
        N = B * T
        if not accumulate:
            # Matrix products overwrite on the first micro-step; the others always add.
            o.device.fill_zero(g.wpe)
            o.device.fill_zero(self.grad_arena[decayed_count(c) :])
        dlogits, dres, dbranch = a.logits, a.dres, a.branch
        o.matmul(dbranch, dlogits, p.wte)
        o.matmul(g.wte, dlogits.T, a.lnf, accumulate=accumulate)
        o.device.fill_zero(dres)
        last = self._layers[-1].res_mlp
        o.layernorm_bwd(dres, g.lnfw, g.lnfb, dbranch, last, p.lnfw, a.lnf_mean, a.lnf_rstd)
        for l in reversed(range(c.n_layer)):
            x, w, dw = self._layers[l], self._layer_params[l], self._layer_grads[l]
            self._recompute(l)
            # MLP: dres is the gradient of fcproj's output, and passes by it to res_att.
            self._linear_bwd(a.dfc, dw.fcprojw, dw.fcprojb, dres, x.gelu, w.fcprojw, accumulate)
            o.gelu_bwd(a.dfc, a.dfc, x.fc, w.fcb)
            self._linear_bwd(dbranch, dw.fcw, dw.fcb, a.dfc, x.ln2, w.fcw, accumulate)
            o.layernorm_bwd(
                dres, dw.ln2w, dw.ln2b, dbranch, x.res_att, w.ln2w, x.ln2_mean, x.ln2_rstd
            )
            # Attention, likewise.
            att = x.att.reshape(N, C)
            self._linear_bwd(dbranch, dw.attprojw, dw.attprojb, dres, att, w.attprojw, accumulate)
            o.attention_bwd(a.dqkv, a.delta, dbranch.reshape(x.att.shape), x.qkv, x.att, x.lse)
            dqkv = a.dqkv.reshape(N, 3 * C)
            self._linear_bwd(dbranch, dw.qkvw, dw.qkvb, dqkv, x.ln1, w.qkvw, accumulate)
            o.layernorm_bwd(
                dres, dw.ln1w, dw.ln1b, dbranch, x.residual, w.ln1w, x.ln1_mean, x.ln1_rstd
            )
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

    def _set_shape(self, B: int, T: int) -> None:
        """Makes `acts` the activations of a batch of (B, T), until another size comes."""
        if (B, T) == self._shape:
            return
        check_seq_len(T, self.config)
        specs = self._act_specs(B, T)
        self.acts: SimpleNamespace = views(specs, self.dtype, self._act_arena)
        self._layers = by_layer(specs, self.acts, self.config.n_layer)
        residual = self.acts.embedded
        for layer in self._layers:
            layer.residual = residual  # what the layer adds to
            residual = layer.res_mlp
        self._shape = (B, T)
