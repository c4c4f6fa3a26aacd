"""kernels/gelu.cu and the NumPy op, on every device."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from devices import assert_case, every_device, kernel_devices, make_ops, op_cases, upload

from gpu_gpt2.device.base import X_DTYPES
from gpu_gpt2.ops.cases import Case


@op_cases("gelu_fwd", "gelu_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@kernel_devices
@pytest.mark.parametrize("size", [5.0, 12.0, 60.0, 1e5, 1e15, 1e30])
def test_far_from_zero(size: float, dtype: str, device: str) -> None:
    """y is x or 0 and the slope 1 or 0, although x^3, x^2 and exponentials overflow on the way."""
    ops = make_ops(device, dtype)
    size = min(size, float(ml_dtypes.finfo(X_DTYPES[dtype]).max))
    x = upload(ops.device, np.array([[size, -size]]), X_DTYPES[dtype])
    dy = upload(ops.device, np.ones((1, 2)), X_DTYPES[dtype])
    b = upload(ops.device, np.zeros(2), X_DTYPES[dtype])
    y, dx = ops.device.empty((1, 2), x.dtype), ops.device.empty((1, 2), x.dtype)
    ops.gelu_fwd(y, x, b)
    ops.gelu_bwd(dx, dy, x, b)
    stored = ops.device.download(x).astype(np.float64)
    expected = [[stored[0, 0], 0.0]]
    np.testing.assert_allclose(ops.device.download(y).astype(float), expected, atol=2e-6)
    np.testing.assert_allclose(ops.device.download(dx).astype(float), [[1.0, 0.0]], atol=2e-5)


@every_device
def test_not_a_number_stays_one(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    nan = upload(ops.device, np.full((1, 1), np.nan), X_DTYPES[dtype])
    dy = upload(ops.device, np.ones((1, 1)), X_DTYPES[dtype])
    b = upload(ops.device, np.zeros(1), X_DTYPES[dtype])
    y, dx = ops.device.empty((1, 1), nan.dtype), ops.device.empty((1, 1), nan.dtype)
    ops.gelu_fwd(y, nan, b)
    ops.gelu_bwd(dx, dy, nan, b)
    assert np.isnan(ops.device.download(y).astype(float)).all()
    assert np.isnan(ops.device.download(dx).astype(float)).all()
