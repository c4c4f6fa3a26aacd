"""GPT-2 (Radford et al. 2019): its tables of tensors, and its forward and backward pass as ops."""

from __future__ import annotations

from types import SimpleNamespace

from gpu_gpt2.config import MAX_RECOMPUTE, GPT2Config
from gpu_gpt2.device.base import Array
from gpu_gpt2.models.arena import TensorSpec, layer_matrices
from gpu_gpt2.models.model import Model


class GPT2(Model):
    """A GPT-2; see Model for the arguments."""

    config: GPT2Config

    @staticmethod
    def parameters(c: GPT2Config) -> tuple[TensorSpec, ...]:
        """Returns the sixteen parameter tensors.

        Weights are (out, in). Names are llm.c's. "residual" initialises like "normal" with the
        standard deviation divided by sqrt(2 L) (Radford et al. 2019, section 2.3).
        """
        L, C, Vp = c.n_layer, c.n_embd, c.padded_vocab_size
        return (
            TensorSpec("wte", (Vp, C), init="normal", decay=True, rows=c.vocab_size),
            TensorSpec("wpe", (c.n_positions, C), init="normal", decay=True),
            layer_matrices("qkvw", L, (C, C, C), C, init="normal"),
            layer_matrices("attprojw", L, (C,), C, init="residual"),
            layer_matrices("fcw", L, (4 * C,), C, init="normal"),
            layer_matrices("fcprojw", L, (C,), 4 * C, init="residual"),
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

    @staticmethod
    def activations(
        c: GPT2Config,
        B: int,
        T: int,
        *,
        recompute: int = 0,
        training: bool = True,
        with_logits: bool = True,
    ) -> tuple[TensorSpec, ...]:
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
            stacked("qkv", 3, B, T, 3 * H, D),
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
        )
        losses = (
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
            TensorSpec("dqkv", (B, T, 3 * H, D), shares="dfc"),
            TensorSpec("delta", (B, H, T), "float32"),
            TensorSpec("order", (N,), "int32"),
        )
        return (
            *kept,
            *(losses if with_logits else ()),
            *scratch,
            *(backward if training else ()),
        )

    @property
    def head(self) -> Array:
        return self.params.wte

    def hidden(self, a: SimpleNamespace) -> None:
        """Forward pass of the tokens that lie in `a`, up to and including the last layernorm."""
        c, p, o = self.config, self.params, self.ops
        (B, T), C, eps = a.tokens.shape, c.n_embd, c.layer_norm_epsilon
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
        self._attention(a, l)
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
            o.device.fill_zero(self.grad_arena[self.decayed :])
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
        self._matmul_bwd(dx, dw, dy, x, w, accumulate)
