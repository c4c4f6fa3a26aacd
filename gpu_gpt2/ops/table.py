"""The table of ops: every operation of the model once, read by people and by machines.

Each method of `Ops` carries a row: its tensors in the order of the arguments, with shape, dtype and
role. "mean, rstd (N) float32 =" stands for two tensors.

- Role: `=` is overwritten; `+=` is read and updated, that is added to unless the docstring says
  otherwise; a tensor without either is only read. Parameter gradients are always `+=`, so that
  micro-batches accumulate.
- Order: outputs, inputs, saved statistics, then scalars, which are not in the row. Sizes come from
  the shapes.
- Shape: B batch, T time, C channels, O columns of a linear layer's output, H query heads, D head
  size, G key/value heads, R = H + 2 G heads of a row of q, k and v, S positions of a KV cache,
  V vocabulary, Vp padded vocabulary, N = B * T rows, n elements of a flat array. A letter has one
  value in all tensors of a call; `>= T` is any size from T on, and `B * T` a product.
- dtype: X is that of activations and weights: float32, bfloat16 or float16. Saved statistics,
  losses and parameter gradients are float32 whatever X is, and sums are kept in float32. `any` is
  float32, bfloat16 or float16, whichever the tensor has.
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

from gpu_gpt2.device.base import FLOAT32, INT32, X_DTYPES, Array, Device
from gpu_gpt2.errors import ConfigError, LaunchError

MAX_SIZE: Final = 2**30  # largest dimension and most rows, so that no int counter overflows
MAX_ELEMENTS: Final = 2**63 - 1  # largest n: kernels count elements of flat arrays in 64 bits
GROWTH_INTERVAL: Final = 2000  # good steps after which the loss scale doubles, as PyTorch's does
MIN_LOSS_SCALE: Final = 1.0  # the scale keeps small gradients; below 1 it would lose them
WINDOW: Final = 128  # losses, and gradient norms, among which outliers are found, as in llm.c
# Why a step made no update, numbered as in Report.skipped; "" stands for an update.
SKIPPED: Final = ("", "loss spike", "gradient spike", "not finite", "halted")
ANY: Final = tuple(X_DTYPES.values())  # the dtypes that "any" stands for

ROW_TEXT: Final = re.compile(r"(\w+(?:, \w+)*) \(([^)]+)\) (X|float32|int32|any)(?: (\+?=))?")


@dataclass(frozen=True, slots=True)
class OpTensor:
    """One tensor of a row: `wpe (>= T, C) X` has the shape (">= T", "C"), "X" and the role "in"."""

    name: str
    shape: tuple[str, ...]  # each a number, a letter, a bound ">= T" or a product "B * T"
    dtype: str  # "X", "float32", "int32" or "any"
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
        allowed = {"X": (X,), "float32": (FLOAT32,), "int32": (INT32,), "any": ANY}[tensor.dtype]
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
    """The elements of `factors` (5): the scalars that `prepare_update` computes for `adamw`."""

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


class Ops(ABC):
    """The operations of GPT-2, forward and backward, on one device."""

    device: Device
    dtype: str  # X: "fp32", "bf16" or "fp16"

    # --- embedding: kernels/embedding.cu ---

    @tensors("x (B, T, C) X =", "tokens (B, T) int32", "wte (Vp, C) X", "wpe (>= T, C) X")
    @abstractmethod
    def embedding_fwd(self, x: Array, tokens: Array, wte: Array, wpe: Array) -> None:
        """x = wte[tokens] + wpe[t]; tokens are in [0, V)."""

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
        """dwte += the rows of dx by token; dwpe[:T] += the sum of dx over B.

        `order` is the stable argsort of the flattened tokens: rows of one token lie together, so
        each token's rows are summed in one fixed order without atomics.
        """

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
