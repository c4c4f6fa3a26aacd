"""The calls that are checked: every op at sizes that leave tails everywhere, and at GPU sizes.

A case is an op and sizes. The row of the op in `table` gives its tensors: an `=` output starts as
NaN, everything else is standard normal. A function named after the op gives the values that need
a meaning or another scale, and scalars.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import LAYER_NORM_EPSILON
from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, INT8, INT32
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import FIXED_DTYPES, TABLE, WINDOW, AdamWSettings, Factors, OpTensor

NDArray = npt.NDArray[Any]

INTEGERS: Final = (INT32, INT8)  # dtypes of tensors that no device computes in float64

# Rows beyond T of a tensor (>= T, ...). An op may read them only where `starts` moves positions.
SPARE_ROWS: Final = 2


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a call.

    `dtype` is its dtype on the device and `role` its role in the table: "=", "+=" or "in". `value`
    is float64 or integers, already rounded to `dtype`, or the name of an earlier tensor whose
    memory this one shares. An `exact` output may not be rounded differently by any device.
    """

    dtype: np.dtype[Any]
    role: str
    value: NDArray | str
    exact: bool

    def copy(self) -> NDArray:
        """A copy of the value that the tensor starts with."""
        assert not isinstance(self.value, str)
        return np.array(self.value)


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one op: tensors in the table's order, then scalars by name."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one set of sizes; `make(Maker, **sizes)` makes its call."""

    op: str
    sizes: dict[str, int]
    make: Callable[..., Call]

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())

    def __str__(self) -> str:
        return f"{self.op}[{self.shape}]"

    def call(self, x_dtype: np.dtype[Any]) -> Call:
        """The call with X = x_dtype, made with the same values every time."""
        return self.make(Maker(self, x_dtype), **self.sizes)


class Maker:
    """Makes the call of a case from random numbers, seeded by the case's name.

    Each draw moves the generator on: values given to `call` are drawn first, in the order in which
    they are written, then all others in the order of the row.
    """

    def __init__(self, case: Case, x_dtype: np.dtype[Any]) -> None:
        self.case = case
        self.x_dtype = x_dtype
        self.rng = np.random.default_rng(zlib.crc32(str(case).encode()))

    def call(
        self,
        *,
        exact: bool = False,
        dtypes: dict[str, np.dtype[Any]] | None = None,
        scalars: dict[str, Any] | None = None,
        **values: NDArray | str,
    ) -> Call:
        """The call with these values, and all other tensors as the row says.

        A value is rounded to its tensor's dtype; a name instead of a value means the memory of
        that tensor. `dtypes` are those of tensors of dtype "any". `exact` holds for all outputs.
        """
        tensors = {}
        for tensor in TABLE[self.case.op]:
            dtype = (dtypes or {}).get(tensor.name) or self._dtype(tensor)
            value = values.pop(tensor.name) if tensor.name in values else self._value(tensor)
            if not isinstance(value, str):
                value = rounded(value, dtype)
            tensors[tensor.name] = Tensor(dtype, tensor.role, value, exact)
        assert not values, f"{self.case}: no tensors {', '.join(values)}"
        return Call(tensors, scalars or {})

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> NDArray:
        """Random numbers as float64, not rounded."""
        return mean + scale * self.rng.standard_normal(shape)

    def normal_x(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> NDArray:
        """Random numbers rounded to X, for values from which others are computed."""
        return rounded(self.normal(*shape, scale=scale, mean=mean), self.x_dtype)

    def _dtype(self, tensor: OpTensor) -> np.dtype[Any]:
        return FIXED_DTYPES.get(tensor.dtype) or self.x_dtype

    def _value(self, tensor: OpTensor) -> NDArray:
        meant = self._dtype(tensor) in INTEGERS
        assert not meant, f"{self.case}: {tensor.name} needs values with a meaning"
        shape = tuple(map(self._size, tensor.shape))
        return np.full(shape, np.nan) if tensor.role == "=" else self.normal(*shape)

    def _size(self, item: str) -> int:
        """The size of one item of a shape: "3", "C", "B * T" or ">= T"."""
        if item.isdigit():
            return int(item)
        spare = SPARE_ROWS if item.startswith(">= ") else 0
        letters = item.removeprefix(">= ").split(" * ")
        return math.prod(self.case.sizes[letter] for letter in letters) + spare


def rounded(value: NDArray, dtype: np.dtype[Any]) -> NDArray:
    """`value` rounded to `dtype`, as float64 or as the integers they are."""
    return value.astype(dtype).astype(dtype if dtype in INTEGERS else np.float64)


def derived(g: Maker, **sizes: int) -> Call:
    """The call of an op all of whose values are as the row says."""
    return g.call()


def embedding_fwd(g: Maker, B: int, T: int, C: int, V: int) -> Call:
    tokens, starts = g.rng.integers(0, V, (B, T)), _starts(g, B)
    wte = g.normal(V + 3, C)
    return g.call(tokens=tokens, starts=starts, wte=wte, exact=True)  # one addition, one rounding


def _starts(g: Maker, B: int) -> NDArray:
    """First positions of B sequences; the last sequence ends with the last of the SPARE_ROWS."""
    starts = g.rng.integers(0, SPARE_ROWS + 1, B)
    starts[-1] = SPARE_ROWS
    return starts


def embedding_bwd(g: Maker, B: int, T: int, C: int, V: int) -> Call:
    tokens = g.rng.integers(0, V, (B, T))
    order = np.argsort(tokens.reshape(-1), kind="stable")
    return g.call(tokens=tokens, order=order, dwte=g.normal(V + 3, C))


def token_embedding_fwd(g: Maker, B: int, T: int, C: int, V: int) -> Call:
    tokens = g.rng.integers(0, V, (B, T))
    return g.call(tokens=tokens, wte=g.normal(V + 3, C), exact=True)  # a copy


def token_embedding_bwd(g: Maker, B: int, T: int, C: int, V: int) -> Call:
    return embedding_bwd(g, B, T, C, V)


def layernorm_fwd(g: Maker, N: int, C: int, offset: int) -> Call:
    return g.call(x=g.normal(N, C, mean=offset), scalars={"eps": LAYER_NORM_EPSILON})


def residual_layernorm_fwd(g: Maker, N: int, C: int) -> Call:
    return g.call(x1=g.normal(N, C, mean=3.0), scalars={"eps": LAYER_NORM_EPSILON})


def layernorm_bwd(g: Maker, N: int, C: int) -> Call:
    x = g.normal_x(N, C, mean=3.0)
    mean, rstd = np.empty(N), np.empty(N)
    y, w, b = np.empty((N, C)), np.ones(C), np.zeros(C)
    ReferenceOps().layernorm_fwd(y, mean, rstd, x, w, b, LAYER_NORM_EPSILON)
    return g.call(x=x, mean=mean, rstd=rstd)


def rmsnorm_fwd(g: Maker, N: int, C: int) -> Call:
    return g.call(x=g.normal(N, C, mean=1.0), scalars={"eps": LAYER_NORM_EPSILON})


def residual_rmsnorm_fwd(g: Maker, N: int, C: int) -> Call:
    return g.call(x1=g.normal(N, C, mean=1.0), scalars={"eps": LAYER_NORM_EPSILON})


def rmsnorm_bwd(g: Maker, N: int, C: int) -> Call:
    x = g.normal_x(N, C, mean=1.0)
    y, rstd, w = np.empty((N, C)), np.empty(N), np.ones(C)
    ReferenceOps().rmsnorm_fwd(y, rstd, x, w, LAYER_NORM_EPSILON)
    return g.call(x=x, rstd=rstd)


def rope_fwd(g: Maker, B: int, T: int, R: int, D: int, G: int) -> Call:
    """Angles of every size, each as the pair of its cosine and its sine."""
    angle = g.rng.uniform(-math.pi, math.pi, (T + SPARE_ROWS, D // 2))
    angles = np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(-1, D)
    return g.call(starts=_starts(g, B), angles=angles, scalars={"kv_heads": G})


def rope_bwd(g: Maker, B: int, T: int, R: int, D: int, G: int) -> Call:
    return rope_fwd(g, B, T, R, D, G)


def attention_fwd(g: Maker, B: int, T: int, H: int, R: int, D: int) -> Call:
    return g.call(qkv=g.normal(B, T, R, D, scale=2.0))


def attention_bwd(g: Maker, B: int, T: int, H: int, R: int, D: int) -> Call:
    qkv = g.normal_x(B, T, R, D, scale=2.0)
    y, lse = np.empty((B, T, H, D)), np.empty((B, H, T))
    ReferenceOps().attention_fwd(y, lse, qkv)
    return g.call(qkv=qkv, y=y, lse=lse)


def kv_append(g: Maker, B: int, T: int, R: int, G: int, S: int, D: int) -> Call:
    """The last sequence fills the cache, and has one position too many where T > 1."""
    starts = g.rng.integers(0, S, B)
    starts[-1] = S - max(1, T - 1)
    return g.call(starts=starts, exact=True)


def attention_decode(g: Maker, B: int, H: int, R: int, G: int, S: int, D: int) -> Call:
    """Sequences at positions of their own, the last at the end of the cache, a third beyond it.

    The cache is NaN behind each position, and so are the keys and values of qkv: nobody may read
    them.
    """
    starts = g.rng.integers(0, S, B)
    starts[2:] = S + 5
    starts[-1] = S - 1
    qkv, k, v = g.normal(B, 1, R, D, scale=2.0), g.normal(B, G, S, D), g.normal(B, G, S, D)
    qkv[:, :, H:] = np.nan
    for b, start in enumerate(starts):
        k[b, :, start + 1 :] = v[b, :, start + 1 :] = np.nan
    return g.call(qkv=qkv, k=k, v=v, starts=starts)


def softmax_fwd(g: Maker, N: int, V: int, offset: int, inplace: int) -> Call:
    """Scores with an offset, at which exp(x) overflows unless the maximum is subtracted first."""
    x = g.normal(N, V, scale=5.0, mean=offset)
    return g.call(y=x, x="y") if inplace else g.call(x=x)


def softmax_bwd(g: Maker, N: int, V: int, inplace: int) -> Call:
    p = np.exp(g.normal(N, V))
    y = p / p.sum(axis=1, keepdims=True)
    return g.call(y=y, dx=g.normal(N, V), dy="dx") if inplace else g.call(y=y)


def gelu_fwd(g: Maker, N: int, O: int) -> Call:
    return g.call(x=g.normal(N, O, scale=3.0))


def gelu_bwd(g: Maker, N: int, O: int, inplace: int) -> Call:
    x, b = g.normal(N, O, scale=3.0), g.normal(O)
    return g.call(x=x, b=b, dx=g.normal(N, O), dy="dx") if inplace else g.call(x=x, b=b)


def swiglu_fwd(g: Maker, N: int, F: int) -> Call:
    return g.call(u=g.normal(N, 2, F, scale=3.0))


def swiglu_bwd(g: Maker, N: int, F: int) -> Call:
    return g.call(u=g.normal(N, 2, F, scale=3.0))


def bias_fwd(g: Maker, N: int, O: int) -> Call:
    return g.call(exact=True)


def classifier_fwd(g: Maker, N: int, V: int, Vp: int) -> Call:
    logits, targets = _classifier_values(g, N, V, Vp)
    return g.call(logits=logits, targets=targets, scalars={"vocab_size": V})


def classifier_fwd_bwd(g: Maker, N: int, V: int, Vp: int) -> Call:
    logits, targets = _classifier_values(g, N, V, Vp)
    scalars = {"vocab_size": V, "dloss": 1.0 / N}
    return g.call(logits=logits, targets=targets, loss_scale=np.array([2.0]), scalars=scalars)


def _classifier_values(g: Maker, N: int, V: int, Vp: int) -> tuple[NDArray, NDArray]:
    logits = g.normal(N, Vp, scale=4.0)
    logits[:, V:] = np.nan  # a kernel that reads padding makes a NaN of its result
    targets = g.rng.integers(0, V, N)
    targets[-1] = V - 1
    return logits, targets


def sample(g: Maker, B: int, V: int, Vp: int, temperature: int, top_k: int, top_p: int) -> Call:
    """`temperature` in tenths and `top_p` in per cent; logits with many ties."""
    logits = np.round(g.normal(B, Vp, scale=4.0) * 4) / 4
    logits[:, V:] = np.nan  # a kernel that reads padding draws -1
    return g.call(
        tokens=np.full(B, NO_TOKEN),
        starts=g.rng.integers(-1, 2000, B),
        logits=logits,
        key=g.rng.integers(-(2**31), 2**31, 2),
        scalars={
            "vocab_size": V,
            "temperature": temperature / 10,
            "top_k": top_k,
            "top_p": top_p / 100,
        },
        exact=True,
    )


def quantize_rows(g: Maker, N: int, I: int, J: int) -> Call:
    """The first group is zero, and the last holds ties: its scale is 1 if its size allows."""
    x = g.normal(N, I).reshape(-1, I // J)
    x[-1] = g.rng.integers(-127, 127, I // J) + 0.5
    x[-1, -1] = -127.0
    x[0] = 0.0
    return g.call(q=np.full((N, I), NOT_WRITTEN), x=x.reshape(N, I), exact=True)


def matmul_int8(g: Maker, N: int, O: int, I: int, J: int) -> Call:
    return g.call(
        x=g.rng.integers(-127, 128, (N, I)),
        x_scales=g.rng.uniform(0.01, 0.03, (N, J)),
        w=g.rng.integers(-127, 128, (O, I)),
        w_scales=g.rng.uniform(0.001, 0.003, (O, J)),
    )


def prepare_update(g: Maker, N: int, clipped: int, max_zscore: int) -> Call:
    """The fourth update, of a gradient that carries a loss scale of 4.

    The windows are full, and the z-scores are about 3 and 4.
    """
    norm = 3.0
    settings = _adamw_settings(norm * (0.5 if clipped else 2.0), max_zscore)
    return g.call(
        loss_scale=np.array([4.0]),
        counts=np.array([3.0, 2.0, 0.0]),
        windows=g.normal(2, WINDOW, scale=0.3) + np.array([[2.0], [1.8]]),
        losses=g.normal(N, scale=0.1, mean=3.0),
        grad_sq=np.array([(4.0 * norm) ** 2]),
        lr=np.array([0.5]),
        scalars={"loss_weight": 1.0 / N, "settings": settings},
    )


def adamw(g: Maker, n: int, decayed: int) -> Call:
    """The third update, with moments that earlier updates have left."""
    factors = Factors(apply=1.0, grad_factor=0.3, lr=1e-2, c1=1 - 0.9**3, c2=1 - 0.999**3)
    return g.call(
        master=g.normal(n, scale=0.02),
        m=g.normal(n, scale=0.1),
        v=g.rng.uniform(0.0, 0.1, n),
        param="master" if g.x_dtype == FLOAT32 else np.full(n, np.nan),
        factors=np.array(factors),
        scalars={"decayed": decayed, "settings": _adamw_settings(1.0)},
    )


def muon_momentum(g: Maker, O: int, I: int, apply: int) -> Call:
    """With apply = 0 the gradient is NaN, which must neither be read nor enter m."""
    factors = Factors(apply=float(apply), grad_factor=0.3, lr=1e-2, c1=1.0, c2=1.0)
    grad = g.normal(O, I) if apply else np.full((O, I), np.nan)
    scalars = {"momentum": 0.9}
    return g.call(grad=grad, factors=np.array(factors), scalars=scalars, exact=not apply)


def muon_polynomial(g: Maker, K: int) -> Call:
    """The Gram matrix of rows of norm 1, of which a few are not orthogonal."""
    x = g.normal(K, K + 2)
    gram = rounded(x @ x.T / np.square(x).sum(), g.x_dtype)
    return g.call(gram=gram, square=gram @ gram)


def muon_update(g: Maker, n: int) -> Call:
    factors = Factors(apply=1.0, grad_factor=0.3, lr=1e-2, c1=1.0, c2=1.0)
    return g.call(
        master=g.normal(n, scale=0.02),
        param="master" if g.x_dtype == FLOAT32 else np.full(n, np.nan),
        factors=np.array(factors),
        scalars={"scale": 5.0, "weight_decay": 0.1},
    )


def _adamw_settings(max_grad_norm: float, max_zscore: float = 0.0) -> AdamWSettings:
    return AdamWSettings(
        beta1=0.9,
        beta2=0.999,
        eps=1e-3,  # so large that an update without it differs
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        max_loss_scale=8.0,
        max_loss_zscore=max_zscore,
        max_grad_zscore=max_zscore,
    )


def cast_to_float32(g: Maker, n: int) -> Call:
    return g.call(dtypes={"y": FLOAT32, "x": BFLOAT16}, exact=True)


def cast_to_bfloat16(g: Maker, n: int) -> Call:
    """Ordinary numbers, ties, the largest and smallest numbers, infinities and NaNs.

    Of all NaNs, the one with every bit set is the one that rounding would carry into a zero.
    """
    x = g.normal_x(n)
    special = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4028235e38, 1e-40, -0.0, np.inf, -np.inf]
    x[: len(special)] = special[:n]
    x[n // 2 :: 97] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    return g.call(dtypes={"y": BFLOAT16, "x": FLOAT32}, x=x, exact=True)


def cast_every_float16(g: Maker, n: int) -> Call:
    """Every float16 that is not a NaN, from zero to infinity, if n = 2 x 0x7c01."""
    magnitudes = np.arange(n // 2, dtype=np.uint16)
    x = np.concatenate([magnitudes, magnitudes | 0x8000]).view(np.float16)
    return g.call(dtypes={"y": FLOAT32, "x": FLOAT16}, x=x, exact=True)


def cast_to_float16(g: Maker, n: int) -> Call:
    """Numbers of all sizes, ties, the last that stay finite and the first that become zero."""
    x = g.normal_x(n) * 2.0 ** g.rng.integers(-30, 16, n)
    special = [1 + 2**-11, 1 + 3 * 2**-11, 65519.99, 65520, -1e9, 2**-14 - 2**-26, 2**-25,
               3 * 2**-25, -(2**-25 + 2**-40), 1e-9, -0.0, np.inf, -np.inf]  # fmt: skip
    x[: len(special)] = special[:n]
    x[n // 2 :: 97] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    return g.call(dtypes={"y": FLOAT16, "x": FLOAT32}, x=x, exact=True)


def cast_copy(g: Maker, n: int) -> Call:
    return g.call(exact=True)


def matmul(g: Maker, M: int, K: int, N: int, accumulate: int) -> Call:
    scalars = {"accumulate": bool(accumulate)}
    if accumulate:
        return g.call(dtypes={"out": FLOAT32}, out=g.normal(M, N), scalars=scalars)
    return g.call(scalars=scalars)


def _cases(make: Callable[..., Call] | str, names: str, *sizes: tuple[int, ...]) -> list[Case]:
    """One case per tuple of sizes; `make` is a function named after its op, or an op's name."""
    if isinstance(make, str):
        op, make = make, derived
    else:
        op = "cast" if make.__name__.startswith("cast") else make.__name__
    return [Case(op, dict(zip(names.split(), size, strict=True)), make) for size in sizes]


NO_TOKEN: Final = -2  # before `sample` writes: neither a token nor its -1
NOT_WRITTEN: Final = -128  # before `quantize_rows` writes: it gives -127 to 127
SAMPLE_SIZES: Final = (
    *((1, 1, 1, 10, 0, 0), (2, 7, 8, 0, 0, 0), (3, 31, 31, 8, 5, 0), (2, 33, 40, 20, 0, 50)),
    *((2, 127, 128, 10, 40, 90), (3, 129, 136, 5, 1, 0), (2, 1030, 1152, 7, 0, 95)),
    *((2, 1031, 1031, 10, 1031, 100), (1, 9000, 9000, 30, 100, 99), (2, 5000, 5008, 15, 0, 0)),
    *((2, 5000, 5008, 0, 3, 50), (1, 50257, 50304, 10, 40, 90)),
)
QUANTIZE_SIZES: Final = (
    *((1, 1, 1), (3, 31, 1), (7, 33, 3), (2, 127, 127), (5, 129, 3), (2, 172, 43), (4, 288, 9)),
    *((1, 768, 12), (3, 768, 24), (33, 64, 1)),
)
# Groups of 1, 3, 4, 8, 16, 32, 43, 64 and more elements; rows beyond the rows of one block.
MATMUL_INT8_SIZES: Final = (
    *((1, 1, 1, 1), (1, 7, 31, 31), (2, 5, 33, 11), (3, 33, 172, 43), (7, 9, 129, 3)),
    *((4, 31, 288, 9), (1, 70, 768, 12), (9, 3, 768, 24), (33, 2, 64, 1), (8, 6, 1600, 25)),
    *((5, 4, 40, 5), (1, 3, 4096, 1), (16, 5, 48, 3)),
)
EMBEDDING_SIZES: Final = (
    *((1, 1, 1, 1), (2, 7, 33, 3), (3, 31, 129, 7), (1, 129, 257, 1000)),
    *((2, 33, 40, 5), (1, 50, 2304, 9)),
)
ROWS: Final = (
    *((1, 1), (7, 31), (31, 33), (33, 127), (9, 129), (129, 65), (300, 7)),
    *((33, 128), (70, 768), (9, 1600), (1, 8)),  # C a multiple of 16 bytes
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
    (1, 1, 1, 3, 1),
    (2, 7, 3, 9, 1),
    (2, 31, 2, 6, 3),
    (1, 129, 1, 3, 16),
    (1, 150, 2, 6, 33),
    (2, 33, 2, 6, 64),
    (1, 65, 1, 3, 80),
    (1, 40, 2, 6, 128),
    (1, 33, 1, 3, 256),
    (2, 129, 2, 6, 64),
    (1, 200, 1, 3, 80),
    (1, 130, 1, 3, 96),
    (1, 70, 2, 6, 128),
    # Groups of 2, 3, 8 and 2 query heads for each key/value head.
    (2, 31, 4, 8, 3),
    (2, 70, 6, 10, 64),
    (1, 33, 8, 10, 128),
    (1, 129, 4, 8, 33),
)
# Decoding with 1, 1, 2, 3, 8, 9, 1, 12, 4 and 2 query heads for each key/value head.
DECODE_SIZES: Final = (
    (1, 1, 3, 1, 1, 1),
    (3, 2, 6, 2, 7, 33),
    (2, 4, 8, 2, 129, 64),
    (2, 6, 10, 2, 31, 7),
    (1, 8, 10, 1, 257, 128),
    (2, 9, 11, 1, 127, 80),
    (2, 1, 3, 1, 65, 256),
    (1, 12, 14, 1, 33, 255),
    (3, 4, 6, 1, 700, 16),
    (4, 4, 8, 2, 128, 64),
)
KV_APPEND_SIZES: Final = (
    (1, 1, 3, 1, 1, 1),
    (2, 7, 9, 3, 31, 7),
    (3, 1, 6, 1, 33, 64),
    (2, 31, 8, 2, 129, 33),
    (1, 33, 3, 1, 40, 256),
    (2, 5, 10, 1, 7, 128),
)
# B, T, R, D, G: D of one pair, of no whole 16-byte vectors, and of whole ones.
ROPE_SIZES: Final = (
    *((1, 1, 3, 2, 1), (2, 7, 4, 6, 1), (1, 31, 9, 10, 3), (1, 129, 12, 34, 2)),
    *((3, 5, 15, 48, 3), (2, 33, 5, 64, 1), (1, 3, 40, 128, 4), (2, 2, 3, 12, 1)),
)
# Matrices of one block and of several, wide and tall.
MATRICES: Final = ((1, 1), (7, 31), (33, 31), (129, 127), (1, 300), (3001, 33))
LONG_ROW: Final = (2, 8200)  # several 16-byte vectors per thread
LENGTHS: Final = ((1,), (31,), (257,), (1000,))
CASES: Final[tuple[Case, ...]] = (
    *_cases(embedding_fwd, "B T C V", *EMBEDDING_SIZES),
    *_cases(embedding_bwd, "B T C V", *EMBEDDING_SIZES),
    *_cases(token_embedding_fwd, "B T C V", *EMBEDDING_SIZES),
    *_cases(token_embedding_bwd, "B T C V", *EMBEDDING_SIZES),
    *_cases(layernorm_fwd, "N C offset", *((*size, 3) for size in ROWS), (33, 127, 30)),
    *_cases(residual_layernorm_fwd, "N C", *ROWS),
    *_cases(layernorm_bwd, "N C", *ROWS),
    *_cases(rmsnorm_fwd, "N C", *ROWS),
    *_cases(residual_rmsnorm_fwd, "N C", *ROWS),
    *_cases(rmsnorm_bwd, "N C", *ROWS),
    *_cases(rope_fwd, "B T R D G", *ROPE_SIZES),
    *_cases(rope_bwd, "B T R D G", *ROPE_SIZES),
    *_cases(attention_fwd, "B T H R D", *ATTENTION_SIZES),
    *_cases(attention_bwd, "B T H R D", *ATTENTION_SIZES),
    *_cases(kv_append, "B T R G S D", *KV_APPEND_SIZES),
    *_cases(attention_decode, "B H R G S D", *DECODE_SIZES),
    *_cases(softmax_fwd, "N V offset inplace", *SOFTMAX_FWD_SIZES),
    *_cases(softmax_bwd, "N V inplace", *SOFTMAX_SIZES),
    *_cases(gelu_fwd, "N O", *ROWS, LONG_ROW),
    *_cases(gelu_bwd, "N O inplace", *((*size, i % 2) for i, size in enumerate((*ROWS, LONG_ROW)))),
    *_cases(swiglu_fwd, "N F", *ROWS, LONG_ROW),
    *_cases(swiglu_bwd, "N F", *ROWS, LONG_ROW),
    *_cases(bias_fwd, "N O", *ROWS, LONG_ROW),
    *_cases("bias_bwd", "N O", *ROWS, (5000, 3)),
    *_cases(classifier_fwd, "N V Vp", *VOCABULARIES, *FULL_VOCABULARIES),
    *_cases(classifier_fwd_bwd, "N V Vp", *VOCABULARIES, *FULL_VOCABULARIES),
    *_cases(sample, "B V Vp temperature top_k top_p", *SAMPLE_SIZES),
    *_cases(quantize_rows, "N I J", *QUANTIZE_SIZES),
    *_cases(matmul_int8, "N O I J", *MATMUL_INT8_SIZES),
    *_cases("squared_norm", "n", *LENGTHS, (300_000,)),
    *_cases(
        *(prepare_update, "N clipped max_zscore"),
        *((1, 0, 0), (31, 1, 2), (257, 0, 9), (3000, 1, 0)),
    ),
    *_cases(adamw, "n decayed", (1, 1), (31, 0), (258, 101), (1000, 1000), (1027, 1025)),
    *_cases(muon_momentum, "O I apply", *((*size, 1) for size in MATRICES), (7, 31, 0)),
    *_cases(muon_polynomial, "K", (1,), (7,), (31,), (33,), (129,), (300,)),
    *_cases(muon_update, "n", *LENGTHS),
    *_cases(cast_to_float32, "n", *LENGTHS),
    *_cases(cast_to_bfloat16, "n", *LENGTHS),
    *_cases(cast_every_float16, "n", (2 * 0x7C01,)),
    *_cases(cast_to_float16, "n", *LENGTHS, (20_011,)),
    *_cases(cast_copy, "n", (31,)),
    *_cases(matmul, "M K N accumulate", (1, 1, 1, 0), (7, 31, 33, 0), (33, 129, 127, 1)),
)
LARGE_ATTENTION_SIZES: Final = (
    *((2, 1024, 3, 9, 64), (1, 1000, 2, 6, 80), (1, 777, 2, 6, 128)),
    *((1, 1000, 8, 12, 64), (1, 777, 8, 10, 128)),  # groups of 4 and of 8 query heads
)
# Sizes of real models, for GPUs: too slow for the emulator.
LARGE_CASES: Final[tuple[Case, ...]] = (
    *_cases(embedding_fwd, "B T C V", (4, 1024, 768, 50257)),
    *_cases(embedding_bwd, "B T C V", (4, 1024, 768, 50257), (4, 1024, 768, 10)),
    *_cases(token_embedding_fwd, "B T C V", (4, 1024, 576, 49152)),
    *_cases(token_embedding_bwd, "B T C V", (4, 1024, 576, 49152), (4, 1024, 576, 10)),
    *_cases(layernorm_fwd, "N C offset", (4096, 768, 3), (1000, 1601, 30)),
    *_cases(residual_layernorm_fwd, "N C", (4096, 768), (1000, 1601)),
    *_cases(layernorm_bwd, "N C", (4096, 768), (1000, 1601)),
    *_cases(rmsnorm_fwd, "N C", (4096, 576), (1000, 1601)),
    *_cases(residual_rmsnorm_fwd, "N C", (4096, 576), (1000, 1601)),
    *_cases(rmsnorm_bwd, "N C", (4096, 576), (1000, 1601)),
    *_cases(rope_fwd, "B T R D G", (4, 1024, 15, 64, 3), (2, 777, 40, 128, 4)),
    *_cases(rope_bwd, "B T R D G", (4, 1024, 15, 64, 3), (2, 777, 40, 128, 4)),
    *_cases(attention_fwd, "B T H R D", *LARGE_ATTENTION_SIZES),
    *_cases(attention_bwd, "B T H R D", *LARGE_ATTENTION_SIZES),
    *_cases(kv_append, "B T R G S D", (4, 777, 36, 12, 1024, 64), (2, 100, 48, 8, 2048, 128)),
    *_cases(
        *(attention_decode, "B H R G S D"),
        *((4, 12, 36, 12, 1024, 64), (1, 32, 48, 8, 8192, 128), (3, 8, 10, 1, 4001, 80)),
    ),
    *_cases(softmax_fwd, "N V offset inplace", (64, 50257, 0, 0)),
    *_cases(softmax_bwd, "N V inplace", (64, 50257, 1)),
    *_cases(gelu_fwd, "N O", (4096, 3072)),
    *_cases(gelu_bwd, "N O inplace", (4096, 3072, 1)),
    *_cases(swiglu_fwd, "N F", (4096, 1536)),
    *_cases(swiglu_bwd, "N F", (4096, 1536)),
    *_cases(bias_fwd, "N O", (4096, 3072)),
    *_cases("bias_bwd", "N O", (4096, 3072), (20_001, 777)),
    *_cases(classifier_fwd, "N V Vp", (64, 50257, 50304)),
    *_cases(classifier_fwd_bwd, "N V Vp", (64, 50257, 50304)),
    *_cases(
        *(sample, "B V Vp temperature top_k top_p"),
        *((64, 50257, 50304, 8, 40, 0), (8, 128_256, 128_256, 10, 0, 90)),
        *((1, 50257, 50304, 0, 0, 0), (3, 32_000, 32_000, 10, 300, 95)),
    ),
    *_cases(quantize_rows, "N I J", (32, 11_008, 172), (1, 4096, 64)),
    *_cases(matmul_int8, "N O I J", (1, 50_304, 768, 12), (32, 4096, 11_008, 172)),
    *_cases("squared_norm", "n", (5_000_001,)),
    *_cases(prepare_update, "N clipped max_zscore", (65_536, 1, 0)),
    *_cases(adamw, "n decayed", (3_000_001, 2_000_001)),
    *_cases(muon_momentum, "O I apply", (3072, 768, 1), (1000, 1601, 1)),
    *_cases(muon_polynomial, "K", (768,), (1601,)),
    *_cases(muon_update, "n", (3_000_001,)),
    *_cases(cast_to_bfloat16, "n", (3_000_001,)),
    *_cases(cast_to_float16, "n", (3_000_001,)),
    *_cases(matmul, "M K N accumulate", (512, 768, 2304, 0), (768, 4096, 768, 1)),
)
