"""The table of contents: every operation of the model, its tensors, shapes and dtypes.

Two classes implement it: `reference.ReferenceOps` in NumPy and `kernels.KernelOps` as launches of
the files in kernels/. Both are called the same way:

- Order of arguments: outputs, inputs, saved statistics, sizes, scalars. Sizes come from shapes.
- `=` means the output is overwritten, `+=` that it is added to. Parameter gradients are always
  `+=`, so that micro-batches accumulate.
- X is the dtype of activations and weights: float32, or bfloat16 on devices with kernels. Saved
  statistics, losses and parameter gradients are float32 whatever X is; sums are kept in float32.
- Letters: B batch, T time, C channels, H heads, D = C / H, V vocabulary, Vp padded vocabulary,
  N = B * T rows. All arrays are C-contiguous. Inputs and outputs do not overlap unless said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from gpu_gpt2.device.base import Array, Device

GROWTH_INTERVAL: Final = 2000  # updates in a row after which the loss scale doubles
MIN_LOSS_SCALE: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """What is the same in all AdamW updates of a run (Loshchilov & Hutter 2019, algorithm 2)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float  # gradients are scaled down to this norm when above it
    max_loss_scale: float = 1.0  # a power of two


class Ops(ABC):
    """The operations of GPT-2, forward and backward, on one device."""

    device: Device
    dtype: str  # the name of X: "fp32", "bf16" or "fp16"

    # --- embedding: kernels/embedding.cu ---

    @abstractmethod
    def embedding_fwd(self, x: Array, tokens: Array, wte: Array, wpe: Array) -> None:
        """x (B, T, C) X = wte[tokens] + wpe[t].

        tokens (B, T) int32, each < V; wte (Vp, C) X; wpe (>= T, C) X.
        """

    @abstractmethod
    def embedding_bwd(
        self, dwte: Array, dwpe: Array, dx: Array, tokens: Array, order: Array
    ) -> None:
        """dwte (Vp, C) float32 += the rows of dx by token; dwpe (>= T, C) float32 += sum over B.

        dx (B, T, C) X; tokens (B, T) int32; order (B * T,) int32 is the stable argsort of the
        flattened tokens: rows of one token lie together, so each is summed in one fixed order
        without atomics.
        """

    # --- layernorm, alone and fused with the residual sum: kernels/layernorm.cu ---

    @abstractmethod
    def layernorm_fwd(
        self, y: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array
    ) -> None:
        """y (N, C) X = (x - mean) * rstd * w + b over each row (Ba et al. 2016).

        mean, rstd (N,) float32 =; x (N, C) X; w, b (C,) X. rstd = 1 / sqrt(variance + 1e-5),
        the variance taken around the mean and divided by C.
        """

    @abstractmethod
    def residual_layernorm_fwd(
        self,
        r: Array,
        y: Array,
        mean: Array,
        rstd: Array,
        x1: Array,
        x2: Array,
        bias: Array,
        w: Array,
        b: Array,
    ) -> None:
        """r (N, C) X = x1 + x2 + bias, rounded to X, then y, mean, rstd = layernorm of that r.

        x1, x2 (N, C) X, bias (C,) X; the rest as in `layernorm_fwd`.
        """

    @abstractmethod
    def layernorm_bwd(
        self,
        dx: Array,
        dw: Array,
        db: Array,
        dy: Array,
        x: Array,
        w: Array,
        mean: Array,
        rstd: Array,
    ) -> None:
        """dx (N, C) X +=; dw, db (C,) float32 +=; dy, x (N, C) X; w (C,) X; mean, rstd (N,)."""

    # --- causal self-attention: kernels/attention.cu ---

    @abstractmethod
    def attention_fwd(self, y: Array, lse: Array, qkv: Array) -> None:
        """y (B, T, H, D) X = softmax(q k^T / sqrt(D), over t2 <= t) v.

        lse (B, H, T) float32 = log of the sum of exponentials of the scaled scores;
        qkv (B, T, 3, H, D) X holds q, k and v (Dao 2023, algorithm 1).
        """

    @abstractmethod
    def attention_bwd(
        self, dqkv: Array, delta: Array, dy: Array, qkv: Array, y: Array, lse: Array
    ) -> None:
        """dqkv (B, T, 3, H, D) X =; delta (B, H, T) float32 = sum over D of dy * y.

        dy, y (B, T, H, D) X; qkv (B, T, 3, H, D) X; lse (B, H, T) float32 (Dao 2023, algorithm 2).
        """

    # --- softmax: kernels/softmax.cu ---

    @abstractmethod
    def softmax_fwd(self, y: Array, x: Array) -> None:
        """y (N, V) X = exp(x - max) / sum over each row; x (N, V) X; y may be x."""

    @abstractmethod
    def softmax_bwd(self, dx: Array, dy: Array, y: Array) -> None:
        """dx (N, V) X = y * (dy - sum(dy * y)); dy, y (N, V) X; dx may be dy."""

    # --- GELU: kernels/gelu.cu ---

    @abstractmethod
    def gelu_fwd(self, y: Array, x: Array, b: Array) -> None:
        """y (N, O) X = 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), z = x + b.

        x (N, O) X; b (O,) X is added to every row.
        """

    @abstractmethod
    def gelu_bwd(self, dx: Array, dy: Array, x: Array, b: Array) -> None:
        """dx (N, O) X = dy * the derivative of GELU at x + b; dx may be dy; shapes as forward."""

    # --- bias: kernels/bias.cu ---

    @abstractmethod
    def bias_fwd(self, y: Array, b: Array) -> None:
        """y (N, O) X += b (O,) X on every row."""

    @abstractmethod
    def bias_bwd(self, db: Array, dy: Array) -> None:
        """db (O,) float32 += the sum of the rows of dy (N, O) X."""

    # --- fused classifier: kernels/classifier.cu ---

    @abstractmethod
    def classifier_fwd(self, losses: Array, logits: Array, targets: Array, vocab_size: int) -> None:
        """losses (N,) float32 += -log softmax(logits[:, :V])[target].

        logits (N, Vp) X, whose columns from V on are never read; targets (N,) int32 in [0, V).
        """

    @abstractmethod
    def classifier_fwd_bwd(
        self,
        losses: Array,
        logits: Array,
        targets: Array,
        loss_scale: Array,
        vocab_size: int,
        dloss: float,
    ) -> None:
        """`classifier_fwd`, and logits become their gradient in the same pass.

        logits[:, :V] = (softmax - onehot(target)) * dloss * loss_scale; logits[:, V:] = 0;
        loss_scale (1,) float32.
        """

    # --- optimizer: kernels/adamw.cu, kernels/squared_norm.cu ---

    @abstractmethod
    def squared_norm(self, out: Array, x: Array) -> None:
        """out (1,) float32 = sum of x^2; x (n,) float32; the same bits on every run."""

    @abstractmethod
    def prepare_update(
        self,
        factors: Array,
        report: Array,
        loss_scale: Array,
        counts: Array,
        losses: Array,
        grad_sq: Array,
        lr: Array,
        loss_weight: float,
        settings: AdamWSettings,
    ) -> None:
        """The numbers that `adamw` needs for its next update, and those of interest to people.

        All float32. factors (5,) = apply (1, or 0 where the gradient is not finite), factor of the
        gradient, lr, c1, c2; report (3,) = the sum of losses times loss_weight, the gradient's norm
        without its scale, the new loss_scale. loss_scale (1,) halves after a gradient that is not
        finite, doubles after GROWTH_INTERVAL updates in a row, and stays within MIN_LOSS_SCALE and
        the settings' maximum. counts (2,): updates made, and those in a row since the scale last
        changed. losses (N,), lr (1,); grad_sq (1,), the squared norm of the gradient in its scale.
        """

    @abstractmethod
    def adamw(
        self,
        master: Array,
        m: Array,
        v: Array,
        param: Array,
        grad: Array,
        factors: Array,
        decayed: int,
        settings: AdamWSettings,
    ) -> None:
        """One AdamW update of all parameters in place, with the gradient clipped to its norm.

        master, m, v (n,) float32 updated; param (n,) X = master rounded to X (with X = float32
        param is master itself); grad (n,) float32; factors (5,) float32 of `prepare_update`; only
        the first `decayed` elements are decayed. If factors say so, nothing changes.
        """

    # --- casts: kernels/cast.cu ---

    @abstractmethod
    def cast(self, y: Array, x: Array) -> None:
        """y = x in y's dtype, rounded to nearest even; both of one shape, float32 or bfloat16."""

    # --- matrix products: NumPy's BLAS or cuBLAS ---

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        """out (M, N) = a (M, K) @ b (K, N), or += with `accumulate`; see Device.matmul."""
        self.device.matmul(out, a, b, accumulate=accumulate)
