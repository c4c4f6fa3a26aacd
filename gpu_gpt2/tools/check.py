"""Every op on one device, measured against NumPy in float64 on the same inputs.

One case runs three times: on the device under test; in NumPy with float64, which counts as the
truth; and in NumPy with float32, rounded to the output's dtype, whose error shows how much error
this precision must make. Limits follow from the third run (docs/numerics.md):

    limit = MULTIPLE x the float32 error + FLOOR x e,  and at most  rounding + CEILING x e

with e the last place of float32 and rounding half the last place of the output's own dtype, both at
the largest output. A second limit of this form holds for the root mean square of the error, with e
at the root mean square of the output.

Outputs that no device may round differently are compared exactly. Overwritten outputs start as NaN,
each tensor lies between guard elements that must survive, and inputs must come back unchanged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.table import Table

from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.ops.cases import CASES, INTEGERS, Call, Case
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import Ops

NDArray = npt.NDArray[Any]

MULTIPLE: Final = 3.0
FLOOR: Final = 8.0
CEILING: Final = 40.0  # a float32 reference gone wrong cannot raise its own limit beyond this
GUARD: Final = 128  # elements before and after each tensor; keeps the tensor itself aligned
GUARD_BYTE: Final = 0xA5


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One output of one case; passed if both errors are within their limits.

    `bits` is a hash of the output's bytes, by which runs that must agree to the bit are compared.
    """

    op: str
    dtype: str
    shape: str
    output: str
    worst_error: float
    limit: float
    rms: float
    rms_limit: float
    bits: str
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.worst_error <= self.limit and self.rms <= self.rms_limit  # False for a NaN

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return (
            f"{verdict} {self.op} {self.dtype} {self.shape} {self.output}: worst error "
            f"{self.worst_error:.3g} (limit {self.limit:.3g}), rms {self.rms:.3g} "
            f"(limit {self.rms_limit:.3g}) {self.note}"
        ).rstrip()


class RoundingReference(ReferenceOps):
    """ReferenceOps that stores the residual sum in X before its statistics are taken.

    That rounding is part of the op's definition, so it does not count as an error.
    """

    def __init__(self, x_dtype: np.dtype[Any]) -> None:
        super().__init__()
        self.x_dtype = x_dtype

    def residual_layernorm_fwd(
        self,
        r: NDArray,
        y: NDArray,
        mean: NDArray,
        rstd: NDArray,
        x1: NDArray,
        x2: NDArray,
        bias: NDArray,
        w: NDArray,
        b: NDArray,
        eps: float,
    ) -> None:
        r[...] = (x1 + (x2 + bias)).astype(FLOAT32).astype(self.x_dtype)
        self.layernorm_fwd(y, mean, rstd, r, w, b, eps)

    def residual_rmsnorm_fwd(
        self,
        r: NDArray,
        y: NDArray,
        rstd: NDArray,
        x1: NDArray,
        x2: NDArray,
        w: NDArray,
        eps: float,
    ) -> None:
        r[...] = (x1 + x2).astype(FLOAT32).astype(self.x_dtype)
        self.rmsnorm_fwd(y, rstd, r, w, eps)


def run_checks(
    make_ops: Callable[[str], Ops], dtypes: Iterable[str], cases: Iterable[Case] = CASES
) -> Iterator[CheckResult]:
    """Runs every case in every dtype on make_ops(dtype); one result per output."""
    cases = tuple(cases)
    for dtype in dtypes:
        ops = make_ops(dtype)
        for case in cases:
            yield from run_case(case, ops)


def run_case(case: Case, ops: Ops) -> list[CheckResult]:
    """Runs one case on `ops`; one result per output."""
    x_dtype = X_DTYPES[ops.dtype]
    call = case.call(x_dtype)
    truth = _in_numpy(case.op, call, x_dtype, np.float64)
    float32 = _in_numpy(case.op, call, x_dtype, np.float32)
    actual, damage = _on_device(case.op, call, ops)

    results = []
    for name, tensor in call.tensors.items():
        if name in damage:
            errors = (math.inf, 0.0, math.inf, 0.0)
        elif tensor.role == "in" or isinstance(tensor.value, str):
            continue
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                rounded = float32[name].astype(tensor.dtype)
            if tensor.exact:
                errors = _exact(actual[name], rounded)
            else:
                extra = _extra(case, ops.dtype, tensor.dtype)
                errors = _compare(actual[name], rounded, truth[name], extra)
        worst, limit, rms, rms_limit = errors
        results.append(
            CheckResult(
                op=case.op,
                dtype=ops.dtype,
                shape=case.shape,
                output=name,
                worst_error=worst,
                limit=limit,
                rms=rms,
                rms_limit=rms_limit,
                bits=hashlib.sha256(actual[name].tobytes()).hexdigest(),
                note=damage.get(name, ""),
            )
        )
    return results


def table(results: Iterable[CheckResult]) -> Table:
    """The results as `gpu-gpt2 check` prints them."""
    columns = Table(box=None, header_style="bold")
    for title in ("op", "dtype", "shape", "output"):
        columns.add_column(title)
    for title in ("worst error", "limit"):
        columns.add_column(title, justify="right")
    columns.add_column("")
    for r in results:
        why = r.note or f"rms error {r.rms:.2e}, limit {r.rms_limit:.2e}"
        verdict = "[green]pass[/]" if r.passed else f"[bold red]FAIL[/] {why}"
        numbers = f"{r.worst_error:.1e}", f"{r.limit:.1e}"
        columns.add_row(r.op, r.dtype, r.shape, r.output, *numbers, verdict)
    return columns


def _in_numpy(
    op: str, call: Call, x_dtype: np.dtype[Any], dtype: npt.DTypeLike
) -> dict[str, NDArray]:
    arrays: dict[str, NDArray] = {}
    for name, tensor in call.tensors.items():
        if isinstance(tensor.value, str):
            arrays[name] = arrays[tensor.value]
        else:
            value = tensor.copy()
            arrays[name] = value if tensor.dtype in INTEGERS else value.astype(dtype)
    getattr(RoundingReference(x_dtype), op)(*arrays.values(), **call.scalars)
    return arrays


def _on_device(op: str, call: Call, ops: Ops) -> tuple[dict[str, NDArray], dict[str, str]]:
    """Returns each tensor as the device leaves it, and the damage it did: {tensor: how}."""
    device = ops.device
    before: dict[str, NDArray] = {}
    buffers: dict[str, Array] = {}
    arrays: dict[str, Array] = {}
    for name, tensor in call.tensors.items():
        if isinstance(tensor.value, str):
            arrays[name] = arrays[tensor.value]
            continue
        value = tensor.copy().astype(tensor.dtype)
        guarded = np.frombuffer(
            bytes([GUARD_BYTE]) * ((value.size + 2 * GUARD) * value.itemsize), value.dtype
        ).copy()
        guarded[GUARD:-GUARD] = value.reshape(-1)
        before[name] = guarded
        buffers[name] = device.empty(guarded.shape, value.dtype)
        device.upload(buffers[name], guarded)
        arrays[name] = buffers[name][GUARD:-GUARD].reshape(value.shape)
    getattr(ops, op)(*arrays.values(), **call.scalars)
    device.synchronize()

    actual: dict[str, NDArray] = {}
    damage: dict[str, str] = {}
    for name, old in before.items():
        new = device.download(buffers[name])
        for part, where in ((slice(None, GUARD), "before"), (slice(-GUARD, None), "after")):
            if new[part].tobytes() != old[part].tobytes():
                damage[name] = f"wrote {where} its memory"
        if call.tensors[name].role == "in" and new.tobytes() != old.tobytes():
            damage.setdefault(name, "changed an input")
        actual[name] = new[GUARD:-GUARD].reshape(arrays[name].shape)
    return actual, damage


def _exact(actual: NDArray, expected: NDArray) -> tuple[float, float, float, float]:
    """0 errors if equal to the sign of zero and with NaN where NaN is due, else the difference."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    same = np.where(
        np.isnan(expected),
        np.isnan(actual),
        (actual == expected) & (np.signbit(actual) == np.signbit(expected)),
    )
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.maximum(np.abs(actual - expected), np.finfo(float).tiny))
    return float(error.max()), 0.0, _rms(error), 0.0


def _extra(case: Case, dtype: str, output_dtype: np.dtype[Any]) -> float:
    """Returns the error that an op may add because of how GPUs compute it, relative to the output.

    Matmul: NumPy's BLAS sums K terms in blocks. A GPU sums one after the other (errors grow
    with the square root of K), and tensor cores truncate instead of rounding after every few
    (errors grow with K). Attention on tensor cores rounds p and ds to X before a matmul.
    """
    flash = case.op in ("attention_fwd", "attention_bwd")
    if flash and dtype != "fp32" and output_dtype == X_DTYPES[dtype]:
        return float(ml_dtypes.finfo(output_dtype).eps) / 2
    if case.op != "matmul":
        return 0.0
    K = case.sizes["K"]
    place = float(np.finfo(np.float32).eps) / 2
    return place * (K / 8 if dtype != "fp32" else 4 * math.sqrt(K))


def _compare(
    actual: NDArray, float32: NDArray, truth: NDArray, extra: float
) -> tuple[float, float, float, float]:
    """(worst error, its limit, rms error, its limit); `float32` in the output's dtype."""
    error = actual.astype(np.float64) - truth
    usual = float32.astype(np.float64) - truth
    float32_place = float(np.finfo(np.float32).eps)
    rounding = float(ml_dtypes.finfo(float32.dtype).eps) / 2

    def limit(usual_error: float, size: float) -> float:
        floor, ceiling = FLOOR * float32_place, rounding + CEILING * float32_place
        return min(MULTIPLE * usual_error + floor * size, ceiling * largest) + extra * size

    largest = float(np.abs(truth).max())
    return (
        float(np.abs(error).max()),
        limit(float(np.abs(usual).max()), largest),
        _rms(error),
        limit(_rms(usual), _rms(truth)),
    )


def _rms(error: NDArray) -> float:
    return math.sqrt(float(np.mean(np.square(error))))
