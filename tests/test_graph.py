"""Steps as graphs, uploads beside the work, results read late, and the calls of cuBLAS."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cupy_backends.cuda.libs import cublas as cupy_cublas
from devices import every_device
from models import TINY, new_model, random_batch, training_step

from gpu_gpt2.device import cublas, open_device
from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, INT32
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.cublas import Cublas
from gpu_gpt2.device.cuda import CudaDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.gpt2 import GPT2
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.training.optimizer import AdamW

B, T = 2, 11
MICRO_STEPS = 3
STEPS = 4
GPU = [pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


def trained(device: str, dtype: str) -> tuple[list[float], bytes]:
    """Losses of STEPS steps, with a look at another batch size in between, and the weights."""
    model = new_model(TINY, device, dtype, B=B, T=T)
    optimizer = AdamW(model, weight_decay=0.1)
    optimizer.load(initial_weights(TINY, 0))
    rng = np.random.default_rng(2)
    losses = []
    for i in range(STEPS):
        batches = [random_batch(TINY, rng, B, T) for _ in range(MICRO_STEPS)]
        losses.append(training_step(model, optimizer, batches, 1e-3 * (i + 1)).loss)
        small = np.full((1, T - 4), i, np.int32)
        model.losses(Batch.of(small, small))
    assert not model.ops.device.graph_error
    return losses, model.ops.device.download(optimizer.master).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", GPU)
def test_graphs_give_what_single_launches_give(
    dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 are replays."""
    losses, weights = trained(device, dtype)
    assert (losses, weights) == trained(device, dtype)
    monkeypatch.setattr(CudaDevice, "graph", lambda self, work: work)
    expected, _ = trained(device, dtype)  # cupy.matmul may choose other algorithms
    np.testing.assert_allclose(losses, expected, rtol=1e-2)


class GraphDevice(CpuDevice):
    """A CPU that plays a device with graphs, and notes which are made and launched."""

    def __init__(self) -> None:
        self.made: list[Callable[[], None]] = []
        self.launched: list[int] = []

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        number = len(self.made)
        self.made.append(work)

        def launch() -> None:
            self.launched.append(number)
            work()

        return launch


def test_every_shape_of_batch_has_its_own_graphs_which_are_made_once() -> None:
    device = GraphDevice()
    model = GPT2(TINY, ReferenceOps(device), max_batch=B, max_seq_len=T)
    optimizer = AdamW(model)
    optimizer.load(initial_weights(TINY, 0))
    rng = np.random.default_rng(2)
    for shape, micro_steps, expected in (
        ((B, T), 3, [0, 1, 1, 2]),  # the first micro-step, the others, the update
        ((B, T), 3, [0, 1, 1, 2]),
        ((1, 5), 1, [3, 4]),
        ((B, T), 3, [0, 1, 1, 2]),
        ((B, T), 1, [5, 6]),  # the weight of a micro-step is part of its graph
    ):
        device.launched.clear()
        batches = [random_batch(TINY, rng, *shape) for _ in range(micro_steps)]
        assert math.isfinite(training_step(model, optimizer, batches, 1e-3).loss)
        assert device.launched == expected
    assert len(device.made) == 7


@every_device
def test_a_stager_has_copied_when_it_returns(dtype: str, device: str) -> None:
    place = open_device(device)
    buffers = place.empty((3, 5), INT32), place.empty((7,), FLOAT32)
    stage = place.stager(*buffers)
    for i in range(5):  # more calls than there are sets of memory
        a, b = np.full((3, 5), i, np.int32), np.full(7, i / 2, np.float32)
        stage(a, b)
        a[:], b[:] = -1, -1  # the caller's again
        assert (place.download(buffers[0]) == i).all()
        assert (place.download(buffers[1]) == i / 2).all()
    with pytest.raises(ValueError, match=r"cannot copy float32 \(1,\) into float32 \(7,\)"):
        stage(a, b[:1])


@every_device
def test_an_async_read_keeps_the_values_of_when_it_began(dtype: str, device: str) -> None:
    place = open_device(device)
    x = place.zeros((4,), FLOAT32)
    results = []
    for i in range(4):
        place.upload(x, np.full(4, i, np.float32))
        results.append(place.read_async(x))
    assert [result.result().tolist() for result in results] == [[i] * 4 for i in range(4)]


@pytest.mark.parametrize("device", GPU)
def test_work_that_cannot_be_captured_is_launched_piece_by_piece(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = open_device(device)
    x, calls = place.zeros((4,), FLOAT32), []

    def work() -> None:
        calls.append(place.download(x)[0])  # waits for the device: forbidden in a capture
        place.fill_zero(x)

    run = place.graph(work)
    for _ in range(4):
        run()
    assert len(caplog.messages) == 1
    assert "CUDA graphs cannot be used here" in caplog.messages[0]
    assert place.graph_error in caplog.messages[0]
    assert len(calls) >= 4
    other = place.graph(lambda: place.fill_zero(x))  # no other graph is tried
    for _ in range(3):
        other()
    assert len(caplog.messages) == 1


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
