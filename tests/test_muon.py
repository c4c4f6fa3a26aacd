"""kernels/muon.cu and the NumPy ops, on every device."""

from __future__ import annotations

from devices import assert_case, op_cases

from gpu_gpt2.ops.cases import Case


@op_cases("muon_momentum", "muon_polynomial", "muon_update")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)
