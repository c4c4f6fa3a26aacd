"""kernels/swiglu.cu and the NumPy op, on every device and against PyTorch."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import X_DTYPES
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.reference import ReferenceOps


@op_cases("swiglu_fwd", "swiglu_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
@pytest.mark.parametrize("size", [20.0, 88.0, 89.0, 104.0, 1e5, 1e30])
@pytest.mark.filterwarnings("error")
def test_gates_far_from_zero(size: float, dtype: str, device: str) -> None:
    """silu is the gate or 0 and its derivative 1 or 0, although exp(-gate) overflows."""
    ops, X = make_ops(device, dtype), X_DTYPES[dtype]
    size = min(size, float(ml_dtypes.finfo(X).max))
    u = upload(ops.device, [[[size, -size], [1.0, 1.0]]], X)
    dy = upload(ops.device, np.ones((1, 2)), X)
    y, du = ops.device.empty((1, 2), X), ops.device.empty((1, 2, 2), X)
    ops.swiglu_fwd(y, u)
    ops.swiglu_bwd(du, dy, u)
    gate = float(ops.device.download(u)[0, 0, 0])
    silu = [gate, 0.0]
    # At -20 silu is -4.1e-8, and the smallest float16 is 6.0e-8.
    np.testing.assert_allclose(ops.device.download(y).astype(float), [silu], atol=6e-8)
    expected = [[[1.0, 0.0], silu]]
    np.testing.assert_allclose(ops.device.download(du).astype(float), expected, atol=6e-8)


@every_device
def test_not_a_number_stays_one(dtype: str, device: str) -> None:
    ops, X = make_ops(device, dtype), X_DTYPES[dtype]
    u = upload(ops.device, [[[np.nan, 1.0], [1.0, np.nan]]], X)
    dy = upload(ops.device, np.ones((1, 2)), X)
    y, du = ops.device.empty((1, 2), X), ops.device.empty((1, 2, 2), X)
    ops.swiglu_fwd(y, u)
    ops.swiglu_bwd(du, dy, u)
    assert np.isnan(ops.device.download(y).astype(float)).all()
    found = np.isnan(ops.device.download(du).astype(float))
    assert found.tolist() == [[[True, True], [True, False]]]  # dup does not depend on up


def test_numpy_agrees_with_pytorch() -> None:
    rng = np.random.default_rng(0)
    u, dy = 3 * rng.normal(size=(5, 2, 33)), rng.normal(size=(5, 33))
    u_t = torch.tensor(u, requires_grad=True)
    y_t = torch.nn.functional.silu(u_t[:, 0]) * u_t[:, 1]
    y_t.backward(torch.tensor(dy))
    y, du = np.empty_like(dy), np.empty_like(u)
    ops = ReferenceOps()
    ops.swiglu_fwd(y, u)
    ops.swiglu_bwd(du, dy, u)
    assert u_t.grad is not None
    np.testing.assert_allclose(y, y_t.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(du, u_t.grad.numpy(), rtol=1e-12, atol=1e-14)
