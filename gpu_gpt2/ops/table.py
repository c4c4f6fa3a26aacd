"""The table of ops: every operation of the model once, read by people and by machines.

Each method of `Ops` carries a row: its tensors in the order of the arguments, with shape, dtype and
role. "mean, rstd (N) float32 =" stands for two tensors.

- Role: `=` is overwritten; `+=` is read and updated, that is added to unless the docstring says
  otherwise; a tensor without either is only read. Parameter gradients are always `+=`, so that
  micro-batches accumulate.
- Order: outputs, inputs, saved statistics, then scalars, which are not in the row. Sizes come from
  the shapes.
- Shape: B batch, T time, C channels, H query heads, D head size, G key/value heads, R = H + 2 G
  heads of a packed row of q, k and v, S positions of a KV cache, I and O columns of a linear
  layer's input and output, K the smaller of both, F hidden width of Llama's MLP, J groups of an
  int8 row, V vocabulary, Vp padded vocabulary, N = B * T rows, n elements of a flat array. A letter
  has one value in all tensors of a call; `>= T` is any size from T on, and `B * T` a product.
- Pairs of RoPE are neighbours: elements 2 j and 2 j + 1 of a head.
- dtype: X is that of activations and weights: float32, bfloat16 or float16. Saved statistics,
  losses and parameter gradients are float32 whatever X is, and sums are kept in float32. `any` is
  float32, bfloat16 or float16, whichever the tensor has. int8 is that of quantized matrices.
- All arrays are C-contiguous. Outputs do not overlap other tensors unless the docstring says so.

Two classes implement the table: `reference.ReferenceOps` in NumPy and `kernels.KernelOps` as
launches of the files in kernels/. The launches take their checks and sizes from the rows,
`cases` the tensors of `gpu-gpt2 check`, and `gpu-gpt2 bench` the bytes that an op must move;
tests/test_table.py compares methods, launches and the signatures in kernels/ with them.
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np

from gpu_gpt2.device.base import FLOAT32, INT8, INT32, X_DTYPES, Array, Device
from gpu_gpt2.errors import ConfigError, LaunchError

MAX_SIZE: Final = 2**30  # largest dimension and most rows, so that no int counter overflows
MAX_ELEMENTS: Final = 2**63 - 1  # largest n: kernels count elements of flat arrays in 64 bits
GROWTH_INTERVAL: Final = 2000  # good steps after which the loss scale doubles, as PyTorch's does
MIN_LOSS_SCALE: Final = 1.0  # the scale keeps small gradients; below 1 it would lose them
WINDOW: Final = 128  # losses, and gradient norms, among which outliers are found, as in llm.c
# Why a step made no update, numbered as in Report.skipped; "" stands for an update.
SKIPPED: Final = ("", "loss spike", "gradient spike", "not finite", "halted")
ANY: Final = tuple(X_DTYPES.values())  # the dtypes that "any" stands for
# The dtypes that a row names themselves.
FIXED_DTYPES: Final[dict[str, np.dtype[Any]]] = {"float32": FLOAT32, "int32": INT32, "int8": INT8}
# Coefficients a, b and c of Muon's iteration, which turns each singular value s into a s + b s^3 +
# c s^5, and the least norm that it divides by (Jordan et al. 2024; those of torch.optim.Muon).
MUON_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
MUON_EPS: Final = 1e-7
# Most columns that `sample` draws from: so many weights of at most 2^40 sum to at most 2^62.
MAX_VOCABULARY: Final = 2**22
LOG2_E: Final = 1.0 / math.log(2.0)
# Largest scale of `sample`. GPUs take float32 numbers below 2^-126 for 0. Up to this scale that
# changes no weight: logits so close that it could change their difference have equal weights.
MAX_SAMPLE_SCALE: Final = 2.0**75

ROW_TEXT: Final = re.compile(r"(\w+(?:, \w+)*) \(([^)]+)\) (X|float32|int32|int8|any)(?: (\+?=))?")


@dataclass(frozen=True, slots=True)
class OpTensor:
    """One tensor of a row: `wpe (>= T, C) X` has the shape (">= T", "C"), "X" and the role "in"."""

    name: str
    shape: tuple[str, ...]  # each a number, a letter, a bound ">= T" or a product "B * T"
    dtype: str  # "X", "float32", "int32", "int8" or "any"
    role: str  # "=", "+=" or "in"

    def __str__(self) -> str:
        role = "" if self.role == "in" else f" {self.role}"
        return f"{self.name} ({', '.join(self.shape)}) {self.dtype}{role}"


TABLE: Final[dict[str, tuple[OpTensor, ...]]] = {}  # the row of each op, filled by `tensors`

Method = TypeVar("Method", bound=Callable[..., None])
# Shape and dtype of each tensor of a call.
Layout: TypeAlias = tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]


def tensors(*texts: str) -> Callable[[Method], Method]:
    """Gives a method of Ops its row."""
    row = []
    for text in texts:
        match = ROW_TEXT.fullmatch(text)
        assert match, f"{text!r} is not like 'x, y (N, C) X ='"
        names, shape, dtype, role = match.groups()
        for name in names.split(", "):
            row.append(OpTensor(name, tuple(shape.split(", ")), dtype, role or "in"))

    def enter(method: Method) -> Method:
        TABLE[method.__name__] = tuple(row)
        return method

    return enter


@functools.lru_cache(maxsize=4096)  # a training step asks the same about 300 times
def sizes(op: str, letters: str, X: np.dtype[Any], layout: Layout) -> tuple[int, ...]:
    """Returns the sizes that `letters` ("B T C") name in a call of `op` with this layout.

    Raises ValueError if a shape, LaunchError if a dtype and ConfigError if a size does not fit the
    row; the message names the op and the tensor or letter.
    """
    row = TABLE[op]
    found: dict[str, int] = {}
    for tensor, (shape, _) in zip(row, layout, strict=True):
        for item, size in zip(tensor.shape, shape, strict=False):
            if item.isalpha():
                found.setdefault(item, size)
        if len(shape) != len(tensor.shape):
            raise _wrong_shape(op, tensor, shape, found)
    for tensor, (shape, dtype) in zip(row, layout, strict=True):
        for item, size in zip(tensor.shape, shape, strict=True):
            if not _fits(item, size, found):
                raise _wrong_shape(op, tensor, shape, found)
            at_most(op, item, size, MAX_ELEMENTS if item == "n" else MAX_SIZE)
        allowed = {"X": (X,), "any": ANY}.get(tensor.dtype) or (FIXED_DTYPES[tensor.dtype],)
        if dtype not in allowed:
            expected = " or ".join(map(str, allowed))
            raise LaunchError(f"{op}: {tensor.name}: expected dtype {expected}, got {dtype}")
    return tuple(found[letter] for letter in letters.split())


def _wrong_shape(
    op: str, tensor: OpTensor, shape: tuple[int, ...], found: dict[str, int]
) -> ValueError:
    known = ", ".join(f"{letter} = {size}" for letter, size in found.items())
    expected = f"({', '.join(tensor.shape)}) with {known}"
    return ValueError(f"{op}: {tensor.name} is {shape}, expected {expected}")


def _fits(item: str, size: int, found: dict[str, int]) -> bool:
    """True if an item of a shape allows `size`, given the sizes of all letters."""
    if item.isdigit():
        return size == int(item)
    if item.startswith(">= "):
        return size >= found[item.removeprefix(">= ")]
    return size == math.prod(found[letter] for letter in item.split(" * "))


def at_most(op: str, name: str, size: int, limit: int) -> int:
    """Returns `size`; raises ConfigError, naming both, unless it is from 1 to `limit`."""
    if not 1 <= size <= limit:
        raise ConfigError(f"{op}: {name} = {size} must be 1 to {limit}")
    return size


def kv_heads(op: str, R: int, H: int) -> int:
    """Returns G, the key/value heads of rows of R = H + 2 G heads. Raises as `check_heads` does."""
    G = (R - H) // 2
    check_heads(op, R, H, G)
    return G


def check_heads(op: str, R: int, H: int, G: int) -> None:
    """Raises ConfigError unless R = H + 2 G, and G key/value heads can share H query heads."""
    if min(H, G) < 1 or R != H + 2 * G or H % G:
        raise ConfigError(
            f"{op}: rows of R = {R} heads do not fit H = {H} query heads and G = {G} key/value "
            f"heads; R must be H + 2 G, and H a multiple of G"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """The settings of AdamW, the same in all updates (Loshchilov & Hutter 2019, algorithm 2)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float  # gradients are scaled down to this norm when above it
    max_loss_scale: float = 1.0  # a power of two
    # A step whose loss or gradient norm has a z-score above these makes no update; 0 turns it off.
    max_loss_zscore: float = 0.0
    max_grad_zscore: float = 0.0
    halt: bool = True  # a step that diverged stops all later updates


class Factors(NamedTuple):
    """The elements of `factors` (5): the scalars of an update, which `prepare_update` computes."""

    apply: float  # 1, or 0 if the step makes no update
    grad_factor: float  # min(1, max_grad_norm / norm) / loss_scale
    lr: float
    c1: float  # 1 - beta1^t
    c2: float  # 1 - beta2^t


class Report(NamedTuple):
    """The elements of `report` (7): results of a step, for the host to read."""

    loss: float  # the sum of the losses times loss_weight
    norm: float  # norm of the gradient without its scale, before clipping
    loss_scale: float  # loss scale of the next step
    scaled_by: float  # loss scale of this step
    loss_zscore: float  # z-score of the loss among the last WINDOW; NaN until there are so many
    grad_zscore: float  # z-score of the norm among the last WINDOW
    skipped: float  # index into SKIPPED


class Counts(NamedTuple):
    """The elements of `counts` (3): the state that `prepare_update` keeps between steps."""

    updates: float  # t, the number of updates made
    good_steps: float  # updates made since loss_scale last changed
    halted: float  # 1 if a step has diverged and nothing may change; else 0


class SampleScalars(NamedTuple):
    """The scalars of `sample` as every device uses them; `sampling` makes them."""

    scale: float  # log2(e) / temperature as a float32; 0 for the argmax
    top_k: int  # 0 if off
    share: int  # top_p times 2^63, 0 if off


def sample_scalars(vocab_size: int, temperature: float, top_k: int, top_p: float) -> SampleScalars:
    """Returns the scalars of `sample` for these settings.

    Raises ConfigError for a setting that is negative or not finite, and for a vocabulary of more
    than MAX_VOCABULARY tokens.
    """
    at_most("sample", "vocab_size", vocab_size, MAX_VOCABULARY)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"sample: {name} = {value} must be a finite number >= 0")
    scale = 0.0
    if temperature > 0:
        # Not 0 in float32, however high the temperature is.
        smallest = np.finfo(np.float32).tiny
        scale = float(np.float32(np.clip(LOG2_E / temperature, smallest, MAX_SAMPLE_SCALE)))
    return SampleScalars(
        scale=scale,
        top_k=top_k if top_k < vocab_size else 0,
        share=max(1, int(top_p * 2.0**63)) if 0 < top_p < 1 else 0,
    )


class Ops(ABC):
    """The operations of GPT-2 and Llama, forward and backward, on one device."""

    device: Device
    dtype: str  # X: "fp32", "bf16" or "fp16"

    # --- embedding: kernels/embedding.cu ---

    @tensors(
        "x (B, T, C) X =",
        "tokens (B, T) int32",
        "starts (B) int32",
        "wte (Vp, C) X",
        "wpe (>= T, C) X",
    )
    @abstractmethod
    def embedding_fwd(self, x: Array, tokens: Array, starts: Array, wte: Array, wpe: Array) -> None:
        """x = wte[tokens] + wpe[starts + t]; tokens are in [0, V), and one below 0 counts as 0.

        starts[b] is the position of the first token of sequence b: 0 in training. wpe has a row for
        every position.
        """

    @tensors(
        "dwte (Vp, C) float32 +=",
        "dwpe (>= T, C) float32 +=",
        "dx (B, T, C) X",
        "tokens (B, T) int32",
        "order (B * T) int32",
    )
    @abstractmethod
    def embedding_bwd(
        self, dwte: Array, dwpe: Array, dx: Array, tokens: Array, order: Array
    ) -> None:
        """dwte += the rows of dx by token; dwpe[:T] += the sum of dx over B: all starts are 0.

        `order` is the stable argsort of the flattened tokens: rows of one token lie together, so
        each token's rows are summed in one fixed order without atomics.
        """

    # --- token embedding without positions: kernels/embedding.cu ---

    @tensors("x (B, T, C) X =", "tokens (B, T) int32", "wte (Vp, C) X")
    @abstractmethod
    def token_embedding_fwd(self, x: Array, tokens: Array, wte: Array) -> None:
        """x = wte[tokens]; tokens are in [0, V), and one below 0 counts as 0."""

    @tensors(
        "dwte (Vp, C) float32 +=",
        "dx (B, T, C) X",
        "tokens (B, T) int32",
        "order (B * T) int32",
    )
    @abstractmethod
    def token_embedding_bwd(self, dwte: Array, dx: Array, tokens: Array, order: Array) -> None:
        """dwte += the rows of dx by token; `order` is that of `embedding_bwd`."""

    # --- layernorm, alone and fused with the residual sum: kernels/layernorm.cu ---

    @tensors("y (N, C) X =", "mean, rstd (N) float32 =", "x (N, C) X", "w, b (C) X")
    @abstractmethod
    def layernorm_fwd(
        self, y: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float
    ) -> None:
        """y = (x - mean) * rstd * w + b over each row (Ba et al. 2016).

        rstd = 1 / sqrt(variance + eps), the variance taken around the mean and divided by C.
        """

    @tensors("r, y (N, C) X =", "mean, rstd (N) float32 =", "x1, x2 (N, C) X", "bias, w, b (C) X")
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
        eps: float,
    ) -> None:
        """r = x1 + x2 + bias, rounded to X, then y, mean, rstd = `layernorm_fwd` of that r."""

    @tensors(
        "dx (N, C) X +=",
        "dw, db (C) float32 +=",
        "dy, x (N, C) X",
        "w (C) X",
        "mean, rstd (N) float32",
    )
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
        """dx, dw, db += the gradients of `layernorm_fwd` with respect to x, w and b."""

    # --- RMSNorm, alone and fused with the residual sum: kernels/rmsnorm.cu ---

    @tensors("y (N, C) X =", "rstd (N) float32 =", "x (N, C) X", "w (C) X")
    @abstractmethod
    def rmsnorm_fwd(self, y: Array, rstd: Array, x: Array, w: Array, eps: float) -> None:
        """y = x * rstd * w over each row, rstd = 1 / sqrt(sum(x^2) / C + eps).

        Source: Zhang & Sennrich 2019, equation 4.
        """

    @tensors("r, y (N, C) X =", "rstd (N) float32 =", "x1, x2 (N, C) X", "w (C) X")
    @abstractmethod
    def residual_rmsnorm_fwd(
        self, r: Array, y: Array, rstd: Array, x1: Array, x2: Array, w: Array, eps: float
    ) -> None:
        """r = x1 + x2, rounded to X, then y, rstd = `rmsnorm_fwd` of that r."""

    @tensors(
        "dx (N, C) X +=",
        "dw (C) float32 +=",
        "dy, x (N, C) X",
        "w (C) X",
        "rstd (N) float32",
    )
    @abstractmethod
    def rmsnorm_bwd(self, dx: Array, dw: Array, dy: Array, x: Array, w: Array, rstd: Array) -> None:
        """dx, dw += the gradients of `rmsnorm_fwd` with respect to x and w."""

    # --- rotary position embedding: kernels/rope.cu ---

    @tensors("qkv (B, T, R, D) X +=", "starts (B) int32", "angles (>= T, D) float32")
    @abstractmethod
    def rope_fwd(self, qkv: Array, starts: Array, angles: Array, kv_heads: int) -> None:
        """Rotates the queries and keys of qkv in place by the angles of their positions.

        Each pair (a, b) of elements 2 j and 2 j + 1 of the heads 0 ... R - kv_heads - 1 becomes
        (a cos - b sin, a sin + b cos), with cos = angles[p, 2 j], sin = angles[p, 2 j + 1] and the
        position p = starts[b] + t (Su et al. 2021, equation 34). D is even; angles has a row for
        every position.
        """

    @tensors("dqkv (B, T, R, D) X +=", "starts (B) int32", "angles (>= T, D) float32")
    @abstractmethod
    def rope_bwd(self, dqkv: Array, starts: Array, angles: Array, kv_heads: int) -> None:
        """Rotates back what `rope_fwd` has rotated: the gradient of its output becomes its input's.

        The tensors are as in `rope_fwd`.
        """

    # --- causal self-attention: kernels/attention.cu, kernels/flash_attention.cu ---

    @tensors("y (B, T, H, D) X =", "lse (B, H, T) float32 =", "qkv (B, T, R, D) X")
    @abstractmethod
    def attention_fwd(self, y: Array, lse: Array, qkv: Array) -> None:
        """y = softmax(q k^T / sqrt(D), over t2 <= t) v (Dao 2023, algorithm 1).

        lse = log of the sum of exponentials of the scaled scores. A row of qkv has R = H + 2 G
        heads: H of q, then G of k, then G of v. Query head h uses head h / (H / G) of k and v
        (Ainslie et al. 2023). ConfigError if there is no such G, or if it does not divide H.
        """

    @tensors(
        "dqkv (B, T, R, D) X =",
        "delta (B, H, T) float32 =",
        "dy (B, T, H, D) X",
        "qkv (B, T, R, D) X",
        "y (B, T, H, D) X",
        "lse (B, H, T) float32",
    )
    @abstractmethod
    def attention_bwd(
        self, dqkv: Array, delta: Array, dy: Array, qkv: Array, y: Array, lse: Array
    ) -> None:
        """dqkv = the gradients of q, k and v (Dao 2023, algorithm 2); delta = sum over D of dy * y.

        y and lse are the outputs of `attention_fwd`. The gradients of a head of k and v are sums
        over the query heads that use it.
        """

    # --- decoding with a KV cache: kernels/kv_cache.cu, kernels/attention_decode.cu ---

    @tensors("k, v (B, G, S, D) X +=", "qkv (B, T, R, D) X", "starts (B) int32")
    @abstractmethod
    def kv_append(self, k: Array, v: Array, qkv: Array, starts: Array) -> None:
        """Copies the keys and values of qkv into a cache, from position starts[b] >= 0 on.

        k[b, g, starts[b] + t] = qkv[b, t, R - 2 G + g], v[b, g, starts[b] + t] = qkv[b, t, R - G +
        g]. Positions from S on are dropped, and all other positions of the cache are unchanged.
        """

    @tensors(
        "y (B, 1, H, D) X =",
        "qkv (B, 1, R, D) X",
        "k, v (B, G, S, D) X",
        "starts (B) int32",
    )
    @abstractmethod
    def attention_decode(self, y: Array, qkv: Array, k: Array, v: Array, starts: Array) -> None:
        """y = softmax(q k^T / sqrt(D), over positions 0 ... starts[b] of the cache) v.

        The query of sequence b is at position starts[b], from 0 to S - 1 (a larger one sees all S
        positions). Its own key and value are read from the cache: `kv_append` comes first. Of qkv
        only q is read, and of the cache nothing behind starts[b].
        """

    # --- softmax: kernels/softmax.cu ---

    @tensors("y (N, V) X =", "x (N, V) X")
    @abstractmethod
    def softmax_fwd(self, y: Array, x: Array) -> None:
        """y = exp(x - max) / sum over each row; y may be x."""

    @tensors("dx (N, V) X =", "dy, y (N, V) X")
    @abstractmethod
    def softmax_bwd(self, dx: Array, dy: Array, y: Array) -> None:
        """dx = y * (dy - sum(dy * y)) over each row; dx may be dy."""

    # --- GELU: kernels/gelu.cu ---

    @tensors("y (N, O) X =", "x (N, O) X", "b (O) X")
    @abstractmethod
    def gelu_fwd(self, y: Array, x: Array, b: Array) -> None:
        """y = 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), z = x + b."""

    @tensors("dx (N, O) X =", "dy, x (N, O) X", "b (O) X")
    @abstractmethod
    def gelu_bwd(self, dx: Array, dy: Array, x: Array, b: Array) -> None:
        """dx = dy * the derivative of GELU at x + b; dx may be dy."""

    # --- SwiGLU: kernels/swiglu.cu ---

    @tensors("y (N, F) X =", "u (N, 2, F) X")
    @abstractmethod
    def swiglu_fwd(self, y: Array, u: Array) -> None:
        """y = silu(u[:, 0]) * u[:, 1], silu(z) = z / (1 + exp(-z)) (Shazeer 2020, equation 6)."""

    @tensors("du (N, 2, F) X =", "dy (N, F) X", "u (N, 2, F) X")
    @abstractmethod
    def swiglu_bwd(self, du: Array, dy: Array, u: Array) -> None:
        """du = the gradient of `swiglu_fwd` with respect to u."""

    # --- bias: kernels/bias.cu ---

    @tensors("y (N, O) X +=", "b (O) X")
    @abstractmethod
    def bias_fwd(self, y: Array, b: Array) -> None:
        """y += b on every row."""

    @tensors("db (O) float32 +=", "dy (N, O) X")
    @abstractmethod
    def bias_bwd(self, db: Array, dy: Array) -> None:
        """db += the sum of the rows of dy."""

    # --- fused classifier: kernels/classifier.cu ---

    @tensors("losses (N) float32 +=", "logits (N, Vp) X", "targets (N) int32")
    @abstractmethod
    def classifier_fwd(self, losses: Array, logits: Array, targets: Array, vocab_size: int) -> None:
        """losses += -log softmax(logits[:, :V])[target], with V = vocab_size.

        The columns of logits from V on are never read; targets are in [0, V).
        """

    @tensors(
        "losses (N) float32 +=",
        "logits (N, Vp) X +=",
        "targets (N) int32",
        "loss_scale (1) float32",
    )
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

        logits[:, :V] = (softmax - onehot(target)) * dloss * loss_scale; logits[:, V:] = 0.
        """

    # --- sampling: kernels/sample.cu ---

    @tensors("tokens (B) int32 =", "starts (B) int32 +=", "logits (B, Vp) X", "key (2) int32")
    @abstractmethod
    def sample(
        self,
        tokens: Array,
        starts: Array,
        logits: Array,
        key: Array,
        vocab_size: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        """tokens = the next token of each sequence, drawn from logits[:, :V], V = vocab_size.

        The columns of logits from V on are never read. `starts` is the position of the newest token
        of each sequence; it becomes that of the drawn token, starts + 1.

        temperature 0 takes the argmax, of equal logits the lowest id. Otherwise a token has the
        weight exp((logit - largest logit) / temperature). top_k > 0 keeps the tokens whose logit is
        at least the k-th largest. Then 0 < top_p < 1 keeps the smallest set of likeliest tokens
        whose share of the kept weight is at least top_p. Tokens that are equal to the last one kept
        are kept as well; top_k = 0, top_k >= V, top_p = 0 and top_p >= 1 are off.

        One random number picks the token among the kept weights in rising order of ids. It is the
        Philox4x32-10 of counter (starts + 1, b, 0, 0) and the two words of `key`, so a sequence
        depends neither on the others of the batch nor on earlier draws. Every device draws the
        same token from the same logits: weights are integers (see kernels/sample.cu).

        If one of the V logits is a NaN, or the largest is infinite, the token is -1.
        """

    # --- int8 matmuls: kernels/matmul_int8.cu ---

    @tensors("q (N, I) int8 =", "scales (N, J) float32 =", "x (N, I) X")
    @abstractmethod
    def quantize_rows(self, q: Array, scales: Array, x: Array) -> None:
        """q = round(x / scale), scale = max |x| / 127, in each group of I / J elements of a row.

        I is a multiple of J. Halves are rounded away from zero, as llama2.c's runq does. A group
        of zeros has the scale 0 and q = 0. A group with a NaN or an infinity has q = 0 and a scale
        that is not finite, so that products with the group are NaN.
        """

    @tensors(
        "y (N, O) X =",
        "x (N, I) int8",
        "x_scales (N, J) float32",
        "w (O, I) int8",
        "w_scales (O, J) float32",
    )
    @abstractmethod
    def matmul_int8(self, y: Array, x: Array, x_scales: Array, w: Array, w_scales: Array) -> None:
        """y = x w^T, of matrices quantized in groups of I / J elements of a row.

        y[n, o] = the sum over groups of (x . w over the group) * w_scale * x_scale: the products of
        int8 are exact, the sum over groups is float32. I is a multiple of J. For few rows: text
        generation.
        """

    # --- optimizer: kernels/squared_norm.cu, kernels/adamw.cu ---

    @tensors("out (1) float32 =", "x (n) float32")
    @abstractmethod
    def squared_norm(self, out: Array, x: Array) -> None:
        """out = the sum of x^2, with the same bits on every run."""

    @tensors(
        "factors (5) float32 =",
        "report (7) float32 =",
        "loss_scale (1) float32 +=",
        "counts (3) float32 +=",
        f"windows (2, {WINDOW}) float32 +=",
        "losses (N) float32",
        "grad_sq (1) float32",
        "lr (1) float32",
    )
    @abstractmethod
    def prepare_update(
        self,
        factors: Array,
        report: Array,
        loss_scale: Array,
        counts: Array,
        windows: Array,
        losses: Array,
        grad_sq: Array,
        lr: Array,
        loss_weight: float,
        settings: AdamWSettings,
    ) -> None:
        """factors = the scalars of `adamw`'s next update; report = results for the host.

        `Factors`, `Report` and `Counts` name the elements. grad_sq is the squared norm of the
        gradient in its scale. There is no update if the loss or the norm is not finite, if the
        z-score of one of them is above the settings' limit, or once counts.halted is set.

        loss_scale halves after a gradient of a finite loss that is not finite, doubles after
        GROWTH_INTERVAL good steps, and stays within MIN_LOSS_SCALE and the settings' maximum.

        windows[0] holds the last losses and windows[1] the last norms, oldest first and NaN where
        there have been fewer; a value that is not finite does not enter. z = (newest - mean) /
        standard deviation over the window: 0 if all values are equal, NaN until it is full.

        counts.halted is set, if the settings say so, by a loss that is not finite and by a gradient
        that is not finite at MIN_LOSS_SCALE. Then counts, windows and loss_scale stay as they are.
        """

    @tensors(
        "master, m, v (n) float32 +=",
        "param (n) X =",
        "grad (n) float32",
        "factors (5) float32",
    )
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

        master, m and v are updated; param = master rounded to X (with X = float32 param is master
        itself). Only the first `decayed` elements are decayed. `Factors` names the elements of
        factors; if apply is 0, nothing changes.
        """

    # --- Muon: kernels/muon.cu ---

    @tensors(
        "x (O, I) X =",
        "m (O, I) float32 +=",
        "grad (O, I) float32",
        "factors (5) float32",
    )
    @abstractmethod
    def muon_momentum(
        self, x: Array, m: Array, grad: Array, factors: Array, momentum: float
    ) -> None:
        """x = the direction of Muon's update of a matrix, divided by its Frobenius norm.

        m += (1 - momentum) (g - m) with g = grad times factors.grad_factor; then u = m + (1 -
        momentum) (g - m), and x = u / max(norm of u, MUON_EPS). If factors.apply is 0, m stays as
        it is and x = 0.
        """

    @tensors("p (K, K) X =", "gram (K, K) X", "square (K, K) float32")
    @abstractmethod
    def muon_polynomial(self, p: Array, gram: Array, square: Array) -> None:
        """p = a I + b gram + c square, with a, b and c of MUON_COEFFICIENTS.

        gram is x x^T and square is gram gram, so that p x = a x + b (x x^T) x + c (x x^T)^2 x.
        """

    @tensors("master (n) float32 +=", "param (n) X =", "x (n) X", "factors (5) float32")
    @abstractmethod
    def muon_update(
        self,
        master: Array,
        param: Array,
        x: Array,
        factors: Array,
        scale: float,
        weight_decay: float,
    ) -> None:
        """master -= lr (scale x + weight_decay master); param = master rounded to X.

        lr is factors.lr. With X = float32 param is master itself. If factors.apply is 0, nothing
        changes.
        """

    # --- casts: kernels/cast.cu ---

    @tensors("y (n) any =", "x (n) any")
    @abstractmethod
    def cast(self, y: Array, x: Array) -> None:
        """y = x in y's dtype, rounded to nearest even, if one is float32 or both have one dtype."""

    # --- matmuls: NumPy's BLAS or cuBLAS ---

    @tensors("out (M, N) any =", "a (M, K) X", "b (K, N) X")
    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        """out = a @ b, or += with `accumulate`; see Device.matmul."""
        self.device.matmul(out, a, b, accumulate=accumulate)
