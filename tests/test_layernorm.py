"""kernels/layernorm.cu and the NumPy op, on every device."""

from __future__ import annotations

import numpy as np
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import FLOAT32, X_DTYPES
from gpu_gpt2.ops.cases import Case


@op_cases("layernorm_fwd", "residual_layernorm_fwd", "layernorm_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
def test_epsilon_is_added_to_the_variance(dtype: str, device: str) -> None:
    ops, X = make_ops(device, dtype), X_DTYPES[dtype]
    x = upload(ops.device, [[-1.0, 1.0, -1.0, 1.0]], X)  # variance 1
    zero, one = (upload(ops.device, np.full(4, value), X) for value in (0, 1))
    r, y = (upload(ops.device, np.zeros((1, 4)), X) for _ in range(2))
    mean, rstd = (upload(ops.device, [np.nan], FLOAT32) for _ in range(2))
    ops.layernorm_fwd(y, mean, rstd, x, one, zero, 3.0)
    assert ops.device.download(rstd).tolist() == [0.5]
    ops.residual_layernorm_fwd(r, y, mean, rstd, x, upload(ops.device, np.zeros((1, 4)), X),
                               zero, one, zero, 15.0)  # fmt: skip
    assert ops.device.download(rstd).tolist() == [0.25]
    assert ops.device.download(y).astype(float).tolist() == [[-0.25, 0.25, -0.25, 0.25]]
