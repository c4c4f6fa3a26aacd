"""Calls cuBLAS's GEMM directly, for the matmuls that `cupy.matmul` does not compute.

It adds into the output, writes float32 from 16-bit inputs, multiplies float32 in full precision,
and can be captured in a CUDA graph; see cuda.py for the rule. CuPy sets the stream before every
call, which takes a handle's own workspace away, so the handle here is one that CuPy never sees.
Names and values of the constants are those of cublas_api.h and library_types.h of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, Array
from gpu_gpt2.errors import DeviceError

OP_N, OP_T = 0, 1
COMPUTE_32F: Final = 68
GEMM_DEFAULT: Final = -1
TF32_TENSOR_OP_MATH: Final = 3
DISALLOW_REDUCED_PRECISION_REDUCTION: Final = 16
CUDA_TYPES: Final = {FLOAT32: 0, FLOAT16: 2, BFLOAT16: 14}

_pointer, _int = ctypes.c_void_p, ctypes.c_int
SIGNATURES: Final = {
    "cublasCreate_v2": (_pointer,),
    "cublasSetStream_v2": (_pointer, _pointer),
    "cublasSetWorkspace_v2": (_pointer, _pointer, ctypes.c_size_t),
    "cublasSetMathMode": (_pointer, _int),
    "cublasGemmEx": (
        _pointer, _int, _int, _int, _int, _int, _pointer,  # handle, ops, m, n, k, alpha
        _pointer, _int, _int, _pointer, _int, _int, _pointer,  # A, type, ld, B, type, ld, beta
        _pointer, _int, _int, _int, _int,  # C, type, ld, compute type, algorithm
    ),
}  # fmt: skip


def math_mode(*, tf32: bool) -> int:
    """Returns a cublasMath_t in which split sums stay float32; `tf32` rounds float32 inputs."""
    return DISALLOW_REDUCED_PRECISION_REDUCTION | (TF32_TENSOR_OP_MATH if tf32 else 0)


def workspace_bytes(compute_capability: int) -> int:
    """Returns the size of workspace that NVIDIA recommends: 32 MiB from Hopper on, else 4 MiB."""
    return (32 if compute_capability >= 90 else 4) << 20


class Cublas:
    """One cuBLAS handle on one stream, with a workspace of its own.

    `library` is the path of a shared library that is linked to cuBLAS; its copy of cuBLAS is used.
    """

    def __init__(self, library: str, *, stream: int, workspace: Array, tf32: bool) -> None:
        self._library = ctypes.CDLL(library)
        for name, arguments in SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self._library.cublasGetStatusString.restype = ctypes.c_char_p
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._workspace = workspace  # in use as long as the handle is
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, stream)
        # This must follow the stream: setting a stream resets the workspace to cuBLAS's own.
        self._call("cublasSetWorkspace_v2", self._handle, workspace.data.ptr, workspace.nbytes)
        self._call("cublasSetMathMode", self._handle, math_mode(tf32=tf32))

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool) -> None:
        """Computes out = a @ b, or += with `accumulate`: see Device.matmul.

        cuBLAS's matrices are column-major, so it is asked for out^T = b^T a^T, for which row-major
        memory is already in the right order. The factors alpha and beta lie in host memory, whose
        values a captured graph keeps.
        """
        (M, K), N = a.shape, b.shape[1]
        b_op, ldb = _operand(b)
        a_op, lda = _operand(a)
        beta = self._one if accumulate else self._zero
        self._call(
            "cublasGemmEx",
            self._handle, b_op, a_op, N, M, K, ctypes.byref(self._one),
            b.data.ptr, CUDA_TYPES[b.dtype], ldb,
            a.data.ptr, CUDA_TYPES[a.dtype], lda, ctypes.byref(beta),
            out.data.ptr, CUDA_TYPES[out.dtype], N, COMPUTE_32F, GEMM_DEFAULT,
        )  # fmt: skip

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            reason = self._library.cublasGetStatusString(status).decode()
            raise DeviceError(f"{name} failed: {reason} (cuBLAS status {status})")


def _operand(x: Array) -> tuple[int, int]:
    """Returns cuBLAS's operation and leading dimension of a row-major or transposed matrix."""
    if x.flags.c_contiguous:
        return OP_N, x.shape[1]
    if x.flags.f_contiguous:
        return OP_T, x.shape[0]
    raise ValueError(f"matmul: shape {x.shape} with strides {x.strides} is neither")
