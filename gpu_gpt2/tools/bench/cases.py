"""Every op at a model's own sizes, with the bytes and flops it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import DEFAULTS, ModelConfig
from gpu_gpt2.device.base import FLOAT32, INT32, X_DTYPES, Array
from gpu_gpt2.models.gpt2 import parameter_count
from gpu_gpt2.ops.interface import AdamWSettings, Ops

BLOCK: Final = 1 << 20  # random numbers made for an array


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCase:
    """One op on arrays of one size.

    `moved` is the least number of bytes: each input read once, each output written once. `flops`
    counts matrix products only, two per multiply and add; attention's over the causal half.
    """

    name: str
    run: Callable[[], None]
    moved: int
    flops: int = 0


class Tensors:
    """Makes arrays of random numbers on the device of `ops`, of dtype X unless said."""

    def __init__(self, ops: Ops, dtype: str) -> None:
        self.device = ops.device
        self.X = X_DTYPES[dtype]
        self._rng = np.random.default_rng(0)

    def __call__(self, *shape: int, dtype: np.dtype[np.generic] | None = None) -> Array:
        array = self.device.empty(shape, self.X if dtype is None else dtype)
        # One block of numbers over and over: as random as anyone can see, and quickly made.
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
        """float32, as variances and inverse deviations are."""
        array = self.device.empty(shape, FLOAT32)
        self.device.upload(array, self._rng.uniform(0.5, 2.0, shape).astype(np.float32))
        return array

    def ints(self, values: npt.NDArray[np.generic]) -> Array:
        array = self.device.empty(values.shape, INT32)
        self.device.upload(array, values.astype(INT32))
        return array

    def tokens(self, V: int, *shape: int) -> npt.NDArray[np.int64]:
        return self._rng.integers(0, V, shape)


def cases(ops: Ops, dtype: str, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    """The ops of a training step, in its order, at batches of (B, T).

    Arrays live until the next case is asked for.
    """
    yield from _embedding(ops, dtype, c, B, T)
    yield from _layernorm(ops, dtype, c, B * T)
    yield from _attention(ops, dtype, c, B, T)
    yield from _elementwise(ops, dtype, c, B * T)
    yield from _classifier(ops, dtype, c, B, T)
    yield from _products(ops, dtype, c, B * T)
    yield from _optimizer(ops, dtype, c)


def _embedding(ops: Ops, dtype: str, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    new = Tensors(ops, dtype)
    N, C, X = B * T, c.n_embd, new.X.itemsize
    host = new.tokens(c.vocab_size, B, T)
    distinct = len(np.unique(host))
    tokens = new.ints(host)
    order = new.ints(np.argsort(host, axis=None, kind="stable"))
    x, wte, wpe = new(B, T, C), new(c.padded_vocab_size, C), new(T, C)
    yield BenchCase(
        name="embedding_fwd",
        run=lambda: ops.embedding_fwd(x, tokens, wte, wpe),
        moved=(N + distinct + T) * C * X + N * 4,
    )
    dwte, dwpe = new.float32(c.padded_vocab_size, C), new.float32(T, C)
    yield BenchCase(
        name="embedding_bwd",
        run=lambda: ops.embedding_bwd(dwte, dwpe, x, tokens, order),
        moved=N * C * X + 2 * (distinct + T) * C * 4 + N * 8,
    )


def _layernorm(ops: Ops, dtype: str, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    new = Tensors(ops, dtype)
    C, X = c.n_embd, new.X.itemsize
    x, y, x2, r = new(N, C), new(N, C), new(N, C), new(N, C)
    w, b, bias = new(C), new(C), new(C)
    mean, rstd = new.float32(N), new.positive(N)
    dw, db = new.float32(C), new.float32(C)
    yield BenchCase(
        name="residual_layernorm_fwd",
        run=lambda: ops.residual_layernorm_fwd(r, y, mean, rstd, x, x2, bias, w, b),
        moved=4 * N * C * X + 8 * N,
    )
    yield BenchCase(
        name="layernorm_fwd",
        run=lambda: ops.layernorm_fwd(y, mean, rstd, x, w, b),
        moved=2 * N * C * X + 8 * N,
    )
    yield BenchCase(
        name="layernorm_bwd",
        run=lambda: ops.layernorm_bwd(r, dw, db, y, x, w, mean, rstd),
        moved=4 * N * C * X + 8 * N,
    )


def _attention(ops: Ops, dtype: str, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    new = Tensors(ops, dtype)
    H, D, X = c.n_head, c.head_size, new.X.itemsize
    qkv, y = new(B, T, 3, H, D), new(B, T, H, D)
    lse = new.float32(B, H, T)
    one_product = B * H * D * T * (T + 1)
    tensor = B * T * H * D * X
    yield BenchCase(
        name="attention_fwd",
        run=lambda: ops.attention_fwd(y, lse, qkv),
        moved=4 * tensor + lse.nbytes,
        flops=2 * one_product,
    )
    dqkv, delta, dy = new(B, T, 3, H, D), new.float32(B, H, T), new(B, T, H, D)
    ops.attention_fwd(y, lse, qkv)
    yield BenchCase(
        name="attention_bwd",
        run=lambda: ops.attention_bwd(dqkv, delta, dy, qkv, y, lse),
        moved=8 * tensor + lse.nbytes,
        flops=5 * one_product,
    )


def _elementwise(ops: Ops, dtype: str, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    new = Tensors(ops, dtype)
    C, O, X = c.n_embd, 4 * c.n_embd, new.X.itemsize
    qkv, qkv_bias = new(N, 3 * C), new(3 * C)
    yield BenchCase(
        name="bias_fwd", run=lambda: ops.bias_fwd(qkv, qkv_bias), moved=2 * N * 3 * C * X
    )
    x, y, b, db = new(N, O), new(N, O), new(O), new.float32(O)
    yield BenchCase(name="gelu_fwd", run=lambda: ops.gelu_fwd(y, x, b), moved=2 * N * O * X)
    yield BenchCase(name="gelu_bwd", run=lambda: ops.gelu_bwd(y, y, x, b), moved=3 * N * O * X)
    yield BenchCase(name="bias_bwd", run=lambda: ops.bias_bwd(db, x), moved=N * O * X)


def _classifier(ops: Ops, dtype: str, c: ModelConfig, B: int, T: int) -> Iterator[BenchCase]:
    new = Tensors(ops, dtype)
    N, V, Vp, X = B * T, c.vocab_size, c.padded_vocab_size, new.X.itemsize
    logits, losses = new(N, Vp), new.float32(N)
    targets = new.ints(new.tokens(V, N))
    yield BenchCase(
        name="classifier_fwd",
        run=lambda: ops.classifier_fwd(losses, logits, targets, V),
        moved=N * V * X,
    )
    scale = new.positive(1)
    yield BenchCase(
        name="classifier_fwd_bwd",
        run=lambda: ops.classifier_fwd_bwd(losses, logits, targets, scale, V, 1 / N),
        moved=N * (V + Vp) * X,
    )
    scores = new(N, T)
    yield BenchCase(
        name="softmax_fwd", run=lambda: ops.softmax_fwd(scores, scores), moved=2 * N * T * X
    )
    gradient = new(N, T)
    yield BenchCase(
        name="softmax_bwd",
        run=lambda: ops.softmax_bwd(gradient, gradient, scores),
        moved=3 * N * T * X,
    )


def _products(ops: Ops, dtype: str, c: ModelConfig, N: int) -> Iterator[BenchCase]:
    """The largest of a layer, x (N, C) w (4C, C), in all three directions, and the logits."""
    new = Tensors(ops, dtype)
    C, O, X = c.n_embd, 4 * c.n_embd, new.X.itemsize
    x, w, y, dw = new(N, C), new(O, C), new(N, O), new.float32(O, C)
    flops, moved = 2 * N * C * O, (N * C + O * C + N * O) * X
    yield BenchCase(
        name="matmul y = x w^T", run=lambda: ops.matmul(y, x, w.T), moved=moved, flops=flops
    )
    yield BenchCase(
        name="matmul dx = dy w", run=lambda: ops.matmul(x, y, w), moved=moved, flops=flops
    )
    yield BenchCase(
        name="matmul dw += dy^T x",
        run=lambda: ops.matmul(dw, y.T, x, accumulate=True),
        moved=(N * C + N * O) * X + 8 * O * C,
        flops=flops,
    )
    Vp = c.padded_vocab_size
    wte, logits = new(Vp, C), new(N, Vp)
    yield BenchCase(
        name="matmul logits",
        run=lambda: ops.matmul(logits, x, wte.T),
        moved=(N * C + Vp * C + N * Vp) * X,
        flops=2 * N * C * Vp,
    )


def _optimizer(ops: Ops, dtype: str, c: ModelConfig) -> Iterator[BenchCase]:
    new = Tensors(ops, dtype)
    n, X = parameter_count(c), new.X.itemsize
    grad, total = new.float32(n), new.float32(1)
    yield BenchCase(name="squared_norm", run=lambda: ops.squared_norm(total, grad), moved=4 * n)
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
    yield BenchCase(
        name="adamw",
        run=lambda: ops.adamw(master, m, v, param, grad, factors, n // 2, settings),
        moved=n * (28 + (X if separate else 0)),
    )
    if separate:
        yield BenchCase(name="cast", run=lambda: ops.cast(param, master), moved=n * (4 + X))
