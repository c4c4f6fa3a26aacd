"""Matrix products by cuBLAS's own function, for what cupy.matmul does not do.

That is to add into the output, to write float32 from 16-bit inputs, to multiply float32 numbers as
such, and to be recorded into a CUDA graph: CuPy refuses to call cuBLAS while a stream is captured.
CuPy also sets the stream before every call, which takes a handle's own workspace away, so the
handle here is one that CuPy never sees. Names and numbers are those of cublas_api.h and
library_types.h of CUDA 12 and 13.
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
    """A cublasMath_t: sums of split products in float32 too; `tf32` for products of float32."""
    return DISALLOW_REDUCED_PRECISION_REDUCTION | (TF32_TENSOR_OP_MATH if tf32 else 0)


def workspace_bytes(compute_capability: int) -> int:
    """The workspace that NVIDIA recommends: 32 MiB from Hopper on, 4 MiB before."""
    return (32 if compute_capability >= 90 else 4) << 20


class Cublas:
    """One cuBLAS handle on one stream, with a workspace of its own.

    `library` is a shared library that is linked to cuBLAS: its copy of cuBLAS is the one used.
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
        # After the stream, for setting a stream goes back to cuBLAS's own workspace.
        self._call("cublasSetWorkspace_v2", self._handle, workspace.data.ptr, workspace.nbytes)
        self._call("cublasSetMathMode", self._handle, math_mode(tf32=tf32))

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool) -> None:
        """As Device.matmul.

        cuBLAS counts in columns, so it is asked for out^T = b^T a^T, for which row-major memory
        is already in the right order. Its factors 1 and 0 are host numbers: a graph keeps them.
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
    """cuBLAS operation and leading dimension of a row-major matrix, or of its transposed view."""
    if x.flags.c_contiguous:
        return OP_N, x.shape[1]
    if x.flags.f_contiguous:
        return OP_T, x.shape[0]
    raise ValueError(f"matmul: shape {x.shape} with strides {x.strides} is neither")
