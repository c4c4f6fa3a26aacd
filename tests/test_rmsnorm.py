"""kernels/rmsnorm.cu and the NumPy op, on every device and against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import FLOAT32, X_DTYPES
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.reference import ReferenceOps


@op_cases("rmsnorm_fwd", "residual_rmsnorm_fwd", "rmsnorm_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
def test_epsilon_is_added_to_the_mean_square(dtype: str, device: str) -> None:
    ops, X = make_ops(device, dtype), X_DTYPES[dtype]
    x = upload(ops.device, [[-1.0, 1.0, -1.0, 1.0]], X)  # mean square 1
    zero, one = (upload(ops.device, values, X) for values in (np.zeros((1, 4)), np.ones(4)))
    r, y = (upload(ops.device, np.zeros((1, 4)), X) for _ in range(2))
    rstd = upload(ops.device, [np.nan], FLOAT32)
    ops.rmsnorm_fwd(y, rstd, x, one, 3.0)
    assert ops.device.download(rstd).tolist() == [0.5]
    ops.residual_rmsnorm_fwd(r, y, rstd, x, zero, one, 15.0)
    assert ops.device.download(rstd).tolist() == [0.25]
    assert ops.device.download(y).astype(float).tolist() == [[-0.25, 0.25, -0.25, 0.25]]


def test_more_channels_than_a_row_group_holds() -> None:
    ops = make_ops("emulator", "fp32")
    x, w, rstd = (np.zeros(shape, np.float32) for shape in ((1, 32769), 32769, 1))
    with pytest.raises(ConfigError, match="rmsnorm_fwd: C = 32769 must be 1 to 32768"):
        ops.rmsnorm_fwd(x, rstd, x, w, 1e-5)
    with pytest.raises(ConfigError, match="rmsnorm_bwd: C = 32769 must be 1 to 32768"):
        ops.rmsnorm_bwd(x, w, x, x, w, rstd)


def test_numpy_agrees_with_pytorch() -> None:
    N, C, eps = 5, 33, 1e-5
    rng = np.random.default_rng(0)
    x, dy, w = rng.normal(size=(N, C)), rng.normal(size=(N, C)), rng.normal(size=C)
    x_t, w_t = (torch.tensor(array, requires_grad=True) for array in (x, w))
    y_t = torch.nn.functional.rms_norm(x_t, (C,), w_t, eps)
    y_t.backward(torch.tensor(dy))
    y, rstd, dx, dw = np.empty((N, C)), np.empty(N), np.zeros((N, C)), np.zeros(C)
    ops = ReferenceOps()
    ops.rmsnorm_fwd(y, rstd, x, w, eps)
    ops.rmsnorm_bwd(dx, dw, dy, x, w, rstd)
    for ours, theirs in ((y, y_t.detach()), (dx, x_t.grad), (dw, w_t.grad)):
        assert theirs is not None
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-13)
