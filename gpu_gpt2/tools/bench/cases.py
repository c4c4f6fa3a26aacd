"""Every op at a model's own sizes, with the least bytes that it must move and its flops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import DEFAULTS, LAYER_NORM_EPSILON, RMS_NORM_EPS, ModelConfig
from gpu_gpt2.device.base import FLOAT32, INT8, INT32, X_DTYPES, Array
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.ops.table import TABLE, AdamWSettings, Ops

BLOCK: Final = 1 << 20  # random numbers made for an array, which repeats them
INT8_GROUP: Final = 64  # elements of an int8 group in llama2.c's files, where sizes allow


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCase:
    """One op on arrays of one size.

    `moved` is the least number of bytes, see `least_bytes`. `flops` counts matmuls only, two per
    multiply and add; attention's over the causal half.
    """

    name: str
    run: Callable[[], None]
    moved: int
    flops: int = 0


class Tensors:
    """Makes arrays of random numbers on the device of `ops`, of dtype X unless said."""

    def __init__(self, ops: Ops) -> None:
        self.device = ops.device
        self.X = X_DTYPES[ops.dtype]
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int, dtype: np.dtype[np.generic] | None = None) -> Array:
        array = self.device.empty(shape, self.X if dtype is None else dtype)
        # One block of random numbers is repeated, because making all of them would take longer.
        flat = array.reshape(-1)
        block = self._rng.standard_normal(min(flat.size, BLOCK), dtype=np.float32)
        block = block.astype(array.dtype)
        for start in range(0, flat.size, BLOCK):
            piece = flat[start : start + BLOCK]
            self.device.upload(piece, block[: piece.size])
        return array

    def float32(self, *shape: int) -> Array:
        return self(*shape, dtype=FLOAT32)

    def positive(self, *shape: int) -> Array:
        """Positive float32 numbers, for tensors such as rstd that are always positive."""
        array = self.device.empty(shape, FLOAT32)
        self.device.upload(array, self._rng.uniform(0.5, 2.0, shape).astype(np.float32))
        return array

    def ints(self, values: npt.NDArray[np.generic]) -> Array:
        array = self.device.empty(values.shape, INT32)
        self.device.upload(array, values.astype(INT32))
        return array

    def int8(self, *shape: int) -> Array:
        """Zeros: the time of an int8 matmul does not depend on its values."""
        return self.device.zeros(shape, INT8)

    def tokens(self, V: int, *shape: int) -> npt.NDArray[np.int64]:
        return self._rng.integers(0, V, shape)


def least_bytes(op: str, arrays: tuple[Array, ...], touched: dict[str, int]) -> int:
    """Returns the bytes that `op` must move for these arrays, in the order of its row.

    An `in` tensor is read once, an `=` tensor written once and a `+=` tensor both, whatever names
    an array has: an op in place reads and writes it once. `touched` gives the bytes of tensors of
    which the op needs only a part. Tensors as small as one row are left out: those of sizes C or O
    only, or of a fixed number of elements.
    """
    read: dict[int, int] = {}
    written: dict[int, int] = {}
    for tensor, array in zip(TABLE[op], arrays, strict=True):
        if all(item.isdigit() or item in ("C", "O") for item in tensor.shape):
            continue
        size = touched.get(tensor.name, array.nbytes)
        if tensor.role != "=":
            read[id(array)] = size
        if tensor.role != "in":
            written[id(array)] = size
    return sum(read.values()) + sum(written.values())


def _case(
    ops: Ops,
    op: str,
    *args: Any,
    name: str = "",
    flops: int = 0,
    moved: int = 0,
    touched: dict[str, int] | None = None,
) -> BenchCase:
    """The case of `op` with these arguments; `moved` is `least_bytes` unless given."""
    return BenchCase(
        name=name or op,
        run=functools.partial(getattr(ops, op), *args),
        moved=moved or least_bytes(op, args[: len(TABLE[op])], touched or {}),
        flops=flops,
    )


def cases(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """The ops of GPT-2's training step, in its order, at batches of (B, T), then other ops.

    The others are those of Muon, of Llama and of generation.

    Arrays live until the next case is asked for.
    """
    yield from _embedding(ops, c, B, T)
    yield from _layernorm(ops, c, B * T)
    yield from _attention(ops, c, B, T)
    yield from _elementwise(ops, c, B * T)
    yield from _classifier(ops, c, B, T)
    yield from _matmuls(ops, c, B * T)
    yield from _optimizer(ops, c)
    yield from _muon(ops, c)
    yield from _token_embedding(ops, c, B, T)
    yield from _rmsnorm(ops, c, B * T)
    yield from _rope(ops, c, B, T)
    yield from _swiglu(ops, c, B * T)
    yield from _sampling(ops, c)
    yield from _int8_matmul(ops, c)
    yield from _generation(ops, c, B, T)


def _embedding(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """Yields the embedding ops, which touch only the rows of distinct tokens of wte and dwte."""
    new = Tensors(ops)
    C, Vp = c.n_embd, c.padded_vocab_size
    host = new.tokens(c.vocab_size, B, T)
    distinct = len(np.unique(host))
    tokens = new.ints(host)
    order = new.ints(Batch.of(host, host).order)
    x, wte, wpe = new(B, T, C), new(Vp, C), new(T, C)
    starts = new.device.zeros((B,), INT32)
    touched = {"wte": distinct * C * new.X.itemsize}
    yield _case(ops, "embedding_fwd", x, tokens, starts, wte, wpe, touched=touched)
    dwte, dwpe = new.float32(Vp, C), new.float32(T, C)
    touched = {"dwte": distinct * C * FLOAT32.itemsize}
    yield _case(ops, "embedding_bwd", dwte, dwpe, x, tokens, order, touched=touched)


def _layernorm(ops: Ops, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    new = Tensors(ops)
    C = c.n_embd
    x, y, x2, r = new(N, C), new(N, C), new(N, C), new(N, C)
    w, b, bias = new(C), new(C), new(C)
    mean, rstd = new.float32(N), new.positive(N)
    dw, db = new.float32(C), new.float32(C)
    eps = LAYER_NORM_EPSILON
    yield _case(ops, "residual_layernorm_fwd", r, y, mean, rstd, x, x2, bias, w, b, eps)
    yield _case(ops, "layernorm_fwd", y, mean, rstd, x, w, b, eps)
    yield _case(ops, "layernorm_bwd", r, dw, db, y, x, w, mean, rstd)


def _attention(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """The backward pass need not move delta, which only its own kernels read."""
    new = Tensors(ops)
    H, D = c.n_head, c.head_size
    qkv, y, lse = new(B, T, 3 * H, D), new(B, T, H, D), new.float32(B, H, T)
    one_matmul = B * H * D * T * (T + 1)
    yield _case(ops, "attention_fwd", y, lse, qkv, flops=2 * one_matmul)
    dqkv, delta, dy = new(B, T, 3 * H, D), new.float32(B, H, T), new(B, T, H, D)
    ops.attention_fwd(y, lse, qkv)
    args = dqkv, delta, dy, qkv, y, lse
    yield _case(ops, "attention_bwd", *args, touched={"delta": 0}, flops=5 * one_matmul)


def _elementwise(ops: Ops, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    new = Tensors(ops)
    C, O = c.n_embd, 4 * c.n_embd
    yield _case(ops, "bias_fwd", new(N, 3 * C), new(3 * C))
    x, y, b, db = new(N, O), new(N, O), new(O), new.float32(O)
    yield _case(ops, "gelu_fwd", y, x, b)
    yield _case(ops, "gelu_bwd", y, y, x, b)
    yield _case(ops, "bias_bwd", db, x)


def _classifier(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """Yields the classifier ops, which read V of the Vp columns of logits and write all.

    losses and targets, 12 bytes beside a row of logits, are left out.
    """
    new = Tensors(ops)
    N, V, Vp, X = B * T, c.vocab_size, c.padded_vocab_size, new.X.itemsize
    logits, losses = new(N, Vp), new.float32(N)
    targets = new.ints(new.tokens(V, N))
    yield _case(ops, "classifier_fwd", losses, logits, targets, V, moved=N * V * X)
    args = losses, logits, targets, new.positive(1), V, 1 / N
    yield _case(ops, "classifier_fwd_bwd", *args, moved=N * (V + Vp) * X)
    scores, gradient = new(N, T), new(N, T)
    yield _case(ops, "softmax_fwd", scores, scores)
    yield _case(ops, "softmax_bwd", gradient, gradient, scores)


def _matmuls(ops: Ops, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    """The largest of a layer, x (N, C) w (4C, C), in all three directions, and the logits."""
    new = Tensors(ops)
    C, O, Vp = c.n_embd, 4 * c.n_embd, c.padded_vocab_size
    x, w, y, dw = new(N, C), new(O, C), new(N, O), new.float32(O, C)
    matmul = functools.partial(_case, ops, "matmul")
    flops = 2 * N * C * O
    yield matmul(y, x, w.T, name="matmul y = x w^T", flops=flops)
    yield matmul(x, y, w, name="matmul dx = dy w", flops=flops)
    yield BenchCase(
        name="matmul dw += dy^T x",
        run=lambda: ops.matmul(dw, y.T, x, accumulate=True),
        moved=least_bytes("matmul", (dw, y.T, x), {}) + dw.nbytes,  # dw is read too
        flops=flops,
    )
    wte, logits = new(Vp, C), new(N, Vp)
    yield matmul(logits, x, wte.T, name="matmul logits", flops=2 * N * C * Vp)


def _optimizer(ops: Ops, c: ModelConfig) -> Iterator[BenchCase]:
    new = Tensors(ops)
    n = parameter_count(c)
    grad, total = new.float32(n), new.float32(1)
    yield _case(ops, "squared_norm", total, grad)
    master, m, v = new.float32(n), new.float32(n), new.float32(n)
    new.device.fill_zero(m)
    new.device.fill_zero(v)
    separate = new.X != FLOAT32
    param = new(n) if separate else master
    factors = new.positive(5)
    settings = AdamWSettings(
        beta1=DEFAULTS["beta1"],
        beta2=DEFAULTS["beta2"],
        eps=DEFAULTS["eps"],
        weight_decay=0.1,
        max_grad_norm=DEFAULTS["max_grad_norm"],
    )
    yield _case(ops, "adamw", master, m, v, param, grad, factors, n // 2, settings)
    if separate:
        yield _case(ops, "cast", param, master)


def _muon(ops: Ops, c: ModelConfig) -> Iterator[BenchCase]:
    """Yields Muon's ops at the largest matrix of a layer, w (4C, C), without their matmuls."""
    new = Tensors(ops)
    O, C = 4 * c.n_embd, c.n_embd
    x, m, grad, factors = new(O, C), new.float32(O, C), new.float32(O, C), new.positive(5)
    yield _case(ops, "muon_momentum", x, m, grad, factors, 0.95)
    yield _case(ops, "muon_polynomial", new(C, C), new(C, C), new.float32(C, C))
    master = new.float32(O * C)
    param = new(O * C) if new.X != FLOAT32 else master
    yield _case(ops, "muon_update", master, param, x.reshape(-1), factors, 1.0, 0.1)


def _token_embedding(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """Yields the token embedding ops, which touch only the rows of distinct tokens."""
    new = Tensors(ops)
    C, Vp = c.n_embd, c.padded_vocab_size
    host = new.tokens(c.vocab_size, B, T)
    elements = len(np.unique(host)) * C
    tokens, order = new.ints(host), new.ints(Batch.of(host, host).order)
    x, wte, dwte = new(B, T, C), new(Vp, C), new.float32(Vp, C)
    touched = {"wte": elements * new.X.itemsize}
    yield _case(ops, "token_embedding_fwd", x, tokens, wte, touched=touched)
    touched = {"dwte": elements * FLOAT32.itemsize}
    yield _case(ops, "token_embedding_bwd", dwte, x, tokens, order, touched=touched)


def _rmsnorm(ops: Ops, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    new = Tensors(ops)
    C, eps = c.n_embd, RMS_NORM_EPS
    x, y, x2, r = new(N, C), new(N, C), new(N, C), new(N, C)
    w, dw, rstd = new(C), new.float32(C), new.positive(N)
    yield _case(ops, "residual_rmsnorm_fwd", r, y, rstd, x, x2, w, eps)
    yield _case(ops, "rmsnorm_fwd", y, rstd, x, w, eps)
    yield _case(ops, "rmsnorm_bwd", r, dw, y, x, w, rstd)


def _rope(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """Yields the RoPE ops, which leave the values as they are: a third of qkv if G = H."""
    H, D = c.n_head, c.head_size
    if D % 2:  # pairs of elements are rotated
        return
    new = Tensors(ops)
    qkv, angles = new(B, T, 3 * H, D), new.float32(T, D)
    starts = new.device.zeros((B,), INT32)
    rotated = qkv.nbytes * 2 // 3
    yield _case(ops, "rope_fwd", qkv, starts, angles, H, touched={"qkv": rotated})
    yield _case(ops, "rope_bwd", qkv, starts, angles, H, touched={"dqkv": rotated})


def _swiglu(ops: Ops, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    new = Tensors(ops)
    F = 4 * c.n_embd
    u, y = new(N, 2, F), new(N, F)
    yield _case(ops, "swiglu_fwd", y, u)
    yield _case(ops, "swiglu_bwd", new(N, 2, F), y, u)


def _sampling(ops: Ops, c: ModelConfig) -> Iterator[BenchCase]:
    """Yields the draw of one sequence's token as `generate` draws it; it reads V columns."""
    new = Tensors(ops)
    V, Vp = c.vocab_size, c.padded_vocab_size
    tokens, starts, key = (new.device.zeros((n,), INT32) for n in (1, 1, 2))
    args = tokens, starts, new(1, Vp), key, V, 1.0, min(40, V), 0.0
    yield _case(ops, "sample", *args, moved=V * new.X.itemsize)


def _int8_matmul(ops: Ops, c: ModelConfig) -> Iterator[BenchCase]:
    """Yields the int8 matmul of one sequence, x (1, C) w (4C, C), and the quantization of x."""
    new = Tensors(ops)
    C, O = c.n_embd, 4 * c.n_embd
    J = C // math.gcd(C, INT8_GROUP)
    q, scales, x = new.int8(1, C), new.float32(1, J), new(1, C)
    yield _case(ops, "quantize_rows", q, scales, x)
    yield _case(ops, "matmul_int8", new(1, O), q, scales, new.int8(O, C), new.float32(O, J))


def _generation(ops: Ops, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """Yields the ops of one new token for each of B sequences, the last that a cache of T holds."""
    new = Tensors(ops)
    H, D = c.n_head, c.head_size
    qkv, k, v, y = new(B, 1, 3 * H, D), new(B, H, T, D), new(B, H, T, D), new(B, 1, H, D)
    starts = new.ints(np.full(B, T - 1))
    copied = 2 * y.nbytes  # keys and values
    yield _case(ops, "kv_append", k, v, qkv, starts, moved=2 * copied)
    touched = {"qkv": y.nbytes, "starts": 0}
    args = y, qkv, k, v, starts
    yield _case(ops, "attention_decode", *args, touched=touched, flops=4 * B * H * D * T)
