"""Llama (Touvron et al. 2023): its tables of tensors, and its forward and backward pass as ops.

It differs from GPT-2 by RMSNorm, rotary positions (RoPE), grouped queries, SwiGLU, and the lack of
biases. Rotary pairs are neighbours within a head, as in llama2.c.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gpu_gpt2.config import MAX_RECOMPUTE, LlamaConfig
from gpu_gpt2.device.base import FLOAT32, Array
from gpu_gpt2.models.arena import TensorSpec, layer_matrices
from gpu_gpt2.models.model import Model
from gpu_gpt2.models.rope import rope_angles


class Llama(Model):
    """A Llama; see Model for the arguments."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        angles = rope_angles(self.max_seq_len, config.head_size, config.rope_theta)
        self._angles = self.ops.device.empty(angles.shape, FLOAT32)
        self.ops.device.upload(self._angles, angles)

    @staticmethod
    def parameters(c: LlamaConfig) -> tuple[TensorSpec, ...]:
        """Returns the eight parameter tensors, and `head` if it is not tied to wte.

        Weights are (out, in). Where GPT-2 has a tensor of the same role, the name is the same. Rows
        of qkvw are those of the query heads, then the key heads, then the value heads; rows of fcw
        are the gate, then the up projection. "residual" initialises as in GPT-2.
        """
        L, C, F, Vp = c.n_layer, c.n_embd, c.n_inner, c.padded_vocab_size
        keys = c.n_kv_head * c.head_size  # rows of the keys, and of the values
        head = TensorSpec("head", (Vp, C), init="normal", decay=True, rows=c.vocab_size)
        return (
            TensorSpec("wte", (Vp, C), init="normal", decay=True, rows=c.vocab_size),
            *(() if c.tie_word_embeddings else (head,)),
            layer_matrices("qkvw", L, (C, keys, keys), C, init="normal"),
            layer_matrices("attprojw", L, (C,), C, init="residual"),
            layer_matrices("fcw", L, (F, F), C, init="normal"),
            layer_matrices("fcprojw", L, (C,), F, init="residual"),
            TensorSpec("ln1w", (L, C), init="ones", stacked=True),
            TensorSpec("ln2w", (L, C), init="ones", stacked=True),
            TensorSpec("lnfw", (C,), init="ones"),
        )

    @staticmethod
    def activations(
        c: LlamaConfig,
        B: int,
        T: int,
        *,
        recompute: int = 0,
        training: bool = True,
        with_logits: bool = True,
    ) -> tuple[TensorSpec, ...]:
        L, C, H, D, F = c.n_layer, c.n_embd, c.n_head, c.head_size, c.n_inner
        R = H + 2 * c.n_kv_head  # heads of a packed row: queries, keys and values
        N = B * T

        def copies(level: int) -> int:
            """Returns the number of buffers of a tensor that is recomputed from `level` on."""
            return L if training and recompute < level else 1

        def stacked(name: str, level: int, *shape: int, dtype: str = "X") -> TensorSpec:
            return TensorSpec(name, (copies(level), *shape), dtype, stacked=True)

        kept = (
            TensorSpec("embedded", (N, C)),
            stacked("ln1", 2, N, C),
            stacked("ln1_rstd", 2, N, dtype="float32"),
            stacked("qkv", 3, B, T, R, D),  # queries and keys are rotated
            stacked("lse", 3, B, H, T, dtype="float32"),
            stacked("att", 3, B, T, H, D),
            stacked("res_att", 3, N, C),  # residual stream after attention
            stacked("ln2", 2, N, C),
            stacked("ln2_rstd", 2, N, dtype="float32"),
            stacked("fc", 3, N, 2, F),  # gate and up projection
            stacked("swiglu", 1, N, F),
            stacked("res_mlp", MAX_RECOMPUTE + 1, N, C),  # residual stream after the MLP
            TensorSpec("lnf", (N, C)),
            TensorSpec("lnf_rstd", (N,), "float32"),
        )
        losses = (
            TensorSpec("logits", (N, c.padded_vocab_size)),  # their gradient, after the classifier
            TensorSpec("losses", (N,), "float32"),
        )
        scratch = (
            # The output of a projection, before it is added to the residual stream. In the backward
            # pass the gradient of the output of a norm or of attention.
            TensorSpec("proj", (N, C)),
            TensorSpec("tokens", (B, T), "int32"),
            TensorSpec("starts", (B,), "int32"),  # position of the first token of each sequence
            TensorSpec("targets", (N,), "int32"),
        )
        backward = (
            TensorSpec("dres", (N, C)),  # gradient of the residual stream
            TensorSpec("dswiglu", (N, F)),
            TensorSpec("dfc", (N, 2, F)),
            TensorSpec("dqkv", (B, T, R, D), shares="dfc" if R * D < 2 * F else ""),
            TensorSpec("delta", (B, H, T), "float32"),
            TensorSpec("order", (N,), "int32"),
        )
        return (
            *kept,
            *(losses if with_logits else ()),
            *scratch,
            *(backward if training else ()),
        )

    @staticmethod
    def constants(c: LlamaConfig, T: int) -> tuple[TensorSpec, ...]:
        """Returns the table of RoPE's angles."""
        return (TensorSpec("angles", (T, c.head_size), "float32"),)

    @property
    def head(self) -> Array:
        return self.params.wte if self.config.tie_word_embeddings else self.params.head

    def hidden(self, a: SimpleNamespace) -> None:
        c, p, o = self.config, self.params, self.ops
        (B, T), C, eps = a.tokens.shape, c.n_embd, c.rms_norm_eps
        o.token_embedding_fwd(a.embedded.reshape(B, T, C), a.tokens, p.wte)
        self._first_norm(a, 0)
        for l in range(c.n_layer):
            x, w = a.layers[l], self._layer_params[l]
            self._block(a, l)
            self._linear(a.proj, x.swiglu, w.fcprojw)
            if l + 1 < c.n_layer:
                y, v = a.layers[l + 1], self._layer_params[l + 1]
                o.residual_rmsnorm_fwd(x.res_mlp, y.ln1, y.ln1_rstd, x.res_att, a.proj, v.ln1w, eps)
            else:
                o.residual_rmsnorm_fwd(x.res_mlp, a.lnf, a.lnf_rstd, x.res_att, a.proj, p.lnfw, eps)

    def _first_norm(self, a: SimpleNamespace, l: int) -> None:
        x, w = a.layers[l], self._layer_params[l]
        self.ops.rmsnorm_fwd(x.ln1, x.ln1_rstd, x.residual, w.ln1w, self.config.rms_norm_eps)

    def _block(self, a: SimpleNamespace, l: int) -> None:
        """Layer l after its first norm, up to and including SwiGLU."""
        c, o, x, w = self.config, self.ops, a.layers[l], self._layer_params[l]
        N, C = a.proj.shape
        self._linear(x.qkv.reshape(N, -1), x.ln1, w.qkvw)
        o.rope_fwd(x.qkv, a.starts, self._angles, c.n_kv_head)
        self._attention(a, l)
        self._linear(a.proj, x.att.reshape(N, C), w.attprojw)
        o.residual_rmsnorm_fwd(
            x.res_att, x.ln2, x.ln2_rstd, x.residual, a.proj, w.ln2w, c.rms_norm_eps
        )
        self._linear(x.fc.reshape(N, -1), x.ln2, w.fcw)
        o.swiglu_fwd(x.swiglu, x.fc)

    def _linear(self, y: Array, x: Array, w: Array) -> None:
        """y (N, O) = x (N, I) times the transpose of the weight w (O, I)."""
        self.ops.matmul(y, x, w.T)

    def _recompute(self, a: SimpleNamespace, l: int) -> None:
        """Recomputes the activations that layer l shares with other layers.

        Those of the last layer are still in the buffer.
        """
        if self.recompute == 0 or l == self.config.n_layer - 1:
            return
        o, x, w = self.ops, a.layers[l], self._layer_params[l]
        if self.recompute >= 2:
            self._first_norm(a, l)
        if self.recompute == 3:
            self._block(a, l)
            return
        if self.recompute == 2:
            o.rmsnorm_fwd(x.ln2, x.ln2_rstd, x.res_att, w.ln2w, self.config.rms_norm_eps)
        o.swiglu_fwd(x.swiglu, x.fc)

    def _backward(self, a: SimpleNamespace, *, accumulate: bool) -> None:
        c, p, g, o = self.config, self.params, self.grads, self.ops
        (B, T), C = a.tokens.shape, c.n_embd
        N = B * T
        if not accumulate:
            # The matmuls of the first micro-step overwrite; all other ops only add.
            o.device.fill_zero(self.grad_arena[self.decayed :])
            if not c.tie_word_embeddings:
                o.device.fill_zero(g.wte)
        dlogits, dres, dln = a.logits, a.dres, a.proj
        dhead = g.wte if c.tie_word_embeddings else g.head
        self._matmul_bwd(dln, dhead, dlogits, a.lnf, self.head, accumulate)
        o.device.fill_zero(dres)
        o.rmsnorm_bwd(dres, g.lnfw, dln, a.layers[-1].res_mlp, p.lnfw, a.lnf_rstd)
        for l in reversed(range(c.n_layer)):
            x, w, dw = a.layers[l], self._layer_params[l], self._layer_grads[l]
            self._recompute(a, l)
            # The MLP. dres is the gradient of fcproj's output and, unchanged, of res_att.
            self._matmul_bwd(a.dswiglu, dw.fcprojw, dres, x.swiglu, w.fcprojw, accumulate)
            o.swiglu_bwd(a.dfc, a.dswiglu, x.fc)
            self._matmul_bwd(dln, dw.fcw, a.dfc.reshape(N, -1), x.ln2, w.fcw, accumulate)
            o.rmsnorm_bwd(dres, dw.ln2w, dln, x.res_att, w.ln2w, x.ln2_rstd)
            # Attention. dres is the gradient of attproj's output and of the layer's input.
            att = x.att.reshape(N, C)
            self._matmul_bwd(dln, dw.attprojw, dres, att, w.attprojw, accumulate)
            o.attention_bwd(a.dqkv, a.delta, dln.reshape(x.att.shape), x.qkv, x.att, x.lse)
            o.rope_bwd(a.dqkv, a.starts, self._angles, c.n_kv_head)
            dqkv = a.dqkv.reshape(N, -1)
            self._matmul_bwd(dln, dw.qkvw, dqkv, x.ln1, w.qkvw, accumulate)
            o.rmsnorm_bwd(dres, dw.ln1w, dln, x.residual, w.ln1w, x.ln1_rstd)
        o.token_embedding_bwd(g.wte, dres.reshape(B, T, C), a.tokens, a.order)
