"""kernels/sample.cu and the NumPy op, on every device."""

from __future__ import annotations

from devices import assert_case, op_cases

from gpu_gpt2.ops.cases import Case


@op_cases("sample")
def test_draws_the_same_token_everywhere(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)
