"""GPT-2, forward and backward, as a list of ops (Radford et al. 2019).

The same lines run on every device: `ops` decides whether an op is NumPy or a kernel.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from gpu_gpt2 import layout
from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops.interface import Ops


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
    batch: named views (see layout.py) of arenas allocated here, once, for up to `max_batch`
    sequences of `max_seq_len` tokens. Without `training` there are no gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        dtype: str,
        max_batch: int,
        max_seq_len: int,
        training: bool = True,
    ) -> None:
        check_seq_len(max_seq_len, config)
        self.config = config
        self.ops = ops
        self.dtype = X_DTYPES[dtype]
        self.max_batch, self.max_seq_len = max_batch, max_seq_len
        specs = layout.parameters(config)
        n = layout.parameter_count(config)
        device = ops.device
        self.param_arena = device.zeros((n,), self.dtype)
        self.params = layout.flat_views(specs, self.param_arena)
        self.grad_arena = device.zeros((n if training else 1,), FLOAT32)
        if training:
            self.grads = layout.flat_views(specs, self.grad_arena)
        self._act_bytes = layout.bytes_of(
            layout.activations(config, max_batch, max_seq_len), self.dtype
        )
        self._act_arena = device.empty((self._act_bytes,), np.uint8)
        self._shape = (0, 0)
        self.acts: SimpleNamespace = self._reshape(max_batch, max_seq_len)

    def load(self, weights: npt.NDArray[np.float32]) -> None:
        """Sets all weights from a float32 parameter arena (n,) on the host, rounded to X."""
        self.ops.device.upload(self.param_arena, weights.astype(self.dtype, copy=False))

    def forward(self, tokens: npt.NDArray[np.int32], *, last_only: bool = False) -> Array:
        """Logits (B * T, Vp) X of tokens (B, T) int32 on the host, each in [0, V).

        With `last_only`, which is for generating, B is 1 and only the last token's (1, Vp).
        """
        B, T = tokens.shape
        c, p, o, a = self.config, self.params, self.ops, self._reshape(B, T)
        N, C = B * T, c.n_embd
        o.device.upload(a.tokens, tokens)
        o.embedding_fwd(a.embedded.reshape(B, T, C), a.tokens, p.wte, p.wpe)
        residual = a.embedded
        o.layernorm_fwd(a.ln1[0], a.ln1_mean[0], a.ln1_rstd[0], residual, p.ln1w[0], p.ln1b[0])
        for l in range(c.n_layer):
            self._linear(a.qkv[l].reshape(N, 3 * C), a.ln1[l], p.qkvw[l], p.qkvb[l])
            o.attention_fwd(a.att[l], a.lse[l], a.qkv[l])
            self._linear(a.branch, a.att[l].reshape(N, C), p.attprojw[l], p.attprojb[l])
            o.residual_layernorm_fwd(
                a.res_att[l], a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l],
                residual, a.branch, p.ln2w[l], p.ln2b[l],
            )  # fmt: skip
            self._linear(a.fc[l], a.ln2[l], p.fcw[l], p.fcb[l])
            o.gelu_fwd(a.gelu[l], a.fc[l])
            self._linear(a.branch, a.gelu[l], p.fcprojw[l], p.fcprojb[l])
            o.residual_layernorm_fwd(
                a.res_mlp[l], *self._normed_after(l),
                a.res_att[l], a.branch, *self._norm_weights_after(l),
            )  # fmt: skip
            residual = a.res_mlp[l]
        rows = slice(N - 1, N) if last_only else slice(0, N)
        o.matmul(a.logits[rows], a.lnf[rows], p.wte.T)  # (N, Vp)
        return a.logits[rows]

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
        N = tokens.size
        self.forward(tokens)
        o, a = self.ops, self.acts
        if micro_step == 0:
            o.device.fill_zero(a.losses)
        o.device.upload(a.targets, targets.reshape(-1))
        o.device.upload(a.order, order)
        dloss = 1.0 / (N * micro_steps)
        o.classifier_fwd_bwd(a.losses, a.logits, a.targets, self.config.vocab_size, dloss)
        self._backward(accumulate=micro_step > 0)

    def _backward(self, *, accumulate: bool) -> None:
        """Gradients of every parameter from the gradient of the logits."""
        c, p, g, o, a = self.config, self.params, self.grads, self.ops, self.acts
        (B, T), C = a.tokens.shape, c.n_embd
        N = B * T
        if not accumulate:
            # Matrix products overwrite on the first micro-step; the others always add.
            o.device.fill_zero(g.wpe)
            o.device.fill_zero(self.grad_arena[layout.decayed_count(c) :])
        dlogits, dres, dbranch = a.logits, a.dres, a.branch
        o.matmul(dbranch, dlogits, p.wte)
        o.matmul(g.wte, dlogits.T, a.lnf, accumulate=accumulate)
        o.device.fill_zero(dres)
        last = c.n_layer - 1
        o.layernorm_bwd(
            dres, g.lnfw, g.lnfb, dbranch, a.res_mlp[last], p.lnfw, a.lnf_mean, a.lnf_rstd
        )
        for l in reversed(range(c.n_layer)):
            residual = a.res_mlp[l - 1] if l else a.embedded
            # MLP: dres is the gradient of fcproj's output, and passes by it to res_att.
            self._linear_bwd(
                a.dfc, g.fcprojw[l], g.fcprojb[l], dres, a.gelu[l], p.fcprojw[l], accumulate
            )
            o.gelu_bwd(a.dfc, a.dfc, a.fc[l])
            self._linear_bwd(dbranch, g.fcw[l], g.fcb[l], a.dfc, a.ln2[l], p.fcw[l], accumulate)
            o.layernorm_bwd(
                dres, g.ln2w[l], g.ln2b[l],
                dbranch, a.res_att[l], p.ln2w[l], a.ln2_mean[l], a.ln2_rstd[l],
            )  # fmt: skip
            # Attention, likewise.
            self._linear_bwd(
                dbranch, g.attprojw[l], g.attprojb[l],
                dres, a.att[l].reshape(N, C), p.attprojw[l], accumulate,
            )  # fmt: skip
            o.attention_bwd(
                a.dqkv, a.delta, dbranch.reshape(a.att[l].shape), a.qkv[l], a.att[l], a.lse[l]
            )
            self._linear_bwd(
                dbranch, g.qkvw[l], g.qkvb[l],
                a.dqkv.reshape(N, 3 * C), a.ln1[l], p.qkvw[l], accumulate,
            )  # fmt: skip
            o.layernorm_bwd(
                dres, g.ln1w[l], g.ln1b[l],
                dbranch, residual, p.ln1w[l], a.ln1_mean[l], a.ln1_rstd[l],
            )  # fmt: skip
        o.embedding_bwd(g.wte, g.wpe, dres.reshape(B, T, C), a.tokens, a.order)

    def _linear(self, y: Array, x: Array, w: Array, b: Array) -> None:
        """y (N, O) = x (N, I) @ w (O, I)^T + b (O,)."""
        self.ops.matmul(y, x, w.T)
        self.ops.bias_fwd(y, b)

    def _linear_bwd(
        self, dx: Array, dw: Array, db: Array, dy: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        """dx (N, I) =; dw (O, I) = or +=; db (O,) +=; from dy (N, O), x (N, I), w (O, I)."""
        self.ops.bias_bwd(db, dy)
        self.ops.matmul(dw, dy.T, x, accumulate=accumulate)
        self.ops.matmul(dx, dy, w)

    def _normed_after(self, l: int) -> tuple[Array, Array, Array]:
        """Output and statistics of the layernorm that follows layer l: the next one's, or lnf."""
        a = self.acts
        if l + 1 < self.config.n_layer:
            return a.ln1[l + 1], a.ln1_mean[l + 1], a.ln1_rstd[l + 1]
        return a.lnf, a.lnf_mean, a.lnf_rstd

    def _norm_weights_after(self, l: int) -> tuple[Array, Array]:
        p = self.params
        if l + 1 < self.config.n_layer:
            return p.ln1w[l + 1], p.ln1b[l + 1]
        return p.lnfw, p.lnfb

    def _reshape(self, B: int, T: int) -> SimpleNamespace:
        """The activations as views for a batch of (B, T), kept until another size comes."""
        if (B, T) != self._shape:
            check_seq_len(T, self.config)
            specs = layout.activations(self.config, B, T)
            self.acts = layout.views(specs, self.dtype, self._act_arena)
            self._shape = (B, T)
        return self.acts
