"""`gpu_gpt2.check` itself: that it sees ops that are wrong in each of the ways it looks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_gpt2.ops.cases import CASES, Case
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import TABLE
from gpu_gpt2.tools.check import CheckResult, run_case, run_checks, table

NDArray = Any


class Broken(ReferenceOps):
    """NumPy's softmax, spoilt by one of its subclasses."""

    def softmax_fwd(self, y: NDArray, x: NDArray) -> None:
        super().softmax_fwd(y, x)
        self.spoil(y, x)

    def spoil(self, y: NDArray, x: NDArray) -> None:
        raise NotImplementedError


class Inaccurate(Broken):
    def spoil(self, y: NDArray, x: NDArray) -> None:
        y *= 1.0 + 1e-5


class WrongInOnePlace(Broken):
    def spoil(self, y: NDArray, x: NDArray) -> None:
        y[-1, -1] += 1e-4


class NotWritten(Broken):
    def spoil(self, y: NDArray, x: NDArray) -> None:
        y[-1, -1] = np.nan


class WritesAfter(Broken):
    def spoil(self, y: NDArray, x: NDArray) -> None:
        np.lib.stride_tricks.as_strided(y, (y.size + 1,), (y.itemsize,))[-1] = 0.0


class WritesBefore(Broken):
    def spoil(self, y: NDArray, x: NDArray) -> None:
        whole = y
        while whole.base is not None:
            whole = whole.base
        start = (y.ctypes.data - whole.ctypes.data) // y.itemsize
        whole.reshape(-1)[start - 1] = 0.0


class ChangesItsInput(Broken):
    def spoil(self, y: NDArray, x: NDArray) -> None:
        if x is not y:
            x[0, 0] += 1.0


def _softmax_case() -> Case:
    return next(case for case in CASES if case.op == "softmax_fwd" and case.sizes["V"] == 1025)


@pytest.mark.parametrize(
    ("ops", "note"),
    [
        (Inaccurate, ""),
        (WrongInOnePlace, ""),
        (NotWritten, ""),
        (WritesAfter, "wrote after its memory"),
        (WritesBefore, "wrote before its memory"),
        (ChangesItsInput, "changed an input"),
    ],
)
def test_sees(ops: type[Broken], note: str) -> None:
    results = run_case(_softmax_case(), ops())
    failed = [result for result in results if not result.passed]
    assert [result.note for result in failed] == [note]
    assert "FAIL" in str(failed[0])


def test_an_inaccurate_reference_does_not_lift_its_own_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = ReferenceOps.softmax_fwd

    def float32_is_inaccurate(self: ReferenceOps, y: NDArray, x: NDArray) -> None:
        exact(self, y, x)
        if y.dtype == np.float32:
            y *= 1.0 + 1e-4

    monkeypatch.setattr(ReferenceOps, "softmax_fwd", float32_is_inaccurate)
    assert not all(r.passed for r in run_case(_softmax_case(), ReferenceOps()))


class ForgetsTheSignOfZero(ReferenceOps):
    def cast(self, y: NDArray, x: NDArray) -> None:
        super().cast(y, x)
        y += np.zeros((), y.dtype)  # -0 becomes 0, and nothing else changes


def test_exact_ops_are_compared_to_the_sign_of_zero() -> None:
    case = next(c for c in CASES if c.make.__name__ == "cast_to_bfloat16" and c.sizes["n"] == 31)
    assert all(r.passed for r in run_case(case, ReferenceOps()))
    assert not any(r.passed for r in run_case(case, ForgetsTheSignOfZero()))


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(TABLE)


def test_same_inputs_every_time() -> None:
    first, second = (run_case(_softmax_case(), ReferenceOps()) for _ in range(2))
    assert first == second


def test_table_shows_every_result() -> None:
    cases = [_softmax_case()]
    results: list[CheckResult] = [
        *run_checks(lambda _: ReferenceOps(), ["fp32"], cases),
        *run_checks(lambda _: WritesAfter(), ["fp32"], cases),
    ]
    verdicts = list(table(results).columns[-1].cells)
    assert verdicts == ["[green]pass[/]", "[bold red]FAIL[/] wrote after its memory"]
