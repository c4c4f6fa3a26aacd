"""kernels/classifier.cu and the NumPy op, on every device."""

from __future__ import annotations

import numpy as np
import pytest
from devices import assert_case, every_device, kernel_devices, make_ops, op_cases, upload

from gpu_gpt2.device.base import FLOAT32, INT32, X_DTYPES
from gpu_gpt2.ops.cases import Case


@op_cases("classifier_fwd", "classifier_fwd_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@kernel_devices
@pytest.mark.parametrize("target", [-1, 257, 2**31 - 1, -(2**31)])
def test_target_outside_the_vocabulary(target: int, dtype: str, device: str) -> None:
    """Nothing is read or written out of bounds; that row's loss says that something is wrong."""
    ops = make_ops(device, dtype)
    rng = np.random.default_rng(0)
    logits = upload(ops.device, rng.standard_normal((2, 384)), X_DTYPES[dtype])
    targets = upload(ops.device, np.array([target, 3]), INT32)
    scale = upload(ops.device, np.ones(1), FLOAT32)
    for backward in (False, True):
        losses = upload(ops.device, np.zeros(2), FLOAT32)
        if backward:
            ops.classifier_fwd_bwd(losses, logits, targets, scale, 257, 0.5)
        else:
            ops.classifier_fwd(losses, logits, targets, 257)
        assert np.isnan(ops.device.download(losses)).tolist() == [True, False]


@pytest.mark.parametrize("vocab_size", [0, 385])
def test_refuses_a_vocabulary_wider_than_the_logits(vocab_size: int) -> None:
    ops = make_ops("emulator", "fp32")
    logits = ops.device.zeros((2, 384), FLOAT32)
    losses, targets = ops.device.zeros((2,), FLOAT32), ops.device.zeros((2,), INT32)
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size} is not within 1 to 384"):
        ops.classifier_fwd(losses, logits, targets, vocab_size)


@every_device
def test_padding_gets_zero_gradient(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    logits = upload(ops.device, np.full((3, 40), 1.5), X_DTYPES[dtype])
    losses = upload(ops.device, np.zeros(3), FLOAT32)
    targets = upload(ops.device, np.arange(3), INT32)
    scale = upload(ops.device, np.ones(1), FLOAT32)
    ops.classifier_fwd_bwd(losses, logits, targets, scale, 33, 1.0)
    assert not ops.device.download(logits)[:, 33:].any()
