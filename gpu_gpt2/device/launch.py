"""Checks a kernel call against the kernel's own signature, in the same way on every device.

CuPy checks nothing: a missing argument, a Python float (passed as a double) for a `float`, and a
transposed view all run and give garbage. `check_launch` refuses each of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from gpu_gpt2.device.source import KernelSource, Parameter
from gpu_gpt2.errors import LaunchError

Dim3: TypeAlias = tuple[int, ...]

# Limits of CUDA, the same for all GPUs (CUDA C++ Programming Guide, "Compute Capabilities").
MAX_GRID: Final = (2**31 - 1, 65535, 65535)  # blocks in x, y and z
MAX_BLOCK: Final = (1024, 1024, 64)  # threads of a block in x, y and z
MAX_THREADS: Final = 1024  # threads of a block

# What the type of a pointer's elements means; floatX is one of the others.
ELEMENT_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float": np.dtype(np.float32),
    "int": np.dtype(np.int32),
    "signed char": np.dtype(np.int8),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
}
FLOATX: Final = {"fp32": "float", "bf16": "bf16", "fp16": "fp16"}  # C type by the dtype of a source
SCALAR_TYPES: Final[dict[str, Callable[[Any], np.generic]]] = {
    "int": np.int32,
    "long long": np.int64,
    "float": np.float32,
}
INT_BITS: Final = {"int": 31, "long long": 63}  # without the sign


def check_launch(
    source: KernelSource,
    name: str,
    grid: Dim3,
    block: Dim3,
    args: tuple[Any, ...],
    shared_bytes: int,
    *,
    owns: Callable[[object], bool],
) -> None:
    """Raises LaunchError, naming kernel and parameter, unless the call fits the signature."""
    _check_dims(name, "grid", grid, MAX_GRID)
    _check_dims(name, "block", block, MAX_BLOCK)
    if math.prod(block) > MAX_THREADS:
        raise LaunchError(f"{name}: {math.prod(block)} threads a block; at most {MAX_THREADS}")
    if shared_bytes < 0:
        raise LaunchError(f"{name}: negative shared memory {shared_bytes}")
    parameters = source.parameters(name)
    if len(args) != len(parameters):
        raise LaunchError(
            f"{name}: {len(args)} arguments for {len(parameters)} parameters "
            f"({', '.join(map(str, parameters))})"
        )
    for parameter, value in zip(parameters, args, strict=True):
        try:
            if parameter.pointer:
                _check_array(parameter, value, source, owns)
            else:
                _check_scalar(parameter, value)
        except LaunchError as error:
            raise LaunchError(f"{name}: {parameter}: {error}") from None


def pointer_dtype(parameter: Parameter, source: KernelSource) -> np.dtype[Any]:
    """The dtype of the array that a pointer parameter takes; `source` says what floatX is."""
    ctype = parameter.ctype
    return ELEMENT_DTYPES[FLOATX[source.dtype] if ctype == "floatX" else ctype]


def scalar_value(parameter: Parameter, value: Any) -> np.generic:
    """`value` as the exact type of a scalar parameter."""
    return SCALAR_TYPES[parameter.ctype](value)


def _check_dims(name: str, what: str, dims: Dim3, limits: tuple[int, int, int]) -> None:
    if not 1 <= len(dims) <= 3:
        raise LaunchError(f"{name}: {what} {dims} must have 1 to 3 sizes")
    for size, limit in zip(dims, limits, strict=False):
        if not 1 <= size <= limit:
            raise LaunchError(
                f"{name}: {what} {dims}: each size must be 1 to {limits[: len(dims)]}"
            )


def _check_array(
    parameter: Parameter, value: Any, source: KernelSource, owns: Callable[[object], bool]
) -> None:
    if not hasattr(value, "dtype") or not getattr(value, "shape", ()):
        raise LaunchError(f"expected an array, got {type(value).__name__} {value!r}")
    if not owns(value):
        raise LaunchError(f"the array is in another device's memory ({type(value).__module__})")
    expected = pointer_dtype(parameter, source)
    if value.dtype != expected:
        raise LaunchError(f"expected dtype {expected}, got {value.dtype}")
    if not value.flags.c_contiguous:
        raise LaunchError(f"shape {value.shape} is a strided view; pass a C-contiguous array")


def _check_scalar(parameter: Parameter, value: Any) -> None:
    if hasattr(value, "shape") and value.shape != ():
        raise LaunchError(f"expected a number, got an array of shape {value.shape}")
    if parameter.ctype == "float":
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
            raise LaunchError(f"expected a number, got {type(value).__name__} {value!r}")
        return
    if isinstance(value, bool):
        raise LaunchError("expected a whole number, got a bool")
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise LaunchError(f"expected a whole number, got {kind} {value!r}") from None
    if number.bit_length() > INT_BITS[parameter.ctype]:
        raise LaunchError(f"{number} does not fit into {parameter.ctype}")
