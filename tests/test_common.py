"""Reductions of kernels/common.cuh over a block and over groups of lanes, in the emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from devices import ORDERS

from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import KernelSource, kernel_source

pytestmark = pytest.mark.emulator

KERNELS = """
extern "C" __global__ void sums(float* out, const float* x) {
    SHARED_ARRAY(float, scratch, MAX_WARPS);
    float value = x[threadIdx.x];
    float sum = block_sum(value, scratch);
    float squares = block_sum(value * value, scratch);
    float largest = block_max(value, scratch);
    float least = -block_max(-value, scratch);
    if (threadIdx.x == 0) {
        out[0] = sum;
        out[1] = squares;
        out[2] = largest;
        out[3] = least;
    }
}

extern "C" __global__ void sums_of_groups(float* out, const float* x, int width) {
    out[threadIdx.x] = group_sum(x[threadIdx.x], width);
}
"""


@pytest.fixture
def kernels(kernel_folder: Path) -> KernelSource:
    (kernel_folder / "sums.cu").write_text(KERNELS)
    return kernel_source("sums.cu", "fp32")


@pytest.mark.parametrize("threads", [32, 96, 1024])
@pytest.mark.parametrize("order", ORDERS)
def test_block_reductions_may_share_scratch_one_after_the_other(
    kernels: KernelSource, threads: int, order: str
) -> None:
    device = EmulatorDevice(order=order)
    x = np.random.default_rng(0).integers(-9, 10, threads).astype(np.float32)
    out = device.empty((4,), np.float32)
    device.launch(kernels, "sums", (1,), (threads,), (out, x))
    assert out.tolist() == [x.sum(), (x * x).sum(), x.max(), x.min()]


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_group_sum_adds_groups_of_adjacent_lanes(kernels: KernelSource, width: int) -> None:
    device = EmulatorDevice()
    x = np.random.default_rng(0).integers(-9, 10, 64).astype(np.float32)
    out = device.empty((64,), np.float32)
    device.launch(kernels, "sums_of_groups", (1,), (64,), (out, x, width))
    assert out.tolist() == np.repeat(x.reshape(-1, width).sum(axis=1), width).tolist()
