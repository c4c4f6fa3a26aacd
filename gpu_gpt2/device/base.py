"""The interface of a device: memory, copies, matmuls and kernel launches."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.launch import Dim3, check_launch
from gpu_gpt2.device.source import KernelSource

# A NumPy array on the CPU and in the emulator, a CuPy array on a GPU. Both have the same methods.
Array: TypeAlias = Any

FLOAT32: Final = np.dtype(np.float32)
INT32: Final = np.dtype(np.int32)
INT8: Final = np.dtype(np.int8)
BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
FLOAT16: Final = np.dtype(np.float16)
# The dtypes that X can be, by the names that users give.
X_DTYPES: Final = {"fp32": FLOAT32, "bf16": BFLOAT16, "fp16": FLOAT16}


@dataclass(frozen=True, slots=True)
class AsyncRead:
    """A copy of a device array on its way to the host; `result` waits until it has arrived."""

    result: Callable[[], npt.NDArray[Any]]


class Device(ABC):
    """One place where tensors live and kernels run.

    The attributes say what the device can do. Ask them, not for its name or its class.
    """

    name: str
    dtypes: tuple[str, ...] = ()  # names of X_DTYPES that it computes in, the one to prefer first
    runs_kernels = True  # it launches the files in kernels/; without that it runs NumPy
    is_async = False  # launches return at once: reading a result early would stall the device
    is_emulated = False  # the times that anything takes here say nothing about a GPU
    has_tensor_cores = True  # kernels that include tensor_core.cuh run here
    is_gpu = False  # libraries other than ours can compute here too, under the name "cuda"

    @property
    def product_name(self) -> str:
        """The name of the device for people: of a GPU the one that its maker gave it."""
        return self.name

    @property
    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that new arrays can take."""

    @property
    def peak_memory(self) -> int:
        """The most bytes held here, on a GPU since `release_memory`; 0 where nobody counts."""
        return 0

    def release_memory(self) -> None:  # noqa: B027 (most devices keep none)
        """Gives memory of freed arrays that is kept for later ones back to the system."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new C-contiguous array with undefined contents."""

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new C-contiguous array of zeros."""

    @abstractmethod
    def upload(self, dst: Array, src: npt.NDArray[Any]) -> None:
        """Copies a host array into `dst` of this device: same shape, same dtype.

        `src` must not change before `synchronize` or `download` returns: a GPU may read it late.
        """

    @abstractmethod
    def download(self, src: Array) -> npt.NDArray[Any]:
        """A host copy of `src`, complete when this returns."""

    def download_view(self, src: Array) -> npt.NDArray[Any]:
        """Like `download`, but may return a view of `src`; read it before `src` changes."""
        return self.download(src)

    def host_empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A new C-contiguous host array with undefined contents, for `download_into`.

        On a GPU it is in pinned memory: a copy to it is faster, and takes no other host memory.
        """
        return np.empty(shape, dtype)

    @abstractmethod
    def download_into(self, dst: npt.NDArray[Any], src: Array) -> None:
        """Copies `src` into a host array of its shape and dtype; complete when this returns."""

    def stager(self, *buffers: Array) -> Callable[..., None]:
        """Returns a function that copies host arrays, one for each buffer, into the buffers.

        The caller may change the host arrays as soon as the function returns, and need not wait
        for earlier work that still reads the buffers.
        """

        def stage(*arrays: npt.NDArray[Any]) -> None:
            for buffer, array in zip(buffers, arrays, strict=True):
                self.upload(buffer, array)

        return stage

    def read_async(self, src: Array) -> AsyncRead:
        """Starts a host copy of `src` as the work enqueued so far leaves it."""
        copy = self.download(src)
        return AsyncRead(lambda: copy)

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns `work`, as a graph that is launched as a whole where the device has graphs.

        Each call of `work` must enqueue the same launches, copies and matmuls on the same arrays,
        and must neither read nor write host memory. Where a graph cannot be made, a warning is
        logged, `graph_error` says why, and the launches are made one by one.
        """
        return work

    @property
    def graph_error(self) -> str:
        """Why graphs cannot be used here; empty as long as none has failed."""
        return ""

    @abstractmethod
    def address(self, array: Array) -> int:
        """Returns the address of the array's first element."""

    @abstractmethod
    def fill_zero(self, dst: Array) -> None:
        """Sets a C-contiguous array to zeros."""

    @abstractmethod
    def copy(self, dst: Array, src: Array) -> None:
        """dst = src, both of this device, C-contiguous, of one shape and dtype."""

    def time_ms(self, work: Callable[[], None], *, repeat: int) -> list[float]:
        """Returns the milliseconds that each of `repeat` runs of `work` takes, after a warm-up.

        `work` must meet the conditions of `graph`. On a GPU the caches are emptied before each run.
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
        """Returns True if `value` is an array in this device's memory."""

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
