"""An NVIDIA GPU through CuPy: the only file that imports it.

Kernels go through `cupy.RawModule` with NVRTC, matrix products through `cupy.matmul`, which is
cuBLAS. CuPy keeps compiled kernels on disk under a key made of the text and the options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import BFLOAT16, FLOAT16, FLOAT32, Array, Device
from gpu_gpt2.device.launch import Dim3, scalar_value
from gpu_gpt2.device.source import KernelSource
from gpu_gpt2.errors import DeviceError, KernelError

NO_DRIVER: Final = "no driver"
NOT_USABLE: Final = "not usable"
DISALLOW_REDUCED_PRECISION_REDUCTION: Final = 16  # a cublasMath_t that CuPy has no name for
TENSOR_CORE_CAPABILITY: Final = 80  # mma.m16n8k16, and cp.async, came with Ampere
DEFAULT_SHARED_BYTES: Final = 48 * 1024  # a kernel must ask before it gets more


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"CuPy is not installed ({error}); install it with: pip install 'cupy-cuda12x>=14.2'"
        ) from None
    return cupy


def gpu_count() -> int:
    """How many NVIDIA GPUs there are; raises DeviceError with the driver's reason if none."""
    cupy = _import_cupy()
    try:
        count: int = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"no usable NVIDIA GPU here ({error}); check that nvidia-smi lists one, or use "
            f"--device cpu"
        ) from None
    if count == 0:
        raise DeviceError("the NVIDIA driver sees no GPU; use --device cpu")
    return count


class CupyDevice(Device):
    """GPU number `index`. Raises DeviceError if there is none."""

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        count = gpu_count()
        if index >= count:
            raise DeviceError(f"there is no GPU {index}; GPUs are numbered 0 to {count - 1}")
        self._cupy = _import_cupy()
        self._cupy.cuda.Device(index).use()
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._uploading: list[npt.NDArray[Any]] = []  # host arrays a copy may still read

    @property
    def compute_capability(self) -> int:
        """Ten times the capability: 75 is Turing, 80 Ampere, 90 Hopper."""
        return int(self._cupy.cuda.Device().compute_capability)

    @property
    def has_tensor_cores(self) -> bool:
        return self.compute_capability >= TENSOR_CORE_CAPABILITY

    @property
    def product_name(self) -> str:
        properties = self._cupy.cuda.runtime.getDeviceProperties(self._cupy.cuda.Device().id)
        return str(properties["name"].decode())

    @property
    def free_memory(self) -> int:
        return self.memory[0]

    @property
    def memory(self) -> tuple[int, int]:
        """Free and total bytes on the GPU."""
        free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(free), int(total)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self._allocate(self._cupy.empty, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return self._allocate(self._cupy.zeros, shape, dtype)

    def _allocate(self, make: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        try:
            return make(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError:
            need = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            free, total = self.memory
            raise DeviceError(
                f"out of GPU memory: {need / 2**20:.0f} MiB more are needed, {free / 2**20:.0f} of "
                f"{total / 2**20:.0f} MiB are free; lower --batch-size, --seq-len or --model"
            ) from None

    def upload(self, dst: Array, src: npt.NDArray[Any]) -> None:
        src = np.ascontiguousarray(src)
        dst.set(src)
        self._uploading.append(src)

    def download(self, src: Array) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self._cupy.asnumpy(src)  # waits for everything before it
        self._uploading.clear()
        return host

    def fill_zero(self, dst: Array) -> None:
        dst.data.memset_async(0, dst.nbytes)

    @functools.cached_property
    def _cublas_handle(self) -> int:
        """CuPy's handle, told once to keep the sums of split products in float32 too."""
        try:
            from cupy_backends.cuda.libs import cublas
        except ImportError as error:
            raise DeviceError(
                f"cuBLAS cannot be opened ({str(error).splitlines()[0]}); gpu-gpt2 info says what "
                f"to install"
            ) from None
        handle: int = self._cupy.cuda.device.get_cublas_handle()
        cublas.setMathMode(handle, DISALLOW_REDUCED_PRECISION_REDUCTION)
        return handle

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        handle = self._cublas_handle  # before cupy.matmul, which uses the same one
        if accumulate or out.dtype != a.dtype:
            self._gemm(handle, out, a, b, self._one if accumulate else self._zero)
        else:
            self._cupy.matmul(a, b, out=out)

    def _gemm(
        self, handle: int, out: Array, a: Array, b: Array, beta: npt.NDArray[np.float32]
    ) -> None:
        """out (M, N) = a (M, K) @ b (K, N) + beta * out: what cupy.matmul cannot do.

        cuBLAS counts in columns, so it is asked for out^T = b^T a^T, for which row-major memory
        is already in the right order.
        """
        from cupy_backends.cuda.libs import cublas

        (M, K), N = a.shape, b.shape[1]
        runtime = self._cupy.cuda.runtime
        cuda_type = {
            FLOAT32: runtime.CUDA_R_32F,
            BFLOAT16: runtime.CUDA_R_16BF,
            FLOAT16: runtime.CUDA_R_16F,
        }
        b_op, ldb = _operand(b, cublas)
        a_op, lda = _operand(a, cublas)
        cublas.gemmEx(
            handle, b_op, a_op, N, M, K, self._one.ctypes.data,
            b.data.ptr, cuda_type[b.dtype], ldb,
            a.data.ptr, cuda_type[a.dtype], lda, beta.ctypes.data,
            out.data.ptr, cuda_type[out.dtype], N,
            cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()
        self._uploading.clear()

    def free_cached_memory(self) -> None:
        """Gives what CuPy keeps of freed arrays back to the driver, for others to use."""
        self._cupy.get_default_memory_pool().free_all_blocks()

    def owns(self, value: object) -> bool:
        return isinstance(value, self._cupy.ndarray)

    def _launch(
        self,
        source: KernelSource,
        name: str,
        grid: Dim3,
        block: Dim3,
        args: tuple[Any, ...],
        shared_bytes: int,
    ) -> None:
        kernel = self._kernel(source, name)
        if shared_bytes > DEFAULT_SHARED_BYTES:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        values = tuple(
            value if parameter.pointer else scalar_value(parameter, value)
            for parameter, value in zip(source.parameters(name), args, strict=True)
        )
        kernel(grid, block, values, shared_mem=shared_bytes)

    @functools.cache  # noqa: B019 (devices live as long as the process)
    def _kernel(self, source: KernelSource, name: str) -> Any:
        options = (*source.options(), "--std=c++17")
        module = self._cupy.RawModule(code=source.text, options=options, backend="nvrtc")
        try:
            return module.get_function(name)
        except self._cupy.cuda.compiler.CompileException as error:
            raise KernelError(f"{source.file} does not compile: {error}") from None
        except (RuntimeError, ImportError) as error:  # a CUDA library or its headers are missing
            raise DeviceError(
                f"{source.file} cannot be compiled ({str(error).splitlines()[0]}); gpu-gpt2 info "
                f"says what to install"
            ) from None


def _operand(x: Array, cublas: Any) -> tuple[int, int]:
    """cuBLAS operation and leading dimension of a row-major matrix, or of its transposed view."""
    if x.flags.c_contiguous:
        return cublas.CUBLAS_OP_N, x.shape[1]
    if x.flags.f_contiguous:
        return cublas.CUBLAS_OP_T, x.shape[0]
    raise ValueError(f"matmul: shape {x.shape} with strides {x.strides} is neither")


def cuda_versions() -> dict[str, str]:
    """Versions of CuPy and of the CUDA libraries it opens, by name; a missing one says why.

    The driver comes first: it is the newest CUDA the machine can run.
    """
    cupy = _import_cupy()

    def dotted(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}" if version else NO_DRIVER

    def of_nvrtc() -> str:
        from cupy_backends.cuda.libs import nvrtc

        return ".".join(map(str, nvrtc.getVersion()))

    def of_cublas() -> str:
        from cupy_backends.cuda.libs import cublas

        if not cupy.cuda.runtime.driverGetVersion():
            return "found; its version shows with a driver"
        version = cublas.getVersion(cupy.cuda.device.get_cublas_handle())
        return f"{version // 10000}.{version // 100 % 100}.{version % 100}"

    probes: dict[str, Callable[[], str]] = {
        "driver": lambda: dotted(cupy.cuda.runtime.driverGetVersion()),
        "runtime": lambda: dotted(cupy.cuda.runtime.runtimeGetVersion()),
        "NVRTC": of_nvrtc,
        "cuBLAS": of_cublas,
    }
    found = {"CuPy": str(cupy.__version__)}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:  # every library reports its absence in its own way
            found[name] = f"{NOT_USABLE}: {str(error).splitlines()[0]}"
    return found
