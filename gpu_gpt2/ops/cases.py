"""What is checked: every op at sizes that leave tails everywhere, and at real sizes for GPUs.

A case is data: an op's name, sizes, and a function that makes its arguments from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, INT32
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import AdamWSettings

NDArray = npt.NDArray[Any]

DTYPES: Final = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "int32": INT32}


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

    def values(self) -> NDArray:
        """A copy of what the tensor starts with, in float64 or int32."""
        if self.value is None:
            raise ValueError("a tensor that shares another's memory has no value of its own")
        return np.array(self.value)


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
            "r": g.out(N, C),
            "y": g.out(N, C),
            "mean": g.out(N, dtype="float32"),
            "rstd": g.out(N, dtype="float32"),
            "x1": g.normal(N, C, mean=3.0),
            "x2": g.normal(N, C),
            "bias": g.normal(C),
            "w": g.normal(C),
            "b": g.normal(C),
        }
    )


def layernorm_bwd(g: Maker, N: int, C: int) -> Call:
    x = g.normal(N, C, mean=3.0)
    mean, rstd = np.empty(N), np.empty(N)
    values = x.values()
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
    ReferenceOps().attention_fwd(y, lse, qkv.values())
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


def gelu_fwd(g: Maker, N: int, O: int) -> Call:
    return Call({"y": g.out(N, O), "x": g.normal(N, O, scale=3.0), "b": g.normal(O)})


def gelu_bwd(g: Maker, N: int, O: int, inplace: int) -> Call:
    inputs = {"x": g.normal(N, O, scale=3.0), "b": g.normal(O)}
    if inplace:
        return Call({"dx": g.normal(N, O, role="+="), "dy": Tensor(same_as="dx"), **inputs})
    return Call({"dx": g.out(N, O), "dy": g.normal(N, O), **inputs})


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
    tensors["loss_scale"] = g.tensor(np.array([2.0]), "float32")
    return Call(tensors, (V, 1.0 / N))


def _classifier_tensors(g: Maker, N: int, V: int, Vp: int, role: str) -> dict[str, Tensor]:
    logits = g.normal(N, Vp, scale=4.0).values()
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


def prepare_update(g: Maker, N: int, clipped: int) -> Call:
    """The fourth update, with the gradient in a scale of 4."""
    norm = 3.0
    tensors = {
        "factors": g.out(5, dtype="float32"),
        "report": g.out(3, dtype="float32"),
        "loss_scale": g.tensor(np.array([4.0]), "float32", "+="),
        "counts": g.tensor(np.array([3.0, 2.0]), "float32", "+="),
        "losses": g.normal(N, dtype="float32", mean=3.0),
        "grad_sq": g.tensor(np.array([(4.0 * norm) ** 2]), "float32"),
        "lr": g.tensor(np.array([0.5]), "float32"),
    }
    settings = _adamw_settings(norm * (0.5 if clipped else 2.0))
    return Call(tensors, (1.0 / N, settings))


def adamw(g: Maker, n: int, decayed: int) -> Call:
    """The third update of weights whose moments are already under way."""
    master = g.normal(n, dtype="float32", role="+=", scale=0.02)
    tensors = {
        "master": master,
        "m": g.normal(n, dtype="float32", role="+=", scale=0.1),
        "v": g.tensor(g.rng.uniform(0.0, 0.1, n), "float32", "+="),
        "param": Tensor(same_as="master") if g.x_dtype == FLOAT32 else g.out(n),
        "grad": g.normal(n, dtype="float32"),
        "factors": g.tensor(np.array([1.0, 0.3, 1e-2, 1 - 0.9**3, 1 - 0.999**3]), "float32"),
    }
    return Call(tensors, (decayed, _adamw_settings(1.0)))


def _adamw_settings(max_grad_norm: float) -> AdamWSettings:
    return AdamWSettings(
        beta1=0.9,
        beta2=0.999,
        eps=1e-3,  # large enough to be missed
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        max_loss_scale=8.0,
    )


def cast_to_float32(g: Maker, n: int) -> Call:
    return Call({"y": g.out(n, dtype="float32", exact=True), "x": g.normal(n, dtype="bfloat16")})


def cast_to_bfloat16(g: Maker, n: int) -> Call:
    """Among ordinary numbers: ties, the largest, the smallest, infinities and NaNs.

    Of all NaNs, the one with every bit set is the one that rounding would carry into a zero.
    """
    x = g.normal(n).values()
    special = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4028235e38, 1e-40, -0.0, np.inf, -np.inf]
    x[: len(special)] = special[:n]
    x[n // 2 :: 97] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    return Call({"y": g.out(n, dtype="bfloat16", exact=True), "x": g.tensor(x, "float32")})


def cast_every_float16(g: Maker, n: int) -> Call:
    """All that is not a NaN, if n = 2 x 0x7c01: zeros, infinities, all between."""
    magnitudes = np.arange(n // 2, dtype=np.uint16)
    x = np.concatenate([magnitudes, magnitudes | 0x8000]).view(np.float16).astype(np.float64)
    return Call({"y": g.out(n, dtype="float32", exact=True), "x": Tensor("float16", "in", x)})


def cast_to_float16(g: Maker, n: int) -> Call:
    """Among numbers of all sizes: ties, the last that stay finite, the first that vanish."""
    x = g.normal(n).values() * 2.0 ** g.rng.integers(-30, 16, n)
    special = [1 + 2**-11, 1 + 3 * 2**-11, 65519.99, 65520, -1e9, 2**-14 - 2**-26, 2**-25,
               3 * 2**-25, -(2**-25 + 2**-40), 1e-9, -0.0, np.inf, -np.inf]  # fmt: skip
    x[: len(special)] = special[:n]
    x[n // 2 :: 97] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    return Call({"y": g.out(n, dtype="float16", exact=True), "x": g.tensor(x, "float32")})


def cast_copy(g: Maker, n: int) -> Call:
    return Call({"y": g.out(n, exact=True), "x": g.normal(n)})


def matmul(g: Maker, M: int, K: int, N: int, accumulate: int) -> Call:
    out = g.normal(M, N, dtype="float32", role="+=") if accumulate else g.out(M, N)
    return Call({"out": out, "a": g.normal(M, K), "b": g.normal(K, N)}, (bool(accumulate),))


def _cases(make: Callable[..., Call], names: str, *sizes: tuple[int, ...]) -> list[Case]:
    op = "cast" if make.__name__.startswith("cast") else make.__name__
    return [Case(op, dict(zip(names.split(), size, strict=True)), make) for size in sizes]


EMBEDDING_SIZES: Final = (
    *((1, 1, 1, 1), (2, 7, 33, 3), (3, 31, 129, 7), (1, 129, 257, 1000)),
    *((2, 33, 40, 5), (1, 50, 2304, 9)),
)
ROWS: Final = (
    *((1, 1), (7, 31), (31, 33), (33, 127), (9, 129), (129, 65), (300, 7)),
    *((33, 128), (70, 768), (9, 1600), (1, 8)),  # whole pieces of 16 bytes
)
SOFTMAX_SIZES: Final = (
    *((1, 1, 0), (3, 31, 1), (7, 33, 0), (2, 257, 1), (5, 1025, 0), (1, 4099, 1)),
    *((7, 40, 1), (2, 9000, 0)),
)
SOFTMAX_FWD_SIZES: Final = (
    (1, 1, 0, 0),
    (3, 31, -300, 1),
    (7, 33, 300, 0),
    (2, 257, 0, 1),
    (2, 264, 300, 0),
    (2, 9000, 0, 1),
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
    (2, 129, 2, 64),
    (1, 200, 1, 80),
    (1, 130, 1, 96),
    (1, 70, 2, 128),
)
LONG_ROW: Final = (2, 8200)  # several pieces of 16 bytes for each thread of a block
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
    *_cases(gelu_fwd, "N O", *ROWS, LONG_ROW),
    *_cases(gelu_bwd, "N O inplace", *((*size, i % 2) for i, size in enumerate((*ROWS, LONG_ROW)))),
    *_cases(bias_fwd, "N O", *ROWS, LONG_ROW),
    *_cases(bias_bwd, "N O", *ROWS, (5000, 3)),
    *_cases(classifier_fwd, "N V Vp", *VOCABULARIES, *FULL_VOCABULARIES),
    *_cases(classifier_fwd_bwd, "N V Vp", *VOCABULARIES, *FULL_VOCABULARIES),
    *_cases(squared_norm, "n", *LENGTHS, (300_000,)),
    *_cases(prepare_update, "N clipped", (1, 0), (31, 1), (257, 0), (3000, 1)),
    *_cases(adamw, "n decayed", (1, 1), (31, 0), (258, 101), (1000, 1000), (1027, 1025)),
    *_cases(cast_to_float32, "n", *LENGTHS),
    *_cases(cast_to_bfloat16, "n", *LENGTHS),
    *_cases(cast_every_float16, "n", (2 * 0x7C01,)),
    *_cases(cast_to_float16, "n", *LENGTHS, (20_011,)),
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
    *_cases(gelu_fwd, "N O", (4096, 3072)),
    *_cases(gelu_bwd, "N O inplace", (4096, 3072, 1)),
    *_cases(bias_fwd, "N O", (4096, 3072)),
    *_cases(bias_bwd, "N O", (4096, 3072), (20_001, 777)),
    *_cases(classifier_fwd, "N V Vp", (64, 50257, 50304)),
    *_cases(classifier_fwd_bwd, "N V Vp", (64, 50257, 50304)),
    *_cases(squared_norm, "n", (5_000_001,)),
    *_cases(prepare_update, "N clipped", (65_536, 1)),
    *_cases(adamw, "n decayed", (3_000_001, 2_000_001)),
    *_cases(cast_to_bfloat16, "n", (3_000_001,)),
    *_cases(cast_to_float16, "n", (3_000_001,)),
    *_cases(matmul, "M K N accumulate", (512, 768, 2304, 0), (768, 4096, 768, 1)),
)
