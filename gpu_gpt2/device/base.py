"""What every device offers: memory, copies, matrix products and kernel launches."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.launch import Dim3, check_launch
from gpu_gpt2.device.source import KernelSource

# A NumPy array on the CPU and in the emulator, a CuPy array on a GPU; both slice and reshape alike.
Array: TypeAlias = Any

FLOAT32: Final = np.dtype(np.float32)
INT32: Final = np.dtype(np.int32)
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
FLOAT16: Final = np.dtype(np.float16)
X_DTYPES: Final = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16}  # by the name users give


class Device(ABC):
    """One place where tensors live and kernels run."""

    name: str

    @property
    def runs_ahead(self) -> bool:
        """Whether Python goes on while the device works, so that an early look costs time."""
        return False

    @property
    def has_tensor_cores(self) -> bool:
        """Whether kernels that include tensor_core.cuh run here."""
        return True

    @property
    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that new arrays can take."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new C-contiguous array with undefined contents."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new C-contiguous array of zeros."""

    @abstractmethod
    def upload(self, dst: Array, src: npt.NDArray[Any]) -> None:
        """Copies a host array into `dst` of this device: same shape, same dtype."""

    @abstractmethod
    def download(self, src: Array) -> npt.NDArray[Any]:
        """A host copy of `src`, complete when this returns."""

    def host_view(self, src: Array) -> npt.NDArray[Any]:
        """`download` for those who only read, and before the array changes: no copy if it can."""
        return self.download(src)

    def feeder(self, *buffers: Array) -> Callable[..., None]:
        """A function of as many host arrays that copies them into `buffers`.

        The caller need not keep the arrays, nor wait for earlier work that reads the buffers.
        """

        def feed(*arrays: npt.NDArray[Any]) -> None:
            for buffer, array in zip(buffers, arrays, strict=True):
                self.upload(buffer, array)

        return feed

    def fetch(self, src: Array) -> Callable[[], npt.NDArray[Any]]:
        """Begins a host copy of `src` as the work so far leaves it; the result waits for it."""
        copy = self.download(src)
        return lambda: copy

    def graph(self, work: Callable[[], None], say: Callable[[str], None]) -> Callable[[], None]:
        """`work`, made quick to repeat where the device knows how.

        It must enqueue the same launches, copies and products on the same arrays every time, and
        neither read nor write what is on the host. `say` gets one line if that did not succeed and
        the work is done as it is.
        """
        return work

    @abstractmethod
    def address(self, array: Array) -> int:
        """Where the array begins in memory."""

    @abstractmethod
    def fill_zero(self, dst: Array) -> None:
        """Sets a C-contiguous array to zeros."""

    @abstractmethod
    def copy(self, dst: Array, src: Array) -> None:
        """dst = src, both of this device, C-contiguous, of one shape and dtype."""

    def time_ms(self, work: Callable[[], None], *, repeat: int) -> list[float]:
        """How long each of `repeat` runs of `work` takes, in milliseconds, after one to warm up.

        `work` is as `graph` wants it; on a GPU its caches hold nothing of it when it begins.
        """
        work()
        times = []
        for _ in range(repeat):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            times.append((time.perf_counter() - started) * 1000)
        return times

    @abstractmethod
    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        """out (M, N) = a (M, K) @ b (K, N), or += with `accumulate`.

        a and b are of one X dtype, C-contiguous or transposed views of such; out is
        C-contiguous, float32 or the inputs' dtype. Sums are kept in float32.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until everything launched so far has run."""

    def launch(
        self,
        source: KernelSource,
        name: str,
        grid: Dim3,
        block: Dim3,
        args: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Starts kernel `name` of `source` after checking every argument against its signature.

        Arrays are passed as pointers, Python ints and floats as the scalar type the signature
        names; `shared_bytes` is dynamic shared memory per block. Raises LaunchError.
        """
        check_launch(source, name, grid, block, args, shared_bytes, owns=self.owns)
        self._launch(source, name, grid, block, args, shared_bytes)

    @abstractmethod
    def owns(self, value: object) -> bool:
        """Whether `value` is an array in this device's memory."""

    @abstractmethod
    def _launch(
        self,
        source: KernelSource,
        name: str,
        grid: Dim3,
        block: Dim3,
        args: tuple[Any, ...],
        shared_bytes: int,
    ) -> None: ...
