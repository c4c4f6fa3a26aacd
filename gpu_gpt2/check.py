"""Every op on one device, measured against NumPy in float64 on the same inputs.

The cases are data: an op's name, sizes, and a function that makes its arguments. One case runs four
times: on the device under test; as NumPy in float64, which counts as the truth; and as NumPy in
float32, rounded to the output's dtype, whose error says how much error this precision must make.
Limits follow from the third (docs/numerics.md):

    limit = MULTIPLE x the float32 error + FLOOR x e,  and at most  rounding + CEILING x e

with e the last place of float32 and rounding half the last place of the output's own dtype, both at
the largest output. A second limit of this form holds for the root mean square of the error, with e
at the root mean square of the output.
Outputs that no device may round differently are compared exactly. Overwritten outputs start as
NaN, all tensors lie between guard elements that must survive, and inputs must come back unchanged.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.table import Table

from gpu_gpt2.device.base import BFLOAT16, FLOAT32, INT32, Array
from gpu_gpt2.ops.interface import AdamWStep, Ops
from gpu_gpt2.ops.reference import ReferenceOps

NDArray = npt.NDArray[Any]

MULTIPLE: Final = 3.0
FLOOR: Final = 8.0
CEILING: Final = 40.0  # so that a float32 reference gone wrong cannot lift its own limit
GUARD: Final = 128  # elements before and after each tensor; keeps the tensor itself aligned
GUARD_BYTE: Final = 0xA5
DTYPES: Final = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int32": INT32}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One argument of an op.

    dtype "X" is the activations' dtype; `role` is "in" (read only), "=" (overwritten) or "+="
    (updated); `value` is already rounded to the dtype. `same_as` names the tensor whose memory
    this argument shares, for ops that may work in place.
    """

    dtype: str = "X"
    role: str = "in"
    value: NDArray | None = None
    exact: bool = False
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one op in the interface's order: tensors, then scalars."""

    tensors: dict[str, Tensor]
    scalars: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one set of sizes."""

    op: str
    sizes: dict[str, int]
    make: Callable[..., Call]

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())

    def __str__(self) -> str:
        return f"{self.op}[{self.shape}]"


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


class Maker:
    """Makes seeded tensors, rounded to what the device will hold."""

    def __init__(self, seed: int, x_dtype: np.dtype[Any]) -> None:
        self.rng = np.random.default_rng(seed)
        self.x_dtype = x_dtype

    def normal(
        self, *shape: int, dtype: str = "X", role: str = "in", scale: float = 1.0, mean: float = 0.0
    ) -> Tensor:
        return self.tensor(mean + scale * self.rng.standard_normal(shape), dtype, role)

    def out(self, *shape: int, dtype: str = "X", exact: bool = False) -> Tensor:
        return Tensor(dtype, "=", np.full(shape, np.nan), exact)

    def ints(self, values: NDArray) -> Tensor:
        return Tensor("int32", "in", values.astype(INT32))

    def tensor(self, value: NDArray, dtype: str = "X", role: str = "in") -> Tensor:
        return Tensor(dtype, role, value.astype(self.numpy_dtype(dtype)).astype(np.float64))

    def numpy_dtype(self, dtype: str) -> np.dtype[Any]:
        return self.x_dtype if dtype == "X" else np.dtype(DTYPES[dtype])


class RoundingReference(ReferenceOps):
    """ReferenceOps that stores the residual sum in X before its statistics are taken.

    That rounding is part of the op's definition, not an error of whoever computes it.
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
        w: NDArray,
        b: NDArray,
    ) -> None:
        r[...] = (x1 + x2).astype(FLOAT32).astype(self.x_dtype)
        self.layernorm_fwd(y, mean, rstd, r, w, b)


# --- the cases ---


def embedding_fwd(g: Maker, B: int, T: int, C: int, V: int) -> Call:
    return Call(
        {
            "x": g.out(B, T, C, exact=True),  # one addition, one rounding
            "tokens": g.ints(g.rng.integers(0, V, (B, T))),
            "wte": g.normal(V + 3, C),
            "wpe": g.normal(T + 2, C),
        }
    )


def embedding_bwd(g: Maker, B: int, T: int, C: int, V: int) -> Call:
    tokens = g.rng.integers(0, V, (B, T))
    return Call(
        {
            "dwte": g.normal(V + 3, C, dtype="float32", role="+="),
            "dwpe": g.normal(T + 2, C, dtype="float32", role="+="),
            "dx": g.normal(B, T, C),
            "tokens": g.ints(tokens),
            "order": g.ints(np.argsort(tokens.reshape(-1), kind="stable")),
        }
    )


def layernorm_fwd(g: Maker, N: int, C: int, offset: int) -> Call:
    return Call(
        {
            "y": g.out(N, C),
            "mean": g.out(N, dtype="float32"),
            "rstd": g.out(N, dtype="float32"),
            "x": g.normal(N, C, mean=offset),
            "w": g.normal(C),
            "b": g.normal(C),
        }
    )


def residual_layernorm_fwd(g: Maker, N: int, C: int) -> Call:
    return Call(
        {
            "r": g.out(N, C, exact=True),
            "y": g.out(N, C),
            "mean": g.out(N, dtype="float32"),
            "rstd": g.out(N, dtype="float32"),
            "x1": g.normal(N, C, mean=3.0),
            "x2": g.normal(N, C),
            "w": g.normal(C),
            "b": g.normal(C),
        }
    )


def layernorm_bwd(g: Maker, N: int, C: int) -> Call:
    x = g.normal(N, C, mean=3.0)
    mean, rstd = np.empty(N), np.empty(N)
    values = _values(x)
    ReferenceOps().layernorm_fwd(np.empty((N, C)), mean, rstd, values, np.ones(C), np.zeros(C))
    return Call(
        {
            "dx": g.normal(N, C, role="+="),
            "dw": g.normal(C, dtype="float32", role="+="),
            "db": g.normal(C, dtype="float32", role="+="),
            "dy": g.normal(N, C),
            "x": x,
            "w": g.normal(C),
            "mean": g.tensor(mean, "float32"),
            "rstd": g.tensor(rstd, "float32"),
        }
    )


def attention_fwd(g: Maker, B: int, T: int, H: int, D: int) -> Call:
    return Call(
        {
            "y": g.out(B, T, H, D),
            "lse": g.out(B, H, T, dtype="float32"),
            "qkv": g.normal(B, T, 3, H, D, scale=2.0),
        }
    )


def attention_bwd(g: Maker, B: int, T: int, H: int, D: int) -> Call:
    qkv = g.normal(B, T, 3, H, D, scale=2.0)
    y, lse = np.empty((B, T, H, D)), np.empty((B, H, T))
    ReferenceOps().attention_fwd(y, lse, _values(qkv))
    return Call(
        {
            "dqkv": g.out(B, T, 3, H, D),
            "delta": g.out(B, H, T, dtype="float32"),
            "dy": g.normal(B, T, H, D),
            "qkv": qkv,
            "y": g.tensor(y),
            "lse": g.tensor(lse, "float32"),
        }
    )


def softmax_fwd(g: Maker, N: int, V: int, offset: int, inplace: int) -> Call:
    """With a large offset, exponentials that are not taken around the maximum leave float32."""
    x = g.normal(N, V, role="+=" if inplace else "in", scale=5.0, mean=offset)
    if inplace:
        return Call({"y": x, "x": Tensor(same_as="y")})
    return Call({"y": g.out(N, V), "x": x})


def softmax_bwd(g: Maker, N: int, V: int, inplace: int) -> Call:
    p = np.exp(g.rng.standard_normal((N, V)))
    y = g.tensor(p / p.sum(axis=1, keepdims=True))
    if inplace:
        return Call({"dx": g.normal(N, V, role="+="), "dy": Tensor(same_as="dx"), "y": y})
    return Call({"dx": g.out(N, V), "dy": g.normal(N, V), "y": y})


def gelu_fwd(g: Maker, N: int) -> Call:
    return Call({"y": g.out(N), "x": g.normal(N, scale=3.0)})


def gelu_bwd(g: Maker, N: int, inplace: int) -> Call:
    x = g.normal(N, scale=3.0)
    if inplace:
        return Call({"dx": g.normal(N, role="+="), "dy": Tensor(same_as="dx"), "x": x})
    return Call({"dx": g.out(N), "dy": g.normal(N), "x": x})


def bias_fwd(g: Maker, N: int, O: int) -> Call:
    y = g.normal(N, O, role="+=")
    return Call({"y": Tensor("X", "+=", y.value, exact=True), "b": g.normal(O)})


def bias_bwd(g: Maker, N: int, O: int) -> Call:
    return Call({"db": g.normal(O, dtype="float32", role="+="), "dy": g.normal(N, O)})


def classifier_fwd(g: Maker, N: int, V: int, Vp: int) -> Call:
    tensors = _classifier_tensors(g, N, V, Vp, "in")
    return Call(tensors, (V,))


def classifier_fwd_bwd(g: Maker, N: int, V: int, Vp: int) -> Call:
    tensors = _classifier_tensors(g, N, V, Vp, "+=")
    return Call(tensors, (V, 1.0 / N))


def _classifier_tensors(g: Maker, N: int, V: int, Vp: int, role: str) -> dict[str, Tensor]:
    logits = _values(g.normal(N, Vp, scale=4.0))
    logits[:, V:] = np.nan  # padding that is read anywhere makes a result that is not a number
    targets = g.rng.integers(0, V, N)
    targets[-1] = V - 1
    return {
        "losses": g.normal(N, dtype="float32", role="+="),
        "logits": Tensor("X", role, logits),
        "targets": g.ints(targets),
    }


def squared_norm(g: Maker, n: int) -> Call:
    return Call({"out": g.out(1, dtype="float32"), "x": g.normal(n, dtype="float32")})


def adamw(g: Maker, n: int, decayed: int, clipped: int) -> Call:
    """The third update of weights whose moments are already under way."""
    master = g.normal(n, dtype="float32", role="+=", scale=0.02)
    grad = g.normal(n, dtype="float32")
    norm = float(np.linalg.norm(_values(grad)))
    tensors = {
        "master": master,
        "m": g.normal(n, dtype="float32", role="+=", scale=0.1),
        "v": g.tensor(g.rng.uniform(0.0, 0.1, n), "float32", "+="),
        "param": Tensor(same_as="master") if g.x_dtype == FLOAT32 else g.out(n),
        "grad": grad,
        "grad_sq": g.tensor(np.array([norm * norm]), "float32"),
    }
    hyper = AdamWStep(
        step=3,
        lr=1e-2,
        beta1=0.9,
        beta2=0.999,
        eps=1e-3,  # large enough to be missed
        weight_decay=0.1,
        max_grad_norm=norm * (0.5 if clipped else 2.0),
    )
    return Call(tensors, (decayed, hyper))


def cast_to_float32(g: Maker, n: int) -> Call:
    return Call({"y": g.out(n, dtype="float32", exact=True), "x": g.normal(n, dtype="bfloat16")})


def cast_to_bfloat16(g: Maker, n: int) -> Call:
    """Among ordinary numbers: ties, the largest, the smallest, infinities and NaNs.

    Of all NaNs, the one with every bit set is the one that rounding would carry into a zero.
    """
    x = _values(g.normal(n))
    special = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4028235e38, 1e-40, -0.0, np.inf, -np.inf]
    x[: len(special)] = special[:n]
    x[n // 2 :: 97] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    return Call({"y": g.out(n, dtype="bfloat16", exact=True), "x": g.tensor(x, "float32")})


def cast_copy(g: Maker, n: int) -> Call:
    return Call({"y": g.out(n, exact=True), "x": g.normal(n)})


def matmul(g: Maker, M: int, K: int, N: int, accumulate: int) -> Call:
    out = g.normal(M, N, dtype="float32", role="+=") if accumulate else g.out(M, N)
    return Call({"out": out, "a": g.normal(M, K), "b": g.normal(K, N)}, (bool(accumulate),))


def _cases(make: Callable[..., Call], names: str, *sizes: tuple[int, ...]) -> list[Case]:
    op = "cast" if make.__name__.startswith("cast") else make.__name__
    return [Case(op, dict(zip(names.split(), size, strict=True)), make) for size in sizes]


EMBEDDING_SIZES: Final = ((1, 1, 1, 1), (2, 7, 33, 3), (3, 31, 129, 7), (1, 129, 257, 1000))
ROWS: Final = ((1, 1), (7, 31), (31, 33), (33, 127), (9, 129), (129, 65), (300, 7))
SOFTMAX_SIZES: Final = ((1, 1, 0), (3, 31, 1), (7, 33, 0), (2, 257, 1), (5, 1025, 0), (1, 4099, 1))
SOFTMAX_FWD_SIZES: Final = (
    (1, 1, 0, 0),
    (3, 31, -300, 1),
    (7, 33, 300, 0),
    (2, 257, 0, 1),
    (5, 1025, -300, 0),
    (1, 4099, 300, 1),
)
VOCABULARIES: Final = ((1, 1, 1), (7, 31, 32), (33, 127, 128), (5, 257, 384), (3, 1030, 1152))
FULL_VOCABULARIES: Final = ((2, 50257, 50304), (1, 50259, 50304))
ATTENTION_SIZES: Final = (
    (1, 1, 1, 1),
    (2, 7, 3, 1),
    (2, 31, 2, 3),
    (1, 129, 1, 16),
    (1, 150, 2, 33),
    (2, 33, 2, 64),
    (1, 65, 1, 80),
    (1, 40, 2, 128),
    (1, 33, 1, 256),
)
LENGTHS: Final = ((1,), (31,), (257,), (1000,))

CASES: Final[tuple[Case, ...]] = (
    *_cases(embedding_fwd, "B T C V", *EMBEDDING_SIZES),
    *_cases(embedding_bwd, "B T C V", *EMBEDDING_SIZES),
    *_cases(layernorm_fwd, "N C offset", *((*size, 3) for size in ROWS), (33, 127, 30)),
    *_cases(residual_layernorm_fwd, "N C", *ROWS),
    *_cases(layernorm_bwd, "N C", *ROWS),
    *_cases(attention_fwd, "B T H D", *ATTENTION_SIZES),
    *_cases(attention_bwd, "B T H D", *ATTENTION_SIZES),
    *_cases(softmax_fwd, "N V offset inplace", *SOFTMAX_FWD_SIZES),
    *_cases(softmax_bwd, "N V inplace", *SOFTMAX_SIZES),
    *_cases(gelu_fwd, "N", *LENGTHS),
    *_cases(gelu_bwd, "N inplace", (1, 0), (31, 1), (257, 0), (1000, 1)),
    *_cases(bias_fwd, "N O", *ROWS),
    *_cases(bias_bwd, "N O", *ROWS, (5000, 3)),
    *_cases(classifier_fwd, "N V Vp", *VOCABULARIES, *FULL_VOCABULARIES),
    *_cases(classifier_fwd_bwd, "N V Vp", *VOCABULARIES, *FULL_VOCABULARIES),
    *_cases(squared_norm, "n", *LENGTHS, (300_000,)),
    *_cases(adamw, "n decayed clipped", (1, 1, 0), (31, 0, 1), (257, 100, 1), (1000, 1000, 0)),
    *_cases(cast_to_float32, "n", *LENGTHS),
    *_cases(cast_to_bfloat16, "n", *LENGTHS),
    *_cases(cast_copy, "n", (31,)),
    *_cases(matmul, "M K N accumulate", (1, 1, 1, 0), (7, 31, 33, 0), (33, 129, 127, 1)),
)

# Real sizes, too slow for the emulator: for GPUs.
LARGE_CASES: Final[tuple[Case, ...]] = (
    *_cases(embedding_fwd, "B T C V", (4, 1024, 768, 50257)),
    *_cases(embedding_bwd, "B T C V", (4, 1024, 768, 50257), (4, 1024, 768, 10)),
    *_cases(layernorm_fwd, "N C offset", (4096, 768, 3), (1000, 1601, 30)),
    *_cases(residual_layernorm_fwd, "N C", (4096, 768), (1000, 1601)),
    *_cases(layernorm_bwd, "N C", (4096, 768), (1000, 1601)),
    *_cases(attention_fwd, "B T H D", (2, 1024, 3, 64), (1, 1000, 2, 80), (1, 777, 2, 128)),
    *_cases(attention_bwd, "B T H D", (2, 1024, 3, 64), (1, 1000, 2, 80), (1, 777, 2, 128)),
    *_cases(softmax_fwd, "N V offset inplace", (64, 50257, 0, 0)),
    *_cases(softmax_bwd, "N V inplace", (64, 50257, 1)),
    *_cases(gelu_fwd, "N", (3_000_001,)),
    *_cases(gelu_bwd, "N inplace", (3_000_001, 1)),
    *_cases(bias_fwd, "N O", (4096, 3072)),
    *_cases(bias_bwd, "N O", (4096, 3072), (20_001, 777)),
    *_cases(classifier_fwd, "N V Vp", (64, 50257, 50304)),
    *_cases(classifier_fwd_bwd, "N V Vp", (64, 50257, 50304)),
    *_cases(squared_norm, "n", (5_000_001,)),
    *_cases(adamw, "n decayed clipped", (3_000_001, 2_000_000, 1)),
    *_cases(cast_to_bfloat16, "n", (3_000_001,)),
    *_cases(matmul, "M K N accumulate", (512, 768, 2304, 0), (768, 4096, 768, 1)),
)


def widest_column_sum(cases: Iterable[Case]) -> int:
    """What KernelOps must be made with to run these cases."""
    return max(max(2 * case.sizes.get("C", 1), case.sizes.get("O", 1)) for case in cases)


# --- running them ---


def run_checks(
    make_ops: Callable[[str], Ops], dtypes: Iterable[str], cases: Iterable[Case] = CASES
) -> Iterator[CheckResult]:
    """Runs every case in every dtype ("fp32", "bf16") on make_ops(dtype), one result per output."""
    cases = tuple(cases)
    for dtype in dtypes:
        ops = make_ops(dtype)
        for case in cases:
            yield from run_case(case, ops, dtype)


def run_case(case: Case, ops: Ops, dtype: str) -> list[CheckResult]:
    """Runs one case on `ops`, whose X must be that of `dtype`."""
    x_dtype = BFLOAT16 if dtype == "bf16" else FLOAT32
    maker = Maker(zlib.crc32(str(case).encode()), x_dtype)
    call = case.make(maker, **case.sizes)
    truth = _in_numpy(case.op, call, x_dtype, np.float64)
    float32 = _in_numpy(case.op, call, x_dtype, np.float32)
    actual, damage = _on_device(case.op, call, maker, ops)

    results = []
    for name, tensor in call.tensors.items():
        if name in damage:
            errors = (math.inf, 0.0, math.inf, 0.0)
        elif tensor.role == "in":
            continue
        else:
            rounded = float32[name].astype(maker.numpy_dtype(tensor.dtype))
            if tensor.exact:
                errors = _exact(actual[name], rounded)
            else:
                errors = _compare(actual[name], rounded, truth[name], _chain(case, dtype))
        worst, limit, rms, rms_limit = errors
        results.append(
            CheckResult(
                op=case.op,
                dtype=dtype,
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


def _values(tensor: Tensor) -> NDArray:
    """A copy of a tensor's starting value."""
    if tensor.value is None:
        raise ValueError("a tensor that shares another's memory has no value of its own")
    return np.array(tensor.value)


def _invoke(op: str, ops: Ops, arrays: dict[str, Array], scalars: tuple[Any, ...]) -> None:
    if op == "matmul":
        ops.matmul(*arrays.values(), accumulate=scalars[0])
    else:
        getattr(ops, op)(*arrays.values(), *scalars)


def _in_numpy(
    op: str, call: Call, x_dtype: np.dtype[Any], dtype: npt.DTypeLike
) -> dict[str, NDArray]:
    arrays: dict[str, NDArray] = {}
    for name, tensor in call.tensors.items():
        if tensor.same_as:
            arrays[name] = arrays[tensor.same_as]
        else:
            value = _values(tensor)
            arrays[name] = value if tensor.dtype == "int32" else value.astype(dtype)
    _invoke(op, RoundingReference(x_dtype), arrays, call.scalars)
    return arrays


def _on_device(
    op: str, call: Call, maker: Maker, ops: Ops
) -> tuple[dict[str, NDArray], dict[str, str]]:
    """What the device made of each tensor, and what it damaged: {tensor: how}."""
    device = ops.device
    before: dict[str, NDArray] = {}
    buffers: dict[str, Array] = {}
    arrays: dict[str, Array] = {}
    for name, tensor in call.tensors.items():
        if tensor.same_as:
            arrays[name] = arrays[tensor.same_as]
            continue
        value = _values(tensor).astype(maker.numpy_dtype(tensor.dtype))
        guarded = np.frombuffer(
            bytes([GUARD_BYTE]) * ((value.size + 2 * GUARD) * value.itemsize), value.dtype
        ).copy()
        guarded[GUARD:-GUARD] = value.reshape(-1)
        before[name] = guarded
        buffers[name] = device.empty(guarded.shape, value.dtype)
        device.upload(buffers[name], guarded)
        arrays[name] = buffers[name][GUARD:-GUARD].reshape(value.shape)
    _invoke(op, ops, arrays, call.scalars)
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


def _chain(case: Case, dtype: str) -> float:
    """What the long chains of additions in a GPU's matrix products may cost, of the output's size.

    NumPy's BLAS sums K products in blocks. A GPU sums one after the other (errors grow with the
    square root of K), and tensor cores cut off, not round, after every few (errors grow with K).
    """
    if case.op != "matmul":
        return 0.0
    K = case.sizes["K"]
    place = float(np.finfo(np.float32).eps) / 2
    return place * (K / 8 if dtype == "bf16" else 4 * math.sqrt(K))


def _compare(
    actual: NDArray, float32: NDArray, truth: NDArray, chain: float
) -> tuple[float, float, float, float]:
    """(worst error, its limit, rms error, its limit); `float32` in the output's dtype."""
    error = actual.astype(np.float64) - truth
    usual = float32.astype(np.float64) - truth
    float32_place = float(np.finfo(np.float32).eps)
    rounding = float(ml_dtypes.finfo(float32.dtype).eps) / 2

    def limit(usual_error: float, size: float) -> float:
        floor, ceiling = FLOOR * float32_place, rounding + CEILING * float32_place
        return min(MULTIPLE * usual_error + floor * size, ceiling * largest) + chain * size

    largest = float(np.abs(truth).max())
    return (
        float(np.abs(error).max()),
        limit(float(np.abs(usual).max()), largest),
        _rms(error),
        limit(_rms(usual), _rms(truth)),
    )


def _rms(error: NDArray) -> float:
    return math.sqrt(float(np.mean(np.square(error))))
