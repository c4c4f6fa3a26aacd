"""Steps as graphs, uploads beside work, results read late: what a device offers for them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cupy_backends.cuda.libs import cublas as cupy_cublas
from devices import CPU, KERNELS, every_device

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device import cublas, open_device
from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, INT32
from gpu_gpt2.device.cublas import Cublas
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.gpt2 import GPT2
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.ops import ops_for
from gpu_gpt2.training.optimizer import AdamW
from gpu_gpt2.training.step import TrainingStep

CONFIG = ModelConfig(vocab_size=67, n_positions=11, n_embd=32, n_layer=2, n_head=2)
B, T = 2, 11
MICRO_STEPS = 3
STEPS = 4
GPU = [pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


def random_batches() -> list[Batch]:
    rng = np.random.default_rng(2)
    batches = []
    for _ in range(STEPS * MICRO_STEPS):
        tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)
        order = np.argsort(tokens, axis=None, kind="stable").astype(np.int32)
        batches.append(Batch(tokens, targets, order))
    return batches


def trained(device: str, dtype: str, *, as_graphs: bool) -> tuple[list[float], bytes]:
    """Losses of STEPS steps, with a look at another batch size in between, and the weights."""
    ops = ops_for(open_device(device), dtype)
    model = GPT2(CONFIG, ops, dtype=dtype, max_batch=B, max_seq_len=T)
    optimizer = AdamW(model, weight_decay=0.1)
    optimizer.load(initial_weights(CONFIG, 0))
    said: list[str] = []
    step = TrainingStep(model, optimizer, micro_steps=MICRO_STEPS, say=said.append)
    batches = iter(random_batches())
    losses = []
    for i in range(STEPS):
        lr = 1e-3 * (i + 1)
        if as_graphs:
            report = step(lambda: next(batches), lr)
        else:
            for micro_step in range(MICRO_STEPS):
                b = next(batches)
                model.forward_backward(
                    b.tokens, b.targets, b.order, micro_step=micro_step, micro_steps=MICRO_STEPS
                )
            optimizer.step(lr, micro_steps=MICRO_STEPS)
            report = optimizer.report()
        model.losses(b_small := np.full((1, T - 4), i, np.int32), b_small)
        losses.append(report().loss)
    assert not said
    return losses, ops.device.download(optimizer.master).tobytes()


@pytest.mark.parametrize(("dtype", "device"), CPU + KERNELS)
def test_graphs_give_what_single_calls_give(dtype: str, device: str) -> None:
    """On a GPU steps 3 and 4 are replays; elsewhere TrainingStep is held to its parts."""
    losses, weights = trained(device, dtype, as_graphs=True)
    expected_losses, expected_weights = trained(device, dtype, as_graphs=False)
    if device == "cuda":  # cupy.matmul may choose other algorithms
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-2)
        assert (losses, weights) == trained(device, dtype, as_graphs=True)
    else:
        assert (losses, weights) == (expected_losses, expected_weights)


@every_device
def test_a_feeder_copies_before_it_returns(dtype: str, device: str) -> None:
    place = open_device(device)
    buffers = place.empty((3, 5), INT32), place.empty((7,), FLOAT32)
    feed = place.feeder(*buffers)
    for i in range(5):  # more calls than there are sets of memory
        a, b = np.full((3, 5), i, np.int32), np.full(7, i / 2, np.float32)
        feed(a, b)
        a[:], b[:] = -1, -1  # the caller's again
        assert (place.download(buffers[0]) == i).all()
        assert (place.download(buffers[1]) == i / 2).all()
    with pytest.raises(ValueError, match=r"cannot copy float32 \(1,\) into float32 \(7,\)"):
        feed(a, b[:1])


@every_device
def test_a_fetch_keeps_what_was_there_when_it_began(dtype: str, device: str) -> None:
    place = open_device(device)
    x = place.zeros((4,), FLOAT32)
    results = []
    for i in range(4):
        place.upload(x, np.full(4, i, np.float32))
        results.append(place.fetch(x))
    assert [result().tolist() for result in results] == [[i] * 4 for i in range(4)]


@pytest.mark.parametrize("device", GPU)
def test_work_that_cannot_be_captured_is_done_as_it_is(device: str) -> None:
    place = open_device(device)
    x, said, calls = place.zeros((4,), FLOAT32), [], []

    def work() -> None:
        calls.append(place.download(x)[0])  # waits for the device: forbidden in a capture
        place.fill_zero(x)

    run = place.graph(work, said.append)
    for _ in range(4):
        run()
    assert len(said) == 1
    assert "CUDA graphs cannot be used here" in said[0]
    assert len(calls) >= 4
    other = place.graph(lambda: place.fill_zero(x), said.append)  # nor are others tried
    for _ in range(3):
        other()
    assert len(said) == 1


# --- cuBLAS, as far as it can be looked at without a GPU ---


def test_cupy_s_binding_leads_to_every_function_of_cublas() -> None:
    library = ctypes.CDLL(cupy_cublas.__file__)
    for name in (*cublas.SIGNATURES, "cublasGetStatusString"):
        assert getattr(library, name)
    assert cublas.OP_N == cupy_cublas.CUBLAS_OP_N
    assert cublas.OP_T == cupy_cublas.CUBLAS_OP_T
    assert cublas.COMPUTE_32F == cupy_cublas.CUBLAS_COMPUTE_32F
    assert cublas.GEMM_DEFAULT == cupy_cublas.CUBLAS_GEMM_DEFAULT


class ByHand(Cublas):
    """GemmEx in NumPy, by its documentation: column-major matrices at addresses."""

    def __init__(self) -> None:
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._handle = ctypes.c_void_p()

    def _call(self, name: str, *arguments: Any) -> None:
        assert name == "cublasGemmEx"
        assert len(arguments) == len(cublas.SIGNATURES[name])
        (_, a_op, b_op, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta,
         c, c_type, ldc, compute, _) = arguments  # fmt: skip
        assert compute == cublas.COMPUTE_32F

        def op(address: int, kind: int, ld: int, op: int, rows: int, columns: int) -> np.ndarray:
            if op == cublas.OP_T:
                return matrix(address, kind, ld, columns, rows).T.astype(np.float32)
            return matrix(address, kind, ld, rows, columns).astype(np.float32)

        product = op(a, a_type, lda, a_op, m, k) @ op(b, b_type, ldb, b_op, k, n)
        out = matrix(c, c_type, ldc, m, n)
        old = out.astype(np.float32) if beta._obj.value else 0.0
        out[...] = alpha._obj.value * product + beta._obj.value * old


def matrix(address: int, kind: int, ld: int, rows: int, columns: int) -> np.ndarray:
    """A column-major matrix in memory; `ld` elements lie between two columns."""
    dtype = {number: dtype for dtype, number in cublas.CUDA_TYPES.items()}[kind]
    assert ld >= rows
    words = (ctypes.c_char * (dtype.itemsize * ld * columns)).from_address(address)
    return np.frombuffer(words, dtype).reshape(columns, ld)[:, :rows].T


def on_device(array: np.ndarray) -> SimpleNamespace:
    """The attributes of a CuPy array that are asked for."""
    data = SimpleNamespace(ptr=array.ctypes.data)
    return SimpleNamespace(
        shape=array.shape, strides=array.strides, dtype=array.dtype, flags=array.flags, data=data
    )


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_row_major_products_in_cublas_s_terms(
    dtype: np.dtype[Any], a_transposed: bool, b_transposed: bool, accumulate: bool
) -> None:
    M, K, N = 3, 5, 7
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (K, M) if a_transposed else (M, K)).astype(dtype)
    b = rng.integers(-4, 5, (N, K) if b_transposed else (K, N)).astype(dtype)
    a, b = (a.T if a_transposed else a), (b.T if b_transposed else b)
    out = np.full((M, N), 10.0 if accumulate else np.nan, np.float32)
    ByHand().matmul(on_device(out), on_device(a), on_device(b), accumulate=accumulate)
    expected = a.astype(np.float32) @ b.astype(np.float32) + (10.0 if accumulate else 0.0)
    np.testing.assert_array_equal(out, expected)
