"""Test bodies that run on every device: NumPy, the emulator, and a GPU where there is one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from gpu_gpt2.device.base import Array, Device
from gpu_gpt2.device.cuda import CudaDevice
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.ops.cases import CASES, LARGE_CASES, Case
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import Ops
from gpu_gpt2.tools.check import run_case

ORDERS = ("ascending", "descending", "random")

CPU = [pytest.param("fp32", "cpu", id="fp32-cpu")]
KERNELS = [
    pytest.param(dtype, device, id=f"{dtype}-{device}", marks=marks)
    for device, marks in (("emulator", ()), ("cuda", pytest.mark.gpu))
    for dtype in DTYPES
]
every_device = pytest.mark.parametrize(("dtype", "device"), CPU + KERNELS)
kernel_devices = pytest.mark.parametrize(("dtype", "device"), KERNELS)


def op_cases(*ops: str) -> pytest.MarkDecorator:
    """Parametrises (case, dtype, device): every case of these ops everywhere it can run.

    Real sizes are for GPUs; the CPU computes in float32 only.
    """
    return pytest.mark.parametrize(("case", "dtype", "device"), list(_runs(ops)))


def _runs(ops: tuple[str, ...]) -> Iterator[object]:
    for case in (*CASES, *LARGE_CASES):
        if case.op not in ops:
            continue
        for dtype in DTYPES:
            name = f"{case}-{dtype}"
            if case in CASES:
                if dtype == "fp32":
                    yield pytest.param(case, dtype, "cpu", id=f"{name}-cpu")
                yield pytest.param(case, dtype, "emulator", id=f"{name}-emulator")
            yield pytest.param(case, dtype, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu)


def make_ops(device: str, dtype: str, order: str = "ascending") -> Ops:
    """The ops on a device by name; `order` is that of the emulator's threads."""
    if device == "cpu":
        return ReferenceOps()
    return KernelOps(_kernel_device(device, order), dtype)


@functools.cache
def _kernel_device(device: str, order: str) -> Device:
    return EmulatorDevice(order=order) if device == "emulator" else CudaDevice()


def upload(device: Device, values: npt.ArrayLike, dtype: npt.DTypeLike) -> Array:
    """A device array with these values, rounded to dtype."""
    host = np.asarray(values).astype(dtype)
    array = device.empty(host.shape, host.dtype)
    device.upload(array, host)
    return array


def assert_case(case: Case, dtype: str, device: str) -> None:
    """Every output within its limit, and the same bits in three runs.

    In the emulator these are its three thread orders: work that depends on which thread comes
    first, for want of a barrier or otherwise, gives different bits.
    """
    runs = [run_case(case, make_ops(device, dtype, order)) for order in ORDERS]
    for order, results in zip(ORDERS, runs, strict=True):
        for result in results:
            assert result.passed, f"{order}: {result}"
    first, *others = ([result.bits for result in results] for results in runs)
    assert all(bits == first for bits in others), f"{case}: runs differ in their bits"
