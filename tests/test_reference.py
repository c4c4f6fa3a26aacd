"""The NumPy ops against finite differences in float64: the root of all other evidence."""

import math
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from gpu_gpt2.models.batch import Batch
from gpu_gpt2.ops import reference
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import WINDOW, AdamWSettings

EPS = 1e-5
OPS = ReferenceOps()
SHAPES = [(1, 1, 1), (2, 7, 3), (3, 5, 31)]  # (B, T, C); C also serves as V and O


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numeric_gradient(f: Callable[[], np.ndarray], x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """d sum(f() * dy) / dx by central differences, f reading x in place."""
    grad = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept, h = x[i], 1e-5
        x[i] = kept + h
        above = (f() * dy).sum()
        x[i] = kept - h
        below = (f() * dy).sum()
        x[i] = kept
        grad[i] = (above - below) / (2 * h)
    return grad


def assert_near(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    worst = np.abs(actual - expected).max()
    scale = max(1.0, np.abs(expected).max())
    assert worst <= 1e-7 * scale, f"{name}: worst error {worst:.2e} at scale {scale:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding(shape: tuple[int, int, int]) -> None:
    B, T, C = shape
    wte, wpe, dy = (rng(i).normal(size=s) for i, s in enumerate([(4, C), (T + 2, C), (B, T, C)]))
    tokens = rng(3).integers(0, 4, (B, T)).astype(np.int32)
    starts = np.zeros(B, np.int32)

    def forward() -> np.ndarray:
        x = np.empty((B, T, C))
        OPS.embedding_fwd(x, tokens, starts, wte, wpe)
        return x

    dwte, dwpe = np.ones_like(wte), np.ones_like(wpe)
    OPS.embedding_bwd(dwte, dwpe, dy, tokens, Batch.of(tokens, tokens).order)
    assert_near("dwte", dwte, 1 + numeric_gradient(forward, wte, dy))
    assert_near("dwpe", dwpe, 1 + numeric_gradient(forward, wpe, dy))


def test_embedding_reads_like_the_formula() -> None:
    wte, wpe = rng(0).normal(size=(4, 5)), rng(1).normal(size=(9, 5))
    tokens = rng(2).integers(0, 4, (2, 3)).astype(np.int32)
    starts = np.array([6, 2], np.int32)
    x = np.empty((2, 3, 5))
    OPS.embedding_fwd(x, tokens, starts, wte, wpe)
    for b, t in np.ndindex(2, 3):
        np.testing.assert_array_equal(x[b, t], wte[tokens[b, t]] + wpe[starts[b] + t])


@pytest.mark.parametrize("shape", SHAPES)
def test_token_embedding(shape: tuple[int, int, int]) -> None:
    B, T, C = shape
    wte, dy = rng(0).normal(size=(4, C)), rng(1).normal(size=(B, T, C))
    tokens = rng(3).integers(0, 4, (B, T)).astype(np.int32)

    def forward() -> np.ndarray:
        x = np.empty((B, T, C))
        OPS.token_embedding_fwd(x, tokens, wte)
        return x

    dwte = np.ones_like(wte)
    OPS.token_embedding_bwd(dwte, dy, tokens, Batch.of(tokens, tokens).order)
    assert_near("dwte", dwte, 1 + numeric_gradient(forward, wte, dy))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm(shape: tuple[int, int, int], fused: bool) -> None:
    N, C = shape[0] * shape[1], shape[2]
    x, x2, dy, w = (rng(i).normal(size=s) for i, s in enumerate([*[(N, C)] * 3, (C,)]))
    rstd, r = np.empty(N), x

    def forward() -> np.ndarray:
        nonlocal r
        y = np.empty((N, C))
        if fused:
            r = np.empty((N, C))
            OPS.residual_rmsnorm_fwd(r, y, rstd, x, x2, w, EPS)
        else:
            OPS.rmsnorm_fwd(y, rstd, x, w, EPS)
        return y

    forward()
    dx, dw = np.ones((N, C)), np.ones(C)
    OPS.rmsnorm_bwd(dx, dw, dy, r, w, rstd)
    assert_near("dx", dx, 1 + numeric_gradient(forward, x, dy))
    assert_near("dw", dw, 1 + numeric_gradient(forward, w, dy))
    if fused:
        assert_near("dx2", dx, 1 + numeric_gradient(forward, x2, dy))


ROPE_SIZES = [(1, 1, 3, 2, 1), (2, 5, 4, 6, 1), (1, 3, 8, 4, 2)]  # (B, T, R, D, G)


def rope_call(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns qkv, starts and angles."""
    B, T, R, D, _ = sizes
    angle = rng(1).uniform(-4, 4, (T + 3, D // 2))
    angles = np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(T + 3, D)
    return rng(0).normal(size=(B, T, R, D)), rng(2).integers(0, 4, B).astype(np.int32), angles


@pytest.mark.parametrize("sizes", ROPE_SIZES)
def test_rope(sizes: tuple[int, ...]) -> None:
    qkv, starts, angles = rope_call(sizes)
    dy = rng(3).normal(size=qkv.shape)

    def forward() -> np.ndarray:
        rotated = qkv.copy()
        OPS.rope_fwd(rotated, starts, angles, sizes[-1])
        return rotated

    dqkv = dy.copy()
    OPS.rope_bwd(dqkv, starts, angles, sizes[-1])
    assert_near("dqkv", dqkv, numeric_gradient(forward, qkv, dy))


@pytest.mark.parametrize("sizes", ROPE_SIZES)
def test_rope_reads_like_the_formula(sizes: tuple[int, ...]) -> None:
    B, T, R, D, G = sizes
    qkv, starts, angles = rope_call(sizes)
    expected = qkv.copy()
    for b, t, r, j in np.ndindex(B, T, R - G, D // 2):
        cos, sin = angles[starts[b] + t, 2 * j : 2 * j + 2]
        x, y = qkv[b, t, r, 2 * j : 2 * j + 2]
        expected[b, t, r, 2 * j : 2 * j + 2] = x * cos - y * sin, x * sin + y * cos
    OPS.rope_fwd(qkv, starts, angles, G)
    np.testing.assert_allclose(qkv, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layernorm(shape: tuple[int, int, int], fused: bool) -> None:
    N, C = shape[0] * shape[1], shape[2]
    sizes = [(N, C)] * 3 + [(C,)] * 3
    x, x2, dy, bias, w, b = (rng(i).normal(size=s) for i, s in enumerate(sizes))
    mean, rstd, r = np.empty(N), np.empty(N), x

    def forward() -> np.ndarray:
        nonlocal r
        y = np.empty((N, C))
        if fused:
            r = np.empty((N, C))
            OPS.residual_layernorm_fwd(r, y, mean, rstd, x, x2, bias, w, b, EPS)
        else:
            OPS.layernorm_fwd(y, mean, rstd, x, w, b, EPS)
        return y

    forward()
    dx, dw, db = np.ones((N, C)), np.ones(C), np.ones(C)
    OPS.layernorm_bwd(dx, dw, db, dy, r, w, mean, rstd)
    # A row of one channel is constant after normalising, and EPS in the variance dominates.
    assert_near("dx", dx, 1 + numeric_gradient(forward, x, dy))
    assert_near("dw", dw, 1 + numeric_gradient(forward, w, dy))
    assert_near("db", db, 1 + numeric_gradient(forward, b, dy))
    if fused:
        assert_near("dx2", dx, 1 + numeric_gradient(forward, x2, dy))
        assert_near("dbias", (dx - 1).sum(axis=0), numeric_gradient(forward, bias, dy))


ATTENTION_SIZES = [  # (B, T, H, G, D)
    *((1, 1, 1, 1, 1), (2, 5, 2, 2, 3), (1, 9, 3, 3, 4)),
    *((2, 5, 4, 2, 3), (1, 4, 6, 2, 2), (1, 3, 8, 1, 3)),
]


@pytest.mark.parametrize("sizes", ATTENTION_SIZES)
def test_attention(sizes: tuple[int, int, int, int, int]) -> None:
    B, T, H, G, D = sizes
    qkv, dy = rng(0).normal(size=(B, T, H + 2 * G, D)), rng(1).normal(size=(B, T, H, D))
    lse, y = np.empty((B, H, T)), np.empty((B, T, H, D))

    def forward() -> np.ndarray:
        OPS.attention_fwd(y, lse, qkv)
        return y

    forward()
    dqkv, delta = np.empty_like(qkv), np.empty_like(lse)
    OPS.attention_bwd(dqkv, delta, dy, qkv, y, lse)
    assert_near("dqkv", dqkv, numeric_gradient(forward, qkv, dy))


@pytest.mark.parametrize("sizes", [*ATTENTION_SIZES, (2, 33, 8, 2, 16)])
def test_attention_is_that_of_pytorch(sizes: tuple[int, int, int, int, int]) -> None:
    B, T, H, G, D = sizes
    qkv, dy = rng(0).normal(size=(B, T, H + 2 * G, D)), rng(1).normal(size=(B, T, H, D))
    lse, y = np.empty((B, H, T)), np.empty((B, T, H, D))
    OPS.attention_fwd(y, lse, qkv)
    dqkv, delta = np.empty_like(qkv), np.empty_like(lse)
    OPS.attention_bwd(dqkv, delta, dy, qkv, y, lse)
    rows = torch.from_numpy(qkv).requires_grad_()
    q, k, v = rows.transpose(1, 2).split([H, G, G], dim=1)  # each (B, heads, T, D)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    expected.backward(torch.from_numpy(dy))
    assert_near("y", y, expected.detach().numpy())
    assert rows.grad is not None
    assert_near("dqkv", dqkv, rows.grad.numpy())


def test_attention_forward_reads_like_the_formula() -> None:
    B, T, H, G, D = 2, 6, 4, 2, 3
    qkv = rng(0).normal(size=(B, T, H + 2 * G, D))
    y, lse = np.empty((B, T, H, D)), np.empty((B, H, T))
    OPS.attention_fwd(y, lse, qkv)
    for b, t, h in np.ndindex(B, T, H):
        k, v = qkv[b, :, H + h // 2], qkv[b, :, H + G + h // 2]
        scores = np.array([qkv[b, t, h] @ k[s] for s in range(t + 1)]) / math.sqrt(D)
        weights = np.exp(scores) / np.exp(scores).sum()
        expected = sum(weights[s] * v[s] for s in range(t + 1))
        np.testing.assert_allclose(y[b, t, h], expected, rtol=1e-12)
        np.testing.assert_allclose(lse[b, h, t], np.log(np.exp(scores).sum()), rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(shape: tuple[int, int, int]) -> None:
    N, V = shape[0] * shape[1], shape[2]
    x, dy = rng(0).normal(size=(N, V)), rng(1).normal(size=(N, V))

    def forward() -> np.ndarray:
        y = np.empty_like(x)
        OPS.softmax_fwd(y, x)
        return y

    y = forward()
    np.testing.assert_allclose(y, np.exp(x) / np.exp(x).sum(1, keepdims=True), rtol=1e-12)
    dx = np.empty_like(x)
    OPS.softmax_bwd(dx, dy, y)
    assert_near("dx", dx, numeric_gradient(forward, x, dy))


@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape: tuple[int, int, int]) -> None:
    N, O = shape[0] * shape[1], shape[2]
    x, dy, b = 2 * rng(0).normal(size=(N, O)), rng(1).normal(size=(N, O)), rng(2).normal(size=O)

    def forward() -> np.ndarray:
        y = np.empty_like(x)
        OPS.gelu_fwd(y, x, b)
        return y

    expected = [0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
                for u in (x + b).flat]  # fmt: skip
    np.testing.assert_allclose(forward().reshape(-1), expected, rtol=1e-12, atol=1e-15)
    dx = np.empty_like(x)
    OPS.gelu_bwd(dx, dy, x, b)
    assert_near("dx", dx, numeric_gradient(forward, x, dy))
    assert_near("db", dx.sum(axis=0), numeric_gradient(forward, b, dy))


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, int, int]) -> None:
    N, F = shape[0] * shape[1], shape[2]
    u, dy = 2 * rng(0).normal(size=(N, 2, F)), rng(1).normal(size=(N, F))

    def forward() -> np.ndarray:
        y = np.empty((N, F))
        OPS.swiglu_fwd(y, u)
        return y

    gate, up = u[:, 0], u[:, 1]
    np.testing.assert_allclose(forward(), gate / (1 + np.exp(-gate)) * up, rtol=1e-12)
    du = np.empty_like(u)
    OPS.swiglu_bwd(du, dy, u)
    assert_near("du", du, numeric_gradient(forward, u, dy))


@pytest.mark.parametrize("shape", SHAPES)
def test_bias(shape: tuple[int, int, int]) -> None:
    N, O = shape[0] * shape[1], shape[2]
    x, b, dy = (rng(i).normal(size=s) for i, s in enumerate([(N, O), (O,), (N, O)]))

    def forward() -> np.ndarray:
        y = x.copy()
        OPS.bias_fwd(y, b)
        return y

    db = np.ones(O)
    OPS.bias_bwd(db, dy)
    assert_near("db", db, 1 + numeric_gradient(forward, b, dy))


@pytest.mark.parametrize(("N", "V", "Vp"), [(1, 1, 1), (5, 7, 7), (6, 31, 40)])
def test_classifier(N: int, V: int, Vp: int) -> None:
    logits = rng(0).normal(size=(N, Vp))
    logits[:, V:] = np.nan  # must never be read
    targets = rng(1).integers(0, V, N).astype(np.int32)
    dloss = 0.37

    def forward() -> np.ndarray:
        losses = np.zeros(N)
        before = logits.copy()
        OPS.classifier_fwd(losses, logits, targets, V)
        np.testing.assert_array_equal(logits, before)
        return losses

    expected = [-np.log(np.exp(row[t]) / np.exp(row[:V]).sum())
                for row, t in zip(logits, targets, strict=True)]  # fmt: skip
    np.testing.assert_allclose(forward(), expected, rtol=1e-12, atol=1e-15)
    used = logits[:, :V]
    gradient = numeric_gradient(forward, used, np.full(N, dloss))
    losses = np.ones(N)
    OPS.classifier_fwd_bwd(losses, logits, targets, np.array([0.5]), V, 2 * dloss)
    np.testing.assert_allclose(losses, 1 + np.array(expected), rtol=1e-12)
    assert_near("dlogits", logits[:, :V], gradient)
    np.testing.assert_array_equal(logits[:, V:], 0.0)


SETTINGS = AdamWSettings(
    beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.2, max_grad_norm=1.0, max_loss_scale=2.0**16
)


def test_adamw_reads_like_the_paper() -> None:
    """The fifth update, with the gradient in a scale of 8."""
    n, decayed = 1000, 333
    w, m, v, g = (rng(i).normal(size=n) for i in range(4))
    v = v**2
    norm = math.sqrt((g**2).sum())
    clipped = g / norm  # the norm is far above 1
    m2 = 0.9 * m + 0.1 * clipped
    v2 = 0.95 * v + 0.05 * clipped**2
    update = (m2 / (1 - 0.9**5)) / (np.sqrt(v2 / (1 - 0.95**5)) + 1e-8)
    expected = w - 0.1 * (update + 0.2 * w * (np.arange(n) < decayed))
    grad_sq, factors, report = np.empty(1), np.empty(5), np.empty(7)
    windows = np.full((2, WINDOW), np.nan)
    OPS.squared_norm(grad_sq, 8 * g)
    np.testing.assert_allclose(grad_sq[0], 64 * norm**2, rtol=1e-14)
    OPS.prepare_update(
        factors, report, np.array([8.0]), np.array([4.0, 0.0, 0.0]), windows, np.array([1.0, 4.0]),
        grad_sq, np.array([0.1]), 0.5, SETTINGS,
    )  # fmt: skip
    np.testing.assert_allclose(report, [2.5, norm, 8.0, 8.0, np.nan, np.nan, 0.0], rtol=1e-14)
    np.testing.assert_allclose(windows[:, -1], [2.5, norm], rtol=1e-14)
    OPS.adamw(w, m, v, w, 8 * g, factors, decayed, SETTINGS)
    np.testing.assert_allclose(m, m2, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(v, v2, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-14)


def test_results_do_not_depend_on_blocks_or_threads() -> None:
    """Many blocks in parallel give the same bits again and again."""
    x = rng(0).normal(size=(700, 300)).astype(np.float32)
    sums = []
    for _ in range(5):
        db = np.zeros(300, np.float32)
        OPS.bias_bwd(db, x)
        sums.append(db.tobytes())
    assert len(set(sums)) == 1


def test_blas_gets_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while the ops have their own: errors, and callers that overlap."""

    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info()]

    def fail(item: int) -> None:
        time.sleep(0.05 * item)
        done.append(item)
        if item == 0:
            raise ValueError("a row that cannot be")

    def sleep(item: int) -> None:
        time.sleep(0.01 * item)

    monkeypatch.setattr(reference, "_cores", lambda: 2)
    before = threads()
    done: list[int] = []
    with pytest.raises(ValueError, match="a row that cannot be"):
        reference._in_parallel([0, 1], fail)
    assert sorted(done) == [0, 1]  # the other thread was waited for
    assert threads() == before
    callers = [
        threading.Thread(target=reference._in_parallel, args=([3 - n, 4 - n], sleep))
        for n in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert threads() == before


@pytest.mark.parametrize("k", [1, 2, 40, 140, 141, 8999, 9000])
def test_the_largest_ids_are_those_of_a_full_sort(k: int) -> None:
    """Also where equal elements, at the place of the k-th largest, are all taken."""
    row = np.round(rng(k).normal(size=9000) * 20).astype(np.float32)
    expected = np.flatnonzero(row >= np.sort(row)[-k])
    assert reference._largest_ids(row, k).tolist() == expected.tolist()


def test_decoded_attention_does_not_depend_on_the_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences at the same position are computed together, in parts, with the same bits."""
    monkeypatch.setattr(reference, "CACHE_ELEMENTS", 3 * 2 * 6 * 8)  # 3 sequences at position 5
    B, H, G, S, D = 9, 4, 2, 16, 8
    normal = rng(0).standard_normal
    qkv, k, v = (
        normal(shape, dtype=np.float32)
        for shape in ((B, 1, H + 2 * G, D), (B, G, S, D), (B, G, S, D))
    )
    starts = np.array([5, 5, 5, 5, 9, 0, 0, 15, 20], np.int32)
    together, alone = np.zeros((2, B, 1, H, D), np.float32)
    OPS.attention_decode(together, qkv, k, v, starts)
    for b in range(B):
        i = slice(b, b + 1)
        OPS.attention_decode(alone[i], qkv[i], k[i], v[i], starts[i])
    assert np.array_equal(together, alone)
    assert np.all(together.any(axis=(1, 2, 3)))
