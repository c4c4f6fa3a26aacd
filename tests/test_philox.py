"""Philox4x32-10 in Python and in CUDA C gives the numbers that Random123 publishes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import kernel_source
from gpu_gpt2.rng.philox import philox

# Counter, key and result of philox4x32 with 10 rounds, from Random123's file kat_vectors.
VECTORS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""
WORDS = np.array([[int(word, 16) for word in line.split()] for line in VECTORS.split("\n")[1:-1]])

KERNEL = """
#include "philox.cuh"

extern "C" __global__ void words(int* out, const int* in) {
    const int* row = in + 6 * threadIdx.x;
    uint4 counter = make_uint4(row[0], row[1], row[2], row[3]);
    uint4 result = philox(counter, row[4], row[5]);
    out[4 * threadIdx.x] = result.x;
    out[4 * threadIdx.x + 1] = result.y;
    out[4 * threadIdx.x + 2] = result.z;
    out[4 * threadIdx.x + 3] = result.w;
}
"""


def test_python_gives_the_published_numbers() -> None:
    for c0, c1, c2, c3, k0, k1, *expected in WORDS.tolist():
        assert list(philox((c0, c1, c2, c3), (k0, k1))) == expected


@pytest.mark.emulator
def test_cuda_gives_the_published_numbers(kernel_folder: Path) -> None:
    (kernel_folder / "words.cu").write_text(KERNEL)
    device = EmulatorDevice()
    given = WORDS[:, :6].astype(np.uint32).view(np.int32).copy()
    out = device.empty((len(WORDS), 4), np.int32)
    device.launch(kernel_source("words.cu", "fp32"), "words", (1,), (len(WORDS),), (out, given))
    np.testing.assert_array_equal(out.view(np.uint32), WORDS[:, 6:])
