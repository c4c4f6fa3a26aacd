"""kernels/attention.cu, kernels/flash_attention.cu and the NumPy op, on every device."""

from __future__ import annotations

from devices import assert_case, op_cases

from gpu_gpt2.ops.cases import Case


@op_cases("attention_fwd", "attention_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)
