"""An NVIDIA GPU through CuPy. Apart from nvrtc.py no other file imports CuPy.

Kernels are compiled by NVRTC through `cupy.RawModule`. CuPy keeps the compiled code on disk under a
key made of the text and the options. All work runs on one stream in the order of the calls; a
second stream copies host arrays to the GPU beside it.

Matmuls follow one rule. Outside a graph `cupy.matmul`, which calls cuBLAS, computes every matmul
that it computes as we need it (see `_cupy_multiplies`). All others, and all matmuls of a graph, go
to cuBLAS directly (cublas.py), because CuPy refuses to call cuBLAS while a stream is captured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import FLOAT32, Array, AsyncRead, Device
from gpu_gpt2.device.cublas import Cublas, math_mode, workspace_bytes
from gpu_gpt2.device.launch import Dim3, scalar_value
from gpu_gpt2.device.source import DTYPES, KernelSource
from gpu_gpt2.errors import DeviceError, KernelError

NO_DRIVER: Final = "no driver"
NOT_USABLE: Final = "not usable"
AMPERE: Final = 80  # compute capability 8.0: bfloat16 and mma.m16n8k16 on tensor cores, cp.async
VOLTA: Final = 70  # compute capability 7.0: float16 on tensor cores
FLUSH_BYTES: Final = 512 << 20  # several times the largest L2 cache, to empty it
DEFAULT_SHARED_BYTES: Final = 48 * 1024  # dynamic shared memory that needs no permission
MAX_UPLOADING_BYTES: Final = 256 << 20  # host arrays kept for copies before `upload` waits for them

logger = logging.getLogger(__name__)


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"CuPy is not installed ({error}); install it with: pip install 'cupy-cuda12x>=14.2'"
        ) from None
    return cupy


def gpu_count() -> int:
    """Returns the number of NVIDIA GPUs; raises DeviceError with the driver's reason if 0."""
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


@functools.cache
def _work_stream(index: int) -> Any:
    """Returns the stream of all work on GPU `index`: a default stream cannot be captured."""
    return _import_cupy().cuda.Stream(non_blocking=True)


class CudaDevice(Device):
    """GPU number `index`; with `tf32`, float32 matmuls read only the upper 19 bits of each element.

    Raises DeviceError if there is no such GPU, or if it has no TF32.
    """

    name = "cuda"
    is_async = True
    is_gpu = True

    def __init__(self, index: int = 0, *, tf32: bool = False) -> None:
        count = gpu_count()
        if index >= count:
            raise DeviceError(f"there is no GPU {index}; GPUs are numbered 0 to {count - 1}")
        self._cupy = _import_cupy()
        self._cupy.cuda.Device(index).use()
        self._stream = _work_stream(index).use()
        self.has_tensor_cores = self.compute_capability >= AMPERE
        self.dtypes = _dtypes(self.compute_capability)
        if tf32 and not self.has_tensor_cores:
            raise DeviceError(f"{self.product_name} has no TF32; leave out --tf32")
        self._tf32 = tf32
        self._graph_error = ""
        self._in_graph = False  # the current work belongs to a graph, whether captured or not
        self._uploading: list[npt.NDArray[Any]] = []  # host arrays that a copy may still read
        self._uploading_bytes = 0
        # Host arrays that a copy may still write, with the event at the end of the copy.
        self._reading: list[tuple[Any, npt.NDArray[Any]]] = []

    @property
    def compute_capability(self) -> int:
        """Ten times the compute capability: 75 is Turing, 80 Ampere, 90 Hopper."""
        return int(self._cupy.cuda.Device().compute_capability)

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
                f"{total / 2**20:.0f} MiB are free; use --batch-size auto, or a smaller "
                f"--batch-size, --seq-len or --model"
            ) from None

    def upload(self, dst: Array, src: npt.NDArray[Any]) -> None:
        src = np.ascontiguousarray(src)
        dst.set(src)
        self._uploading.append(src)
        self._uploading_bytes += src.nbytes
        if self._uploading_bytes > MAX_UPLOADING_BYTES:
            self.synchronize()  # the pieces of a large model can be freed

    def download(self, src: Array) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self._cupy.asnumpy(src)  # waits for everything before it
        self._forget_uploads()
        return host

    def host_empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        try:
            return _pinned(shape, dtype)
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            need = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            raise DeviceError(
                f"the host cannot give {need / 2**20:.0f} MiB of pinned memory ({error}); free "
                f"some memory of the host, or use a smaller --model"
            ) from None

    def download_into(self, dst: npt.NDArray[Any], src: Array) -> None:
        src.get(out=dst)  # waits for everything before it
        self._forget_uploads()

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def fill_zero(self, dst: Array) -> None:
        dst.data.memset_async(0, dst.nbytes)

    def copy(self, dst: Array, src: Array) -> None:
        stream = self._cupy.cuda.get_current_stream()
        dst.data.copy_from_device_async(src.data, src.nbytes, stream)

    def time_ms(self, work: Callable[[], None], *, repeat: int) -> list[float]:
        """Measures with the GPU's own clock. A graph leaves out the time of Python's launches."""
        replay = self.graph(work)
        replay()
        replay()
        flushed = self.empty((FLUSH_BYTES,), np.uint8)  # writing this empties the L2 cache
        events = []
        for _ in range(repeat):
            self.fill_zero(flushed)
            start, stop = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            start.record()
            replay()
            stop.record()
            events.append((start, stop))
        self.synchronize()
        return [self._cupy.cuda.get_elapsed_time(start, stop) for start, stop in events]

    @property
    def peak_memory(self) -> int:
        """Bytes that CuPy holds for arrays: it gives none back before `release_memory`."""
        return int(self._cupy.get_default_memory_pool().total_bytes())

    def stager(self, *buffers: Array) -> Callable[..., None]:
        return _Stager(self._cupy, self._copy_stream, buffers)

    @functools.cached_property
    def _copy_stream(self) -> Any:
        return self._cupy.cuda.Stream(non_blocking=True)

    def read_async(self, src: Array) -> AsyncRead:
        host = _pinned(src.shape, src.dtype)
        src.get(out=host, blocking=False)
        copied = self._stream.record(self._cupy.cuda.Event(block=True, disable_timing=True))
        # The host array must outlive its copy, even if nobody waits for the result.
        self._reading = [read for read in self._reading if not read[0].done] + [(copied, host)]

        def wait() -> npt.NDArray[Any]:
            copied.synchronize()
            return host

        return AsyncRead(wait)

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Returns a function whose first call runs `work`, which compiles its kernels.

        The second call captures `work` in a CUDA graph; from then on the graph is launched.
        """
        graph: Any = None
        warm = False

        def run() -> None:
            nonlocal graph, warm
            if warm and graph is None and not self._graph_error:
                try:
                    graph = self._captured(work)
                except (RuntimeError, MemoryError, DeviceError) as error:  # CuPy's are the former
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    self._graph_error = f"CUDA graphs cannot be used here ({reason})"
                    logger.warning("%s; launching kernels one by one", self._graph_error)
            if graph is None:
                with self._graph_matmuls():
                    work()
                warm = True
            else:
                graph.launch(self._stream)

        return run

    @property
    def graph_error(self) -> str:
        return self._graph_error

    def _captured(self, work: Callable[[], None]) -> Any:
        """Returns the graph of what `work` enqueues, without running it."""
        self._stream.begin_capture()
        try:
            with self._graph_matmuls():
                work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # ending a broken capture raises once more
                self._stream.end_capture()
            raise
        return self._stream.end_capture()

    @contextlib.contextmanager
    def _graph_matmuls(self) -> Iterator[None]:
        """Inside, `matmul` does what it does in a capture, so that all runs give the same bits."""
        self._in_graph = True
        try:
            yield
        finally:
            self._in_graph = False

    def matmul(self, out: Array, a: Array, b: Array, *, accumulate: bool = False) -> None:
        if self._in_graph or accumulate or not _cupy_multiplies(out, a):
            self._cublas.matmul(out, a, b, accumulate=accumulate)
        else:
            self._cupy_matmul(a, b, out=out)

    @functools.cached_property
    def _cupy_matmul(self) -> Any:
        """`cupy.matmul`, after CuPy's cuBLAS handle has been given our math mode."""
        handle = self._cupy.cuda.device.get_cublas_handle()
        self._cublas_binding.setMathMode(handle, math_mode(tf32=self._tf32))
        return self._cupy.matmul

    @functools.cached_property
    def _cublas(self) -> Cublas:
        size = workspace_bytes(self.compute_capability)
        return Cublas(
            self._cublas_binding.__file__,  # it is linked to cuBLAS
            stream=self._stream.ptr,
            workspace=self.empty((size,), np.uint8),
            tf32=self._tf32,
        )

    @functools.cached_property
    def _cublas_binding(self) -> Any:
        """CuPy's module for cuBLAS."""
        try:
            from cupy_backends.cuda.libs import cublas
        except ImportError as error:
            raise DeviceError(
                f"cuBLAS cannot be opened ({str(error).splitlines()[0]}); gpu-gpt2 info says what "
                f"to install"
            ) from None
        return cublas

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()
        self._forget_uploads()

    def _forget_uploads(self) -> None:
        """Frees the host arrays of uploads, after the device has run all that was enqueued."""
        self._uploading.clear()
        self._uploading_bytes = 0

    def release_memory(self) -> None:
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


def _cupy_multiplies(out: Array, a: Array) -> bool:
    """Returns True if `cupy.matmul` computes out = a @ b as Device.matmul promises.

    It cannot add into its output or write float32 from 16-bit inputs. It lets cuBLAS take float16
    for float32 (CUBLAS_GEMM_DEFAULT_TENSOR_OP). And it computes a single element by itself, without
    float32 sums.
    """
    return bool(a.dtype == out.dtype != FLOAT32 and out.size > 1)


def _dtypes(compute_capability: int) -> tuple[str, ...]:
    """Returns all DTYPES, first the one that the GPU's tensor cores compute fastest."""
    best = "bf16" if compute_capability >= AMPERE else "fp16"
    return tuple(
        sorted(DTYPES, key=lambda name: name != (best if compute_capability >= VOLTA else "fp32"))
    )


def _pinned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Returns a new host array in pinned memory, which the GPU can read and write by itself."""
    import cupyx

    array: npt.NDArray[Any] = cupyx.empty_pinned(shape, dtype)
    return array


class _Stager:
    """Copies host arrays into device arrays that earlier work may still be reading.

    A host array is copied to pinned memory, from there on a stream of its own to device memory, and
    from there into its buffer when the work stream gets to it. Two sets of both memories alternate.
    """

    def __init__(self, cupy: Any, stream: Any, buffers: tuple[Array, ...]) -> None:
        self._cupy, self._stream, self._buffers = cupy, stream, buffers
        self._slots = itertools.cycle([_Slot(cupy, buffers) for _ in range(2)])

    def __call__(self, *arrays: npt.NDArray[Any]) -> None:
        slot = next(self._slots)
        slot.copied.synchronize()  # the copy before last has left the pinned memory
        self._stream.wait_event(slot.taken)  # and has left the device memory
        for pinned, staged, array in zip(slot.pinned, slot.staged, arrays, strict=True):
            if array.shape != pinned.shape or array.dtype != pinned.dtype:
                raise ValueError(
                    f"cannot copy {array.dtype} {array.shape} into {pinned.dtype} {pinned.shape}"
                )
            pinned[...] = array
            staged.set(pinned, stream=self._stream)
        slot.copied.record(self._stream)
        work = self._cupy.cuda.get_current_stream()
        work.wait_event(slot.copied)
        for buffer, staged in zip(self._buffers, slot.staged, strict=True):
            buffer.data.copy_from_device_async(staged.data, staged.nbytes, work)
        slot.taken.record(work)


class _Slot:
    def __init__(self, cupy: Any, buffers: tuple[Array, ...]) -> None:
        self.pinned = [_pinned(buffer.shape, buffer.dtype) for buffer in buffers]
        self.staged = [cupy.empty_like(buffer) for buffer in buffers]
        self.copied = cupy.cuda.Event(block=True, disable_timing=True)
        # Recorded at once, because earlier work may still use the memory that `staged` was given.
        self.taken = cupy.cuda.get_current_stream().record(cupy.cuda.Event(disable_timing=True))


def cuda_versions() -> dict[str, str]:
    """Returns the versions of CuPy and the CUDA libraries it opens; a missing one says why.

    The driver's version is that of the newest CUDA it can run.
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
