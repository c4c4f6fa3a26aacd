"""Every op in NumPy: the definition that kernels are checked against, and the CPU trainer.

The ops compute in the dtype of their arrays, float32 or float64. Each op is the formula of its
docstring in `table`, applied on all cores to blocks of rows that are small enough to stay in cache.
Blocks depend on sizes only and partial sums are added in order, so results do not depend on how
many threads take the blocks (inside a matmul, BLAS decides).
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from gpu_gpt2.device.base import Device
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.ops.table import (
    GROWTH_INTERVAL,
    MIN_LOSS_SCALE,
    MUON_COEFFICIENTS,
    MUON_EPS,
    SKIPPED,
    AdamWSettings,
    Counts,
    Factors,
    Ops,
    Report,
    SampleScalars,
    check_heads,
    kv_heads,
    sample_scalars,
)
from gpu_gpt2.rng.philox import MASK, philox

NDArray = npt.NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

GELU_SCALE: Final = math.sqrt(2.0 / math.pi)
GELU_CUBIC: Final = 0.044715
# The constants of kernels/sample.cu: log2 of the weight of the largest logit, the lowest log2 of a
# weight relative to it, and the coefficients ln(2)^k / k! of 2^f, k = 7, 6, ..., 0.
WEIGHT_LOG2: Final = 40
LOWEST_LOG2: Final = np.float32(-64.0)
EXP2_COEFFICIENTS: Final = tuple(
    np.float32(math.log(2.0) ** k / math.factorial(k)) for k in range(7, -1, -1)
)
LARGEST_INT8: Final = 127  # of a quantized element; -128 is not used
LARGEST_INT8_PRODUCT: Final = 128 * 128
# Elements of one array in a block of rows: as many as fit into an L2 cache, because threads take
# turns at the interpreter lock between any two array operations.
BLOCK_ELEMENTS: Final = 1 << 17
# Elements of int8 in a block: a (768, 768) matrix is one block, because giving blocks to threads
# takes as long as multiplying a row by such a matrix.
INT8_BLOCK_ELEMENTS: Final = 1 << 20
SCORE_ELEMENTS: Final = 1 << 19  # attention scores that one thread holds at once: 2 MiB in float32
# Elements of cached keys that a thread reads at once while decoding. Reading fewer takes less time
# than waking another thread.
CACHE_ELEMENTS: Final = 1 << 18
# Elements of a row of logits for each maximum with which the search for the largest ones begins.
LOGITS_PER_MAXIMUM: Final = 64

_TURN: Final = threading.RLock()  # held by the op that uses all cores: one op at a time


@functools.cache
def _cores() -> int:
    """Returns the number of cores; the system takes up to 0.1 ms to tell it."""
    return os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="reference-ops")


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _by_blocks(
    rows: int, row_size: int, work: Callable[[slice], Result], elements: int = BLOCK_ELEMENTS
) -> list[Result]:
    """Calls work(block) for consecutive blocks of rows, in parallel; returns results in order.

    A block has at most `elements` elements, but at least one row.

    Threads run in parallel because NumPy releases the interpreter lock in each array operation.
    """
    step = max(1, elements // row_size)
    if rows <= step:
        return [work(slice(0, rows))]
    blocks = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    return _in_parallel(blocks, work)


def _in_parallel(items: list[Item], work: Callable[[Item], Result]) -> list[Result]:
    """Returns [work(item) for item in items]; each thread takes one run of consecutive items.

    BLAS is limited to the thread that calls it: when several threads each split their matmul
    over all cores, the matmuls wait for each other (attention took 20 times as long).
    """
    threads = 1 if len(items) == 1 else min(_cores(), len(items))
    if threads <= 1:
        return _each(work, items)
    cuts = [len(items) * i // threads for i in range(threads + 1)]
    runs = [items[start:stop] for start, stop in itertools.pairwise(cuts)]
    with _TURN, _blas().limit(limits=1):
        others = [_pool().submit(_each, work, run) for run in runs[1:]]
        try:
            results = _each(work, runs[0])
        finally:
            wait(others)  # after an error too, so that no thread still writes to the arrays
    for other in others:
        results += other.result()
    return results


def _each(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]


def _by_rows(x: NDArray, work: Callable[[slice], Result]) -> list[Result]:
    """Calls `_by_blocks` for the rows of a matrix."""
    return _by_blocks(x.shape[0], x.shape[1], work)


@functools.lru_cache(maxsize=32)
def _ones(n: int, dtype: np.dtype[Any]) -> NDArray:
    return np.ones(n, dtype)


def _column_sums(x: NDArray) -> NDArray:
    """Returns the sum (C,) of the rows of x (N, C), by BLAS: several times faster than np.sum."""
    sums: NDArray = np.dot(_ones(len(x), x.dtype), x)
    return sums


@functools.lru_cache(maxsize=8)
def _future(T: int, dtype: np.dtype[Any]) -> NDArray:
    """Returns the causal mask (T, T): -inf where the key is later than the query, else 0."""
    return np.triu(np.full((T, T), -np.inf, dtype), k=1)


class ReferenceOps(Ops):
    """The ops on NumPy arrays."""

    dtype = "fp32"

    def __init__(self, device: Device | None = None) -> None:
        self.device = device or CpuDevice()
        self.dtype = "fp32"

    # --- embedding ---

    def embedding_fwd(
        self, x: NDArray, tokens: NDArray, starts: NDArray, wte: NDArray, wpe: NDArray
    ) -> None:
        np.add(wte[np.maximum(tokens, 0)], wpe[_positions(starts, tokens.shape[1])], out=x)

    def embedding_bwd(
        self, dwte: NDArray, dwpe: NDArray, dx: NDArray, tokens: NDArray, order: NDArray
    ) -> None:
        dwpe[: dx.shape[1]] += dx.sum(axis=0)
        self.token_embedding_bwd(dwte, dx, tokens, order)

    # --- token embedding without positions ---

    def token_embedding_fwd(self, x: NDArray, tokens: NDArray, wte: NDArray) -> None:
        x[...] = wte[np.maximum(tokens, 0)]

    def token_embedding_bwd(
        self, dwte: NDArray, dx: NDArray, tokens: NDArray, order: NDArray
    ) -> None:
        in_order = tokens.reshape(-1)[order]
        firsts = np.flatnonzero(np.diff(in_order, prepend=-1))
        rows = dx.reshape(-1, dx.shape[2])[order]
        dwte[in_order[firsts]] += np.add.reduceat(rows, firsts, axis=0)

    # --- layernorm ---

    def layernorm_fwd(
        self,
        y: NDArray,
        mean: NDArray,
        rstd: NDArray,
        x: NDArray,
        w: NDArray,
        b: NDArray,
        eps: float,
    ) -> None:
        if len(x) == 1:  # scalars of Python take less time than arrays of one element
            mean[0] = m = float(x[0].dot(_ones(x.shape[1], x.dtype))) / x.shape[1]
            np.subtract(x, m, out=y)
            rstd[0] = r = 1.0 / math.sqrt(float(y[0].dot(y[0])) / x.shape[1] + eps)
            np.multiply(y, r, out=y)
            np.multiply(y, w, out=y)
            np.add(y, b, out=y)
            return

        def work(i: slice) -> None:
            np.dot(x[i], _ones(x.shape[1], x.dtype), out=mean[i])
            mean[i] /= x.shape[1]
            np.subtract(x[i], mean[i, None], out=y[i])
            variance = np.einsum("nc,nc->n", y[i], y[i]) / x.shape[1]
            rstd[i] = 1.0 / np.sqrt(variance + eps)
            y[i] *= rstd[i, None]
            y[i] *= w
            y[i] += b

        _by_rows(x, work)

    def residual_layernorm_fwd(
        self,
        r: NDArray,
        y: NDArray,
        mean: NDArray,
        rstd: NDArray,
        x1: NDArray,
        x2: NDArray,
        bias: NDArray,
        w: NDArray,
        b: NDArray,
        eps: float,
    ) -> None:
        def work(i: slice) -> None:
            np.add(x2[i], bias, out=r[i])
            r[i] += x1[i]

        _by_rows(r, work)
        self.layernorm_fwd(y, mean, rstd, r, w, b, eps)

    def layernorm_bwd(
        self,
        dx: NDArray,
        dw: NDArray,
        db: NDArray,
        dy: NDArray,
        x: NDArray,
        w: NDArray,
        mean: NDArray,
        rstd: NDArray,
    ) -> None:
        def work(i: slice) -> tuple[NDArray, NDArray]:
            normed = x[i] - mean[i, None]
            normed *= rstd[i, None]
            g = dy[i] * w
            g_mean = np.dot(dy[i], w)[:, None] / x.shape[1]
            g_normed_mean = np.einsum("nc,nc->n", g, normed)[:, None] / x.shape[1]
            g -= g_mean
            g -= normed * g_normed_mean
            g *= rstd[i, None]
            dx[i] += g
            normed *= dy[i]
            return _column_sums(normed), _column_sums(dy[i])

        for dw_part, db_part in _by_rows(x, work):
            dw += dw_part
            db += db_part

    # --- RMSNorm ---

    def rmsnorm_fwd(self, y: NDArray, rstd: NDArray, x: NDArray, w: NDArray, eps: float) -> None:
        if len(x) == 1:  # as in layernorm_fwd
            rstd[0] = r = 1.0 / math.sqrt(float(x[0].dot(x[0])) / x.shape[1] + eps)
            np.multiply(x, r, out=y)
            np.multiply(y, w, out=y)
            return

        def work(i: slice) -> None:
            mean_square = np.einsum("nc,nc->n", x[i], x[i])
            mean_square /= x.shape[1]
            mean_square += eps
            np.divide(1.0, np.sqrt(mean_square, out=mean_square), out=rstd[i])
            np.multiply(x[i], rstd[i, None], out=y[i])
            y[i] *= w

        _by_rows(x, work)

    def residual_rmsnorm_fwd(
        self,
        r: NDArray,
        y: NDArray,
        rstd: NDArray,
        x1: NDArray,
        x2: NDArray,
        w: NDArray,
        eps: float,
    ) -> None:
        _by_rows(r, lambda i: np.add(x1[i], x2[i], out=r[i]))
        self.rmsnorm_fwd(y, rstd, r, w, eps)

    def rmsnorm_bwd(
        self, dx: NDArray, dw: NDArray, dy: NDArray, x: NDArray, w: NDArray, rstd: NDArray
    ) -> None:
        def work(i: slice) -> NDArray:
            normed = x[i] * rstd[i, None]
            g = dy[i] * w
            g_normed_mean = np.einsum("nc,nc->n", g, normed)[:, None] / x.shape[1]
            g -= normed * g_normed_mean
            g *= rstd[i, None]
            dx[i] += g
            normed *= dy[i]
            return _column_sums(normed)

        for part in _by_rows(x, work):
            dw += part

    # --- rotary position embedding ---

    def rope_fwd(self, qkv: NDArray, starts: NDArray, angles: NDArray, kv_heads: int) -> None:
        _rotate(qkv, starts, _complex(angles), kv_heads)

    def rope_bwd(self, dqkv: NDArray, starts: NDArray, angles: NDArray, kv_heads: int) -> None:
        _rotate(dqkv, starts, _complex(angles).conj(), kv_heads)

    # --- attention ---

    def attention_fwd(self, y: NDArray, lse: NDArray, qkv: NDArray) -> None:
        q, k, v = _heads("attention_fwd", qkv, y.shape[2])
        heads = list(zip(q, _by_group(y, len(q)), _lse_by_group(lse, len(q)), strict=True))

        def work(part: tuple[slice, slice]) -> None:
            for q_i, y_i, lse_i in heads:
                p = _scores(q_i[part], k[part])
                largest = p.max(axis=-1, keepdims=True)
                p -= largest
                np.exp(p, out=p)
                total = p.sum(axis=-1, keepdims=True)
                lse_i[part] = (largest + np.log(total))[..., 0]
                p /= total
                np.matmul(p, v[part], out=y_i[part])

        _by_heads(k.shape, work)

    def attention_bwd(
        self, dqkv: NDArray, delta: NDArray, dy: NDArray, qkv: NDArray, y: NDArray, lse: NDArray
    ) -> None:
        q, k, v = _heads("attention_bwd", qkv, y.shape[2])
        dq, dk, dv = _heads("attention_bwd", dqkv, y.shape[2])
        delta[...] = np.einsum("bthd,bthd->bht", dy, y)
        m = len(q)
        statistics = _lse_by_group(lse, m), _lse_by_group(delta, m)
        heads = list(zip(q, dq, _by_group(dy, m), *statistics, strict=True))
        scale = 1.0 / math.sqrt(q.shape[-1])

        def work(part: tuple[slice, slice]) -> None:
            for i, (q_i, dq_i, dy_i, lse_i, delta_i) in enumerate(heads):
                p = _scores(q_i[part], k[part])
                p -= lse_i[part][..., None]
                np.exp(p, out=p)
                _matmul(dv[part], p.swapaxes(-1, -2), dy_i[part], accumulate=i > 0)
                dp = dy_i[part] @ v[part].swapaxes(-1, -2)
                dp -= delta_i[part][..., None]
                dp *= p
                dp *= scale
                np.matmul(dp, k[part], out=dq_i[part])
                _matmul(dk[part], dp.swapaxes(-1, -2), q_i[part], accumulate=i > 0)

        _by_heads(k.shape, work)

    # --- decoding with a KV cache ---

    def kv_append(self, k: NDArray, v: NDArray, qkv: NDArray, starts: NDArray) -> None:
        (_, G, S, _), (_, T, R, _) = k.shape, qkv.shape
        check_heads("kv_append", R, R - 2 * G, G)
        rows = qkv.swapaxes(1, 2)  # (B, R, T, D)
        keys, values = rows[:, R - 2 * G : R - G], rows[:, R - G :]
        for b, start in enumerate(starts.tolist()):
            T_kept = min(T, S - start)
            if T_kept > 0:
                k[b, :, start : start + T_kept] = keys[b, :, :T_kept]
                v[b, :, start : start + T_kept] = values[b, :, :T_kept]

    def attention_decode(
        self, y: NDArray, qkv: NDArray, k: NDArray, v: NDArray, starts: NDArray
    ) -> None:
        (_, _, H, D), (B, G, S, _) = y.shape, k.shape
        check_heads("attention_decode", qkv.shape[2], H, G)
        q = qkv[:, 0, :H].reshape(B, G, H // G, D) * qkv.dtype.type(1.0 / math.sqrt(D))
        y_heads = y.reshape(B, G, H // G, D)
        counts = [min(start + 1, S) for start in starts.tolist()]

        def work(part: slice) -> None:
            """Neighbours that see as many positions, computed as one batch of matmuls."""
            seen = part, slice(None), slice(counts[part.start])
            p = q[part] @ k[seen].swapaxes(-1, -2)  # (b, G, H / G, count)
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            np.matmul(p, v[seen], out=y_heads[part])
            y_heads[part] /= p.sum(axis=-1, keepdims=True)

        parts, start = [], 0
        for count, neighbours in itertools.groupby(counts):
            stop = start + len(list(neighbours))
            step = max(1, CACHE_ELEMENTS // (G * count * D))
            parts += [slice(i, min(i + step, stop)) for i in range(start, stop, step)]
            start = stop
        _in_parallel(parts, work)

    # --- softmax ---

    def softmax_fwd(self, y: NDArray, x: NDArray) -> None:
        def work(i: slice) -> None:
            np.subtract(x[i], x[i].max(axis=1, keepdims=True), out=y[i])
            np.exp(y[i], out=y[i])
            y[i] /= y[i].sum(axis=1, keepdims=True)

        _by_rows(x, work)

    def softmax_bwd(self, dx: NDArray, dy: NDArray, y: NDArray) -> None:
        def work(i: slice) -> None:
            inner = np.einsum("nv,nv->n", dy[i], y[i])
            np.subtract(dy[i], inner[:, None], out=dx[i])
            dx[i] *= y[i]

        _by_rows(y, work)

    # --- GELU ---

    def gelu_fwd(self, y: NDArray, x: NDArray, b: NDArray) -> None:
        def work(i: slice) -> None:
            z = x[i] + b
            t = _gelu_tanh(z)
            t += 1.0
            t *= z
            np.multiply(t, 0.5, out=y[i])

        _by_rows(x, work)

    def gelu_bwd(self, dx: NDArray, dy: NDArray, x: NDArray, b: NDArray) -> None:
        def work(i: slice) -> None:
            # d/dz 0.5 z (1 + t) = 0.5 (1 + t) + 0.5 z (1 - t^2) u', and u' = s (1 + 3 c z^2)
            z = x[i] + b
            t = _gelu_tanh(z)
            slope = z * z
            slope *= 3.0 * GELU_CUBIC * GELU_SCALE
            slope += GELU_SCALE
            slope *= z
            slope *= 1.0 - t * t
            slope += t
            slope += 1.0
            slope *= 0.5
            np.multiply(dy[i], slope, out=dx[i])

        _by_rows(x, work)

    # --- SwiGLU ---

    def swiglu_fwd(self, y: NDArray, u: NDArray) -> None:
        def work(i: slice) -> None:
            t = _one_plus_exp(u[i, 0])
            np.divide(u[i, 0], t, out=t)
            np.multiply(t, u[i, 1], out=y[i])

        _by_rows(y, work)

    def swiglu_bwd(self, du: NDArray, dy: NDArray, u: NDArray) -> None:
        def work(i: slice) -> None:
            # d/dz z s(z) = s + z s (1 - s), with the sigmoid s
            gate, up = u[i, 0], u[i, 1]
            s = _one_plus_exp(gate)
            np.divide(1.0, s, out=s)
            silu = gate * s
            np.multiply(dy[i], silu, out=du[i, 1])
            slope = 1.0 - s
            slope *= silu
            slope += s
            slope *= up
            np.multiply(dy[i], slope, out=du[i, 0])

        _by_rows(dy, work)

    # --- bias ---

    def bias_fwd(self, y: NDArray, b: NDArray) -> None:
        def work(i: slice) -> None:
            y[i] += b

        _by_rows(y, work)

    def bias_bwd(self, db: NDArray, dy: NDArray) -> None:
        for part in _by_rows(dy, lambda i: _column_sums(dy[i])):
            db += part

    # --- fused classifier ---

    def classifier_fwd(
        self, losses: NDArray, logits: NDArray, targets: NDArray, vocab_size: int
    ) -> None:
        def work(i: slice) -> None:
            _add_losses(losses[i], logits[i, :vocab_size].copy(), targets[i])

        _by_rows(logits, work)

    def classifier_fwd_bwd(
        self,
        losses: NDArray,
        logits: NDArray,
        targets: NDArray,
        loss_scale: NDArray,
        vocab_size: int,
        dloss: float,
    ) -> None:
        dloss *= float(loss_scale[0])

        def work(i: slice) -> None:
            x = logits[i, :vocab_size]
            total = _add_losses(losses[i], x, targets[i])
            x *= dloss / total[:, None]
            x[np.arange(len(x)), targets[i]] -= dloss
            logits[i, vocab_size:] = 0.0

        _by_rows(logits, work)

    # --- sampling ---

    def sample(
        self,
        tokens: NDArray,
        starts: NDArray,
        logits: NDArray,
        key: NDArray,
        vocab_size: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        settings = sample_scalars(vocab_size, temperature, top_k, top_p)
        words = int(key[0]) & MASK, int(key[1]) & MASK
        starts += 1

        def work(rows: slice) -> None:
            for b, start in enumerate(starts[rows].tolist(), rows.start):
                row = logits[b, :vocab_size].astype(np.float32, copy=False)
                likeliest = int(row.argmax())  # that of a NaN, if there is one
                if not math.isfinite(row[likeliest]):
                    tokens[b] = -1
                elif settings.scale == 0:
                    tokens[b] = likeliest
                else:
                    low, high, *_ = philox((start & MASK, b, 0, 0), words)
                    tokens[b] = _drawn_token(row, row[likeliest], settings, high << 32 | low)

        _by_rows(logits, work)

    # --- int8 matmuls ---

    def quantize_rows(self, q: NDArray, scales: NDArray, x: NDArray) -> None:
        groups = x.reshape(*scales.shape, -1)
        np.divide(np.abs(groups).max(axis=2), LARGEST_INT8, out=scales)
        usable = (scales > 0) & np.isfinite(scales)
        ratio = np.zeros_like(groups)
        np.divide(groups, scales[..., None], out=ratio, where=usable[..., None])
        # np.rint would round halves to even. The fraction, unlike ratio + 1/2, is exact.
        whole = np.trunc(ratio)
        whole += np.copysign(np.abs(ratio - whole) >= 0.5, ratio)
        # A scale below the normal float32 numbers is so inexact that a ratio can exceed 127.
        np.clip(whole, -LARGEST_INT8, LARGEST_INT8, out=whole)
        q[...] = whole.reshape(q.shape)

    def matmul_int8(
        self, y: NDArray, x: NDArray, x_scales: NDArray, w: NDArray, w_scales: NDArray
    ) -> None:
        (N, I), J = x.shape, x_scales.shape[1]
        # Every partial sum is an integer, so sums of floats are exact in any order.
        dtype = np.float32 if I // J * LARGEST_INT8_PRODUCT <= 2**24 else np.float64
        x_groups = x.reshape(N, J, -1).astype(dtype).transpose(1, 2, 0)  # (J, I / J, N)

        def work(i: slice) -> None:
            w_groups = w[i].reshape(-1, J, I // J).astype(dtype).transpose(1, 0, 2)
            dots = np.matmul(w_groups, x_groups).astype(y.dtype, copy=False)  # (J, rows of w, N)
            dots *= w_scales[i].T[:, :, None]
            dots *= x_scales.T[:, None, :]
            y[:, i] = dots.sum(axis=0).T  # in rising order of groups

        _by_blocks(len(w), I, work, INT8_BLOCK_ELEMENTS)

    # --- optimizer ---

    def squared_norm(self, out: NDArray, x: NDArray) -> None:
        out[0] = sum(_by_blocks(x.size, 1, lambda i: float(np.dot(x[i], x[i]))))

    def prepare_update(
        self,
        factors: NDArray,
        report: NDArray,
        loss_scale: NDArray,
        counts: NDArray,
        windows: NDArray,
        losses: NDArray,
        grad_sq: NDArray,
        lr: NDArray,
        loss_weight: float,
        settings: AdamWSettings,
    ) -> None:
        before = Counts(*counts)
        scale = float(loss_scale[0])
        loss = float(losses.sum(dtype="float64")) * loss_weight
        norm = float(np.sqrt(grad_sq[0])) / scale
        loss_finite = abs(loss) <= np.finfo(report.dtype).max  # False for a NaN
        grad_finite = bool(np.isfinite(grad_sq[0]))
        halted = bool(before.halted)

        loss_zscore = grad_zscore = math.nan
        if not halted and loss_finite:
            loss_zscore = _append(windows[0], loss)
        if not halted and grad_finite:
            grad_zscore = _append(windows[1], norm)
        if halted:
            skipped = "halted"
        elif not (loss_finite and grad_finite):
            skipped = "not finite"
        elif 0.0 < settings.max_loss_zscore < loss_zscore:  # False for a NaN
            skipped = "loss spike"
        elif 0.0 < settings.max_grad_zscore < grad_zscore:
            skipped = "gradient spike"
        else:
            skipped = ""

        apply = not skipped
        updates = before.updates + apply
        clip = settings.max_grad_norm / norm if norm > settings.max_grad_norm else 1.0
        c1 = -math.expm1(updates * math.log(settings.beta1))  # 1 - beta1^updates
        c2 = -math.expm1(updates * math.log(settings.beta2))
        factors[:] = Factors(apply=apply, grad_factor=clip / scale, lr=lr[0], c1=c1, c2=c2)

        next_scale, good_steps = scale, before.good_steps
        if apply:
            good_steps += 1
            if good_steps >= GROWTH_INTERVAL:
                next_scale, good_steps = 2 * scale, 0
        elif not halted and loss_finite and not grad_finite:
            next_scale, good_steps = scale / 2, 0
        next_scale = min(max(next_scale, MIN_LOSS_SCALE), settings.max_loss_scale)
        report[:] = Report(
            loss=loss,
            norm=norm,
            loss_scale=next_scale,
            scaled_by=scale,
            loss_zscore=loss_zscore,
            grad_zscore=grad_zscore,
            skipped=SKIPPED.index(skipped),
        )
        diverged = not loss_finite or (not grad_finite and scale <= MIN_LOSS_SCALE)
        loss_scale[0] = next_scale
        counts[:] = Counts(
            updates=updates,
            good_steps=good_steps,
            halted=halted or (settings.halt and diverged),
        )

    def adamw(
        self,
        master: NDArray,
        m: NDArray,
        v: NDArray,
        param: NDArray,
        grad: NDArray,
        factors: NDArray,
        decayed: int,
        settings: AdamWSettings,
    ) -> None:
        f = Factors(*map(float, factors))
        if not f.apply:
            return
        # The update is lr (m / c1) / (sqrt(v / c2) + eps). Multiplying numerator and denominator
        # by sqrt(c2) turns both bias corrections into constants of all elements.
        root = math.sqrt(f.c2)
        step_size = f.lr * root / f.c1

        def work(i: slice, decay: float) -> None:
            g, m_i, v_i, w = grad[i], m[i], v[i], master[i]
            m_i *= settings.beta1
            t = g * (f.grad_factor * (1.0 - settings.beta1))
            m_i += t
            np.multiply(g, g, out=t)
            t *= f.grad_factor * f.grad_factor * (1.0 - settings.beta2)
            v_i *= settings.beta2
            v_i += t
            np.sqrt(v_i, out=t)
            t += settings.eps * root
            np.divide(m_i, t, out=t)
            t *= step_size
            if decay != 1.0:
                w *= decay
            w -= t
            if param is not master:
                param[i] = w

        decay = 1.0 - f.lr * settings.weight_decay
        _by_blocks(decayed, 1, lambda i: work(i, decay))
        rest = master.size - decayed
        _by_blocks(rest, 1, lambda i: work(slice(decayed + i.start, decayed + i.stop), 1.0))

    # --- Muon ---

    def muon_momentum(
        self, x: NDArray, m: NDArray, grad: NDArray, factors: NDArray, momentum: float
    ) -> None:
        f = Factors(*map(float, factors))
        if not f.apply:
            x.fill(0)
            return

        def work(i: slice) -> float:
            u = grad[i] * f.grad_factor
            u -= m[i]
            u *= 1.0 - momentum
            m[i] += u
            u *= momentum  # m + momentum times what was added is m + (1 - momentum) (g - m)
            u += m[i]
            x[i] = u
            return float(np.vdot(u, u))

        x /= max(math.sqrt(sum(_by_rows(x, work))), MUON_EPS)

    def muon_polynomial(self, p: NDArray, gram: NDArray, square: NDArray) -> None:
        a, b, c = MUON_COEFFICIENTS
        np.multiply(square, c, out=p)
        p += b * gram
        p.reshape(-1)[:: len(p) + 1] += a

    def muon_update(
        self,
        master: NDArray,
        param: NDArray,
        x: NDArray,
        factors: NDArray,
        scale: float,
        weight_decay: float,
    ) -> None:
        f = Factors(*map(float, factors))
        if not f.apply:
            return

        def work(i: slice) -> None:
            master[i] *= 1.0 - f.lr * weight_decay
            master[i] -= f.lr * scale * x[i]
            if param is not master:
                param[i] = master[i]

        _by_blocks(master.size, 1, work)

    # --- casts ---

    def cast(self, y: NDArray, x: NDArray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # float16 overflows to infinity
            y[...] = x


def _positions(starts: NDArray, T: int) -> NDArray:
    """Returns the position (B, T) of every token, from that of each sequence's first (B,)."""
    positions: NDArray = starts[:, None] + np.arange(T, dtype=starts.dtype)
    return positions


def _complex(x: NDArray) -> NDArray:
    """Returns x (..., D) as a view (..., D / 2) whose elements are the pairs of x: a + b i."""
    pairs: NDArray = x.view(np.result_type(x.dtype, np.complex64))
    return pairs


def _rotate(x: NDArray, starts: NDArray, turns: NDArray, kv_heads: int) -> None:
    """Rotates the pairs of all heads of x (B, T, R, D) but the last `kv_heads`, in place.

    turns (>= T, D / 2) are complex: a pair (a, b) is rotated by an angle when a + b i is multiplied
    by cos + i sin of the angle.
    """
    B, T, R, D = x.shape
    pairs = _complex(x).reshape(B * T, R, D // 2)[:, : R - kv_heads]
    positions = _positions(starts, T).reshape(-1)

    def work(i: slice) -> None:
        pairs[i] *= turns[positions[i], None]

    _by_blocks(B * T, R * D, work)


def _one_plus_exp(z: NDArray) -> NDArray:
    """Returns 1 + exp(-z) as a new array: infinity where z is far below zero."""
    t = np.negative(z)
    with np.errstate(over="ignore"):
        np.exp(t, out=t)
    t += 1.0
    return t


def _heads(op: str, qkv: NDArray, H: int) -> tuple[NDArray, NDArray, NDArray]:
    """Returns views of qkv (B, T, R, D): q (H / G, B, G, T, D), k and v (B, G, T, D).

    q[i, :, g] is query head i of those that use head g of k and v.
    """
    G = kv_heads(op, qkv.shape[2], H)
    k, v = qkv[:, :, H : H + G], qkv[:, :, H + G :]
    return _by_group(qkv[:, :, :H], H // G), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _by_group(x: NDArray, m: int) -> NDArray:
    """Returns x (B, T, H, D) as a view (m, B, H / m, T, D)."""
    B, T, H, D = x.shape
    view: NDArray = x.reshape(B, T, H // m, m, D).transpose(3, 0, 2, 1, 4)
    return view


def _lse_by_group(lse: NDArray, m: int) -> NDArray:
    """Returns lse or delta (B, H, T) as a view (m, B, H / m, T)."""
    B, H, T = lse.shape
    view: NDArray = lse.reshape(B, H // m, m, T).transpose(2, 0, 1, 3)
    return view


def _matmul(out: NDArray, a: NDArray, b: NDArray, *, accumulate: bool) -> None:
    """out = a @ b, or += with `accumulate`."""
    if accumulate:
        out += a @ b
    else:
        np.matmul(a, b, out=out)


def _by_heads(shape: tuple[int, ...], work: Callable[[tuple[slice, slice]], None]) -> None:
    """Calls work((batches, heads)) in parallel, on parts of at most SCORE_ELEMENTS scores.

    `shape` is (B, G, T, D). A part is at least one head, whatever its size.
    """
    B, G, T, _ = shape
    heads = min(G, max(1, SCORE_ELEMENTS // (T * T)))
    batches = max(1, min(B, SCORE_ELEMENTS // (T * T * G)))
    parts = [
        (slice(b, b + batches), slice(g, g + heads))
        for b in range(0, B, batches)
        for g in range(0, G, heads)
    ]
    _in_parallel(parts, work)


def _scores(q: NDArray, k: NDArray) -> NDArray:
    """Returns the scaled and masked scores (b, h, T, T) of q, k (b, h, T, D)."""
    s: NDArray = q @ k.swapaxes(-1, -2)
    s *= 1.0 / math.sqrt(q.shape[-1])
    s += _future(q.shape[-2], q.dtype)
    return s


def _gelu_tanh(x: NDArray) -> NDArray:
    """Returns tanh(sqrt(2 / pi) (x + 0.044715 x^3)) as a new array."""
    u = x * x
    u *= GELU_CUBIC * GELU_SCALE
    u += GELU_SCALE
    u *= x
    np.tanh(u, out=u)
    return u


def _add_losses(losses: NDArray, x: NDArray, targets: NDArray) -> NDArray:
    """Adds the cross-entropy of logits x (n, V) to losses (n,); x becomes exp(x - max).

    Returns the sums (n,) of the rows of exp(x - max).
    """
    x -= x.max(axis=1, keepdims=True)
    picked = x[np.arange(len(x)), targets]  # a copy: the next line overwrites x
    np.exp(x, out=x)
    total: NDArray = x.sum(axis=1)
    losses += np.log(total) - picked
    return total


def _drawn_token(
    row: NDArray, largest: np.float32, settings: SampleScalars, random_bits: int
) -> int:
    """Returns the token that `sample` draws from a row of logits (V,) float32 at random."""
    ids = None
    if settings.top_k:
        ids = _largest_ids(row, settings.top_k)
        row = row[ids]
    if settings.share:
        ordered = np.sort(row)[::-1]
        running = np.cumsum(_integer_weights(ordered, largest, settings.scale))
        target = -(-int(running[-1]) * settings.share >> 63)  # top_p of the total, rounded up
        kept = np.flatnonzero(row >= ordered[np.searchsorted(running, target)])
        row, ids = row[kept], kept if ids is None else ids[kept]
    running = np.cumsum(_integer_weights(row, largest, settings.scale))
    drawn = random_bits * int(running[-1]) >> 64
    place = int(np.searchsorted(running, drawn, side="right"))
    return place if ids is None else int(ids[place])


def _largest_ids(row: NDArray, k: int) -> NDArray:
    """Returns the rising ids of the k largest elements of row (V,), and of all equal to the last.

    At least k elements reach the k-th largest of the maxima of disjoint parts of the row. So all
    others are left out at first, if there are so many parts.
    """
    parts = row.size // LOGITS_PER_MAXIMUM
    if parts < k:
        return np.flatnonzero(row >= _kth_largest(row, k))
    maxima = row[: parts * LOGITS_PER_MAXIMUM].reshape(LOGITS_PER_MAXIMUM, parts).max(axis=0)
    ids = np.flatnonzero(row >= _kth_largest(maxima, k))
    candidates = row[ids]
    kept: NDArray = ids[candidates >= _kth_largest(candidates, k)]
    return kept


def _kth_largest(x: NDArray, k: int) -> np.float32:
    """Returns the k-th largest element of x (n,), 1 <= k <= n."""
    place = x.size - k
    largest: np.float32 = np.partition(x, place)[place]
    return largest


def _integer_weights(row: NDArray, largest: np.float32, scale: float) -> NDArray:
    """Returns the weights of logits (n,) float32 as int64: weight_of in kernels/sample.cu.

    Each operation is that of the kernel, in the same order, so that both give the same integers.
    """
    with np.errstate(over="ignore"):  # a difference of logits may be -infinity
        t = row - largest
        t *= np.float32(scale)
    np.maximum(t, LOWEST_LOG2, out=t)
    n = np.rint(t)
    t -= n
    p = np.full_like(t, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        p *= t
        p += coefficient
    p *= (n.astype(np.int32) + (WEIGHT_LOG2 + 127) << 23).view(np.float32)  # times 2^(n + 40)
    return p.astype(np.int64)


def _append(window: NDArray, value: float) -> float:
    """Appends a value to a window (WINDOW,), oldest first, and returns its z-score in it."""
    window[:-1] = window[1:]
    window[-1] = value
    values = window.astype(np.float64)
    deviation = values - values.mean()
    std = math.sqrt(np.mean(deviation**2))
    return float(deviation[-1]) / std if std else 0.0
