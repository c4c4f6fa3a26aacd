"""kernels/embedding.cu and the NumPy op, on every device."""

from __future__ import annotations

import numpy as np
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import INT32, X_DTYPES
from gpu_gpt2.ops.cases import Case


@op_cases("embedding_fwd", "embedding_bwd", "token_embedding_fwd", "token_embedding_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
def test_a_token_below_zero_reads_no_memory_outside_the_table(dtype: str, device: str) -> None:
    """Damaged logits give the token -1, which the next step may read before the host sees it."""
    ops, X = make_ops(device, dtype), X_DTYPES[dtype]
    tokens = upload(ops.device, [[-1, 2], [0, -1]], INT32)
    starts = upload(ops.device, [0, 0], INT32)
    wte = upload(ops.device, np.arange(1, 41).reshape(5, 8), X)
    wpe = upload(ops.device, np.zeros((2, 8)), X)
    x = ops.device.empty((2, 2, 8), X)
    y = ops.device.empty((2, 2, 8), X)
    ops.embedding_fwd(x, tokens, starts, wte, wpe)
    ops.token_embedding_fwd(y, tokens, wte)
    expected = ops.device.download(wte)[[[0, 2], [0, 0]]]
    np.testing.assert_array_equal(ops.device.download(x), expected)
    np.testing.assert_array_equal(ops.device.download(y), expected)
