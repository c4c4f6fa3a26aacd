"""kernels/adamw.cu and its NumPy twin, on every device."""

from __future__ import annotations

import numpy as np
import pytest
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.check import Case
from gpu_gpt2.device.base import FLOAT32, X_DTYPES
from gpu_gpt2.ops.interface import AdamWStep


@op_cases("adamw")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
@pytest.mark.parametrize("grad_sq", [np.inf, np.nan])
def test_nothing_changes_when_the_gradient_is_not_finite(
    grad_sq: float, dtype: str, device: str
) -> None:
    ops = make_ops(device, dtype)
    rng = np.random.default_rng(0)
    states = [upload(ops.device, rng.uniform(0.1, 1.0, 33), FLOAT32) for _ in range(3)]
    master = states[0]
    param = master if dtype == "fp32" else upload(ops.device, np.zeros(33), X_DTYPES[dtype])
    before = [ops.device.download(array).tobytes() for array in (*states, param)]
    grad = upload(ops.device, np.ones(33), FLOAT32)
    hyper = AdamWStep(
        step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    norm = upload(ops.device, np.array([grad_sq]), FLOAT32)
    ops.adamw(*states, param, grad, norm, 10, hyper)
    assert [ops.device.download(array).tobytes() for array in (*states, param)] == before


@pytest.mark.parametrize("decayed", [-1, 34])
def test_refuses_to_decay_more_than_there_is(decayed: int) -> None:
    ops = make_ops("emulator", "fp32")
    n = [ops.device.zeros((33,), FLOAT32) for _ in range(5)]
    hyper = AdamWStep(
        step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    with pytest.raises(ValueError, match=f"decayed {decayed} is not within 0 to 33"):
        ops.adamw(*n, ops.device.zeros((1,), FLOAT32), decayed, hyper)
