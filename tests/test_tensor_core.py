"""kernels/tensor_core.cuh in the emulator: results as NumPy's, and reports of planted faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import ORDERS

from gpu_gpt2.device.base import X_DTYPES
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import kernel_source
from gpu_gpt2.errors import KernelError

pytestmark = pytest.mark.emulator

KERNELS = """
#include "tensor_core.cuh"

// c (16, 16) = a (16, 16) times b (16, 16), or times the transpose of b.
extern "C" __global__ void matmul(float* c, const floatX* a, const floatX* b, int transposed) {
    SHARED_ARRAY(floatX, a_rows, 16 * 24);
    SHARED_ARRAY(floatX, b_rows, 16 * 24);
    int lane = threadIdx.x;
    cp_async(a_rows + lane / 2 * 24 + lane % 2 * 8, a + lane * 8, true);
    cp_async(b_rows + lane / 2 * 24 + lane % 2 * 8, b + lane * 8, true);
    cp_async_wait_all();
    __syncthreads();
    unsigned int left[4], right[4];
    ldmatrix(left, a_rows + lane % 16 * 24, lane / 16 * 8);
    if (transposed) {
        ldmatrix(right, b_rows + (lane % 8 + lane / 16 * 8) * 24, lane / 8 % 2 * 8);
    } else {
        ldmatrix_transposed(right, b_rows + lane % 16 * 24 + lane / 16 * 8, 0);
    }
    float sum[2][4] = {};
    mma(sum[0], left, right);
    mma(sum[1], left, right + 2);
    for (int i = 0; i < 8; i++) {
        int row = lane / 4 + i / 2 % 2 * 8;
        int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        c[row * 16 + column] = sum[i / 4][i % 4];
    }
}

// y = x, two elements of each lane packed into a register and unpacked.
extern "C" __global__ void pairs(float* y, const float* x) {
    unsigned int pair = pack(x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
    y[2 * threadIdx.x] = low(pair);
    y[2 * threadIdx.x + 1] = high(pair);
}

// y = x, rotated by 256 elements, through shared memory; the last thread copies zeros instead.
// FAULT 1 leaves out the wait, FAULT 2 the barrier; FAULT 3 adds a copy that comes too early.
extern "C" __global__ void copies(floatX* y, const floatX* x) {
    SHARED_ARRAY(floatX, tile, 8 * 64);
    int from = threadIdx.x * 8;
    cp_async(tile + from, x + from, threadIdx.x < 63);
#if FAULT != 1
    cp_async_wait_all();
#endif
#if FAULT != 2
    __syncthreads();
#endif
    for (int i = 0; i < 8; i++) {
        y[from + i] = tile[(from + 256 + i) % 512];
    }
#if FAULT == 3
    cp_async(tile + from, x + from, true);
    cp_async_wait_all();
#endif
}

extern "C" __global__ void half_a_warp(float* c, const floatX* a) {
    float sum[4] = {};
    unsigned int left[4] = {};
    if (threadIdx.x < 16) {
        mma(sum, left, left);
    }
    c[threadIdx.x] = sum[0] + to_float(a[0]);
}

extern "C" __global__ void odd_row(float* c, const floatX* a) {
    SHARED_ARRAY(floatX, rows, 64 * 9);
    for (int i = threadIdx.x; i < 64 * 9; i += WARP) {
        rows[i] = a[0];
    }
    __syncthreads();
    unsigned int words[4];
    ldmatrix(words, rows + threadIdx.x * 9, 0);
    c[threadIdx.x] = low(words[0]);
}
"""


@pytest.fixture(autouse=True)
def _kernels(kernel_folder: Path) -> None:
    (kernel_folder / "tensor_core_test.cu").write_text(KERNELS)


def launch(name: str, dtype: str, *args: Any, threads: int = 32, fault: int = 0, **on: Any) -> None:
    kernels = kernel_source("tensor_core_test.cu", dtype, FAULT=fault)
    EmulatorDevice(**on).launch(kernels, name, (1,), (threads,), args)


half_types = pytest.mark.parametrize("dtype", ["bf16", "fp16"])


@half_types
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [0, 1])
def test_mma_of_loaded_fragments_is_numpys_matmul(transposed: int, order: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (2, 16, 16)).astype(X_DTYPES[dtype])
    c = EmulatorDevice().empty((16, 16), np.float32)
    launch("matmul", dtype, c, a, b, transposed, order=order)
    right = b.astype(np.float32)
    np.testing.assert_array_equal(c, a.astype(np.float32) @ (right.T if transposed else right))


@half_types
def test_packing_two_elements_rounds_to_nearest_even(dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    x[:4] = 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 2.0**-25
    y = EmulatorDevice().empty((64,), np.float32)
    launch("pairs", dtype, y, x)
    np.testing.assert_array_equal(y, x.astype(X_DTYPES[dtype]).astype(np.float32))


@half_types
@pytest.mark.parametrize("order", ORDERS)
def test_elements_copied_with_cp_async_arrive_after_wait_and_barrier(
    order: str, dtype: str
) -> None:
    x = np.arange(1, 513).astype(X_DTYPES[dtype])
    y = EmulatorDevice().empty((512,), x.dtype)
    launch("copies", dtype, y, x, threads=64, order=order)
    expected = np.roll(np.where(np.arange(512) < 504, x, 0).astype(x.dtype), -256)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (1, "ended without writing y"),  # y receives poison from where no copy has arrived
        (2, "at byte 512 of shared 'tile' .* which no thread of the block has written yet"),
        (3, "race on byte 0 of shared 'tile'"),
    ],
    ids=["not waited for", "no barrier", "too early again"],
)
def test_a_copy_without_wait_or_barrier_is_reported(fault: int, report: str) -> None:
    x = np.ones(512, X_DTYPES["bf16"])
    y = EmulatorDevice().empty((512,), x.dtype)
    with pytest.raises(KernelError, match=f"copies .*{report}"):
        launch("copies", "bf16", y, x, threads=64, fault=fault)


def test_an_mma_that_half_a_warp_calls_is_reported() -> None:
    c, a = np.zeros(32, np.float32), np.ones(1, X_DTYPES["bf16"])
    with pytest.raises(
        KernelError, match=r"mma.sync at .* is not reached by all lanes of its mask"
    ):
        launch("half_a_warp", "bf16", c, a)


def test_a_row_of_ldmatrix_that_does_not_start_at_16_bytes_is_reported() -> None:
    c, a = np.zeros(32, np.float32), np.ones(1, X_DTYPES["bf16"])
    with pytest.raises(KernelError, match="odd_row ldmatrix reads a row that does not start at"):
        launch("odd_row", "bf16", c, a)
