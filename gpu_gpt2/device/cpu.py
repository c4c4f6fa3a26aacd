"""The CPU as a device: NumPy arrays and NumPy's matmul. It launches no kernels."""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil

from gpu_gpt2.device.base import FLOAT32, Array, Device
from gpu_gpt2.device.launch import Dim3
from gpu_gpt2.device.source import KernelSource
from gpu_gpt2.errors import LaunchError

ACCUMULATE_CHUNK: Final = 1 << 20  # elements of a temporary result, so that it stays in cache
# The most rows for which a matrix-vector product for each is faster than one matmul: OpenBLAS first
# copies the weights into another order, which pays off from about eight rows on.
MAX_VECTORS: Final = 6
# Elements of the smallest weight that is multiplied so: smaller ones stay in cache in either way.
MIN_VECTOR_WEIGHT: Final = 1 << 16
# Elements of a block of weights in such products: as many as stay in cache, and so many that
# OpenBLAS lets all cores multiply them.
VECTOR_BLOCK: Final = 1 << 20


class CpuDevice(Device):
    """NumPy on the CPU; see ops/reference.py for the ops that run here."""

    name = "cpu"
    dtypes: tuple[str, ...] = ("fp32",)
    runs_kernels = False

    @property
    def product_name(self) -> str:
        return "CPU"

    @property
    def free_memory(self) -> int:
        """Free bytes of the machine; the limit of a container is not known here."""
        return int(psutil.virtual_memory().available)

    @property
    def peak_memory(self) -> int:
        """The most bytes that the whole process has ever held; 0 on Windows."""
        try:
            import resource
        except ImportError:  # Windows does not count this
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)  # macOS counts in bytes

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, dst: Array, src: npt.NDArray[Any]) -> None:
        if dst.shape != src.shape or dst.dtype != src.dtype:
            raise ValueError(f"cannot copy {src.dtype} {src.shape} into {dst.dtype} {dst.shape}")
        np.copyto(dst, src)

    def download(self, src: Array) -> npt.NDArray[Any]:
        return np.array(src, order="C")

    def download_view(self, src: Array) -> npt.NDArray[Any]:
        return np.asarray(src)

    def download_into(self, dst: npt.NDArray[Any], src: Array) -> None:
        self.upload(dst, src)  # both are host arrays here

    def address(self, array: Array) -> int:
        return int(array.ctypes.data)

    def fill_zero(self, dst: Array) -> None:
        dst.fill(0)

    def copy(self, dst: Array, src: Array) -> None:
        np.copyto(dst, src)

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        if a.dtype != FLOAT32:
            result = np.matmul(a.astype(np.float32), b.astype(np.float32))
            out[...] = result + out if accumulate else result
        elif accumulate:
            # BLAS could add into its output, but NumPy does not offer that: add slice by slice.
            rows = max(1, ACCUMULATE_CHUNK // out.shape[1])
            for i in range(0, out.shape[0], rows):
                out[i : i + rows] += np.matmul(a[i : i + rows], b)
        elif 1 < len(a) <= MAX_VECTORS and b.size >= MIN_VECTOR_WEIGHT and b.T.flags.c_contiguous:
            _matmul_by_vectors(out, a, b.T)
        else:
            np.matmul(a, b, out=out)

    def synchronize(self) -> None:
        pass

    def owns(self, value: object) -> bool:
        return isinstance(value, np.ndarray)

    def _launch(
        self,
        source: KernelSource,
        name: str,
        grid: Dim3,
        block: Dim3,
        args: tuple[Any, ...],
        shared_bytes: int,
    ) -> None:
        raise LaunchError(f"{name}: the CPU runs NumPy; kernels run on 'cuda' or the 'emulator'")


def _matmul_by_vectors(out: Array, x: Array, w: Array) -> None:
    """out (N, O) = x (N, I) @ w.T (I, O), with a matrix-vector product for each row of x.

    All rows of x are multiplied by one block of w, which stays in cache, before the next one.
    """
    step = max(1, VECTOR_BLOCK // w.shape[1])
    vectors = x[:, :, None]
    for i in range(0, len(w), step):
        np.matmul(w[i : i + step], vectors, out=out[:, i : i + step, None])
