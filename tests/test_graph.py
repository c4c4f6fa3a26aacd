"""Steps as graphs, uploads beside the work, results read late, and the calls of cuBLAS."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cupy_backends.cuda.libs import cublas as cupy_cublas
from devices import every_device
from models import TINY, new_model, noisy_weights, random_batch, training_step

from gpu_gpt2.config import GPT2Config, ModelConfig
from gpu_gpt2.device import cublas, open_device
from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, INT32, Array
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.cublas import Cublas
from gpu_gpt2.device.cuda import MAX_UPLOADING_BYTES, CudaDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.evaluate import completion_losses, validation_loss
from gpu_gpt2.formats.multiple_choice import Example
from gpu_gpt2.generate import generate
from gpu_gpt2.models import families
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.decoder import Decoder, Sampling
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import SHAPES_KEPT, Model
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.training.muon import OPTIMIZERS

LONG = GPT2Config(vocab_size=67, n_positions=140, n_embd=32, n_layer=2, n_head=2)
B, T = 2, 11
MICRO_STEPS = 3
STEPS = 4
GPU = [pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


def trained(device: str, dtype: str, name: str) -> tuple[list[float], bytes]:
    """Losses of STEPS steps and of other passes in between, and the weights."""
    model = new_model(TINY, device, dtype, B=B, T=T)
    optimizer = OPTIMIZERS[name](model, weight_decay=0.1)
    optimizer.load(initial_weights(TINY, 0))
    rng = np.random.default_rng(2)
    losses = []
    for i in range(STEPS):
        batches = [random_batch(TINY, rng, B, T) for _ in range(MICRO_STEPS)]
        losses.append(training_step(model, optimizer, batches, 1e-3 * (i + 1)).loss)
        small = np.full((1, T - 4), i, np.int32)
        losses += map(float, model.losses(Batch.of(small, small)))
        losses.append(float(model.ops.device.download(model.forward(small)).max()))
    assert not model.ops.device.graph_error
    return losses, model.ops.device.download(optimizer.master).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_graphs_give_what_single_launches_give(
    name: str, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 are replays."""
    losses, weights = trained(device, dtype, name)
    assert (losses, weights) == trained(device, dtype, name)
    monkeypatch.setattr(CudaDevice, "graph", lambda self, work: work)
    expected, _ = trained(device, dtype, name)  # cupy.matmul may choose other algorithms
    np.testing.assert_allclose(losses, expected, rtol=1e-2)


class GraphDevice(CpuDevice):
    """A CPU that plays a device with graphs, and notes which are made and launched."""

    is_async = True

    def __init__(self) -> None:
        self.made: list[Callable[[], None]] = []
        self.launched: list[int] = []
        self.waits = 0
        self.allocated = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        self.allocated += 1
        return super().empty(shape, dtype)

    def synchronize(self) -> None:
        self.waits += 1

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        number = len(self.made)
        self.made.append(work)

        def launch() -> None:
            self.launched.append(number)
            work()

        return launch


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_shape_of_batch_has_its_own_graphs_which_are_made_once(name: str) -> None:
    device = GraphDevice()
    model = families.new_model(TINY, ReferenceOps(device), max_batch=B, max_seq_len=T)
    optimizer = OPTIMIZERS[name](model)
    optimizer.load(initial_weights(TINY, 0))
    allocated = device.allocated
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
    assert device.allocated == allocated


def graph_model(config: ModelConfig, *, B: int, T: int) -> tuple[Model, GraphDevice]:
    """A model with random weights on a device with graphs."""
    device = GraphDevice()
    model = families.new_model(config, ReferenceOps(device), max_batch=B, max_seq_len=T)
    model.load(noisy_weights(config, noise_seed=1))
    return model, device


def test_losses_are_one_graph_for_each_shape() -> None:
    model, device = graph_model(TINY, B=B, T=T)
    rng = np.random.default_rng(2)
    full, short = random_batch(TINY, rng, B, T), random_batch(TINY, rng, 1, 5)
    expected = [model.losses(full), model.losses(short)]
    for batch, losses, first, launched in (
        (full, expected[0], True, 0),
        (full, 2 * expected[0], False, 0),  # the same graph adds to the losses
        (short, expected[1], True, 1),
        (full, expected[0], True, 0),
    ):
        device.launched.clear()
        np.testing.assert_allclose(model.add_losses(batch, first=first), losses, rtol=1e-6)
        assert device.launched == [launched]
    assert len(device.made) == 2


def test_the_graphs_of_the_shape_used_least_recently_are_dropped() -> None:
    model, device = graph_model(LONG, B=1, T=LONG.n_positions)
    rng = np.random.default_rng(2)
    batches = [random_batch(LONG, rng, 1, n) for n in range(1, SHAPES_KEPT + 2)]
    expected = [model.losses(batch) for batch in batches[:SHAPES_KEPT]]
    model.losses(batches[0])  # used last now
    device.waits = 0
    model.losses(batches[SHAPES_KEPT])  # drops the second shape
    assert device.waits == 1  # before the memory of its stager is given back
    assert len(device.made) == SHAPES_KEPT + 1
    np.testing.assert_array_equal(model.losses(batches[0]), expected[0])
    assert len(device.made) == SHAPES_KEPT + 1
    np.testing.assert_array_equal(model.losses(batches[1]), expected[1])
    assert len(device.made) == SHAPES_KEPT + 2


def test_prompts_of_64_lengths_share_a_graph() -> None:
    """The last length is the context, which is no multiple of 64."""
    model, device = graph_model(LONG, B=2, T=LONG.n_positions)
    usual = new_model(LONG, B=1, T=LONG.n_positions, training=False)
    usual.load(noisy_weights(LONG, noise_seed=1))
    decoders = [Decoder(m, batch=1, length=LONG.n_positions) for m in (model, usual)]
    tokens = np.random.default_rng(2).integers(0, LONG.vocab_size, LONG.n_positions, np.int32)
    for n in range(1, LONG.n_positions + 1):
        device.launched.clear()
        for decoder in decoders:
            decoder.prefill([tokens[:n]])
        assert device.launched == [(n - 1) // 64]
        logits, expected = (decoder.read_logits() for decoder in decoders)
        np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)
    assert len(device.made) == 3
    assert usual.padded_length(5) == 5


def test_every_new_token_is_one_graph() -> None:
    """Also with another seed, and when the window slides, which is a prefill and a draw."""
    model, device = graph_model(LONG, B=2, T=64)
    usual = new_model(LONG, B=2, T=64, training=False)
    usual.load(noisy_weights(LONG, noise_seed=1))
    prompts = [np.arange(1, 31, dtype=np.int32), np.arange(40, 45, dtype=np.int32)]
    decoders = [Decoder(m, batch=2, length=64) for m in (model, usual)]
    for seed in (1, 2):
        device.launched.clear()
        sampling = Sampling(temperature=1.2, seed=seed)
        rows, expected = (
            list(generate(decoder, prompts, max_tokens=70, sampling=sampling))
            for decoder in decoders
        )
        assert rows == expected
        prefill, draw, step = 0, 1, 2
        # The longer prompt leaves room for 34 tokens, and a window that has slid for 32.
        slid = [prefill, draw, *[step] * 32]
        assert device.launched == [prefill, draw, *[step] * 34, *slid, prefill, draw, step]
    assert len(device.made) == 3


def test_hellaswag_makes_few_graphs() -> None:
    model, device = graph_model(LONG, B=8, T=LONG.n_positions)
    usual = new_model(LONG, B=8, T=LONG.n_positions, training=False)
    usual.load(noisy_weights(LONG, noise_seed=1))
    rng = np.random.default_rng(2)
    rows = [[rng.integers(0, LONG.vocab_size, n) for n in (i, 3, 9, 1, 7)] for i in range(1, 40)]
    examples = [Example(context=row[0], completions=tuple(row[1:]), label=0) for row in rows]
    found = [list(completion_losses(m, examples)) for m in (model, usual)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert len(device.made) == 2  # batches of two examples, and the last of one


def test_the_host_is_at_most_16_batches_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = graph_model(TINY, B=B, T=T)
    read: list[int] = []  # graphs launched before each look at the device

    def download_view(self: GraphDevice, src: np.ndarray) -> np.ndarray:
        read.append(len(self.launched))
        return src

    monkeypatch.setattr(GraphDevice, "download_view", download_view)
    tokens = np.random.default_rng(2).integers(0, TINY.vocab_size, 40 * B * T + T + 5)
    validation_loss(model, tokens, B, T)
    assert read == [16, 32, 40, 41, 42]  # full batches, the last row, the last tokens


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


def test_uploads_keep_few_bytes_of_host_memory() -> None:
    """A model is read piece by piece; the host could not hold all pieces."""
    device = object.__new__(CudaDevice)
    waits: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(len(device._uploading)))
    device._cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    device._uploading, device._uploading_bytes = [], 0
    piece = np.empty(MAX_UPLOADING_BYTES // 4, np.int8)
    for held in (1, 2, 3, 4, 0, 1, 2):
        device.upload(SimpleNamespace(set=lambda src: None), piece)
        assert len(device._uploading) == held
    assert waits == [5]


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
