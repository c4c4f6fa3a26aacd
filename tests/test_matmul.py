"""Matmuls of every device."""

from __future__ import annotations

import numpy as np
import pytest
from devices import assert_case, op_cases

from gpu_gpt2.device import cpu
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.ops.cases import Case


@op_cases("matmul")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_a_few_rows_on_the_cpu_agree_with_float64(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 to 6 rows are multiplied as vectors, here by blocks of 32 rows of the weights and less."""
    monkeypatch.setattr(cpu, "VECTOR_BLOCK", 33 * 257 - 1)
    rng = np.random.default_rng(rows)
    x, w = (rng.standard_normal((n, 257), dtype=np.float32) for n in (rows, 301))
    assert w.size >= cpu.MIN_VECTOR_WEIGHT
    y = np.full((rows, 301), np.nan, np.float32)
    vectors = []
    by_vectors = cpu._matmul_by_vectors
    monkeypatch.setattr(
        cpu, "_matmul_by_vectors", lambda *args: vectors.append(1) or by_vectors(*args)
    )
    CpuDevice().matmul(y, x, w.T)
    assert len(vectors) == (1 < rows <= cpu.MAX_VECTORS)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T.astype(np.float64), atol=1e-4)
