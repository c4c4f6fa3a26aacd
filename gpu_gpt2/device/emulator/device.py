"""The emulator as a device: NumPy arrays, and kernels built by the host's compiler."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gpu_gpt2.device.base import Array
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.emulator.build import CALL_PREFIX, SHIM, Compiler
from gpu_gpt2.device.emulator.elf import read_image
from gpu_gpt2.device.launch import Dim3, scalar_value
from gpu_gpt2.device.source import DTYPES, KernelSource
from gpu_gpt2.errors import DeviceError, KernelError

Order: TypeAlias = Literal["ascending", "descending", "random"]

ORDERS: Final = ("ascending", "descending", "random")  # numbered as in runtime/state.h
POISON: Final = 0x7FFB  # 16-bit pattern of memory that was never written: see runtime/state.h
ALIGNMENT: Final = 256  # bytes by which arrays are aligned, as by cudaMalloc
# Most accesses that a thread may make between two barriers: ten seconds or more, after which the
# loop is reported as endless.
ACCESS_LIMIT: Final = 1 << 30
# Results of emulator_launch: no fault; a fault, described in a message; a launch that must be
# repeated with smaller records, because an access to shared memory is smaller than a record.
FINE, FAULT, FINER_GRANULE = range(3)
MESSAGE_BYTES: Final = 4096  # size of the buffer for a fault's description
# log2 of the bytes of shared memory that one record of accesses covers in a library's first launch:
# 4 bytes, a float. The runtime asks for smaller records where a kernel needs them.
FLOAT_GRANULE: Final = 2

# Held during a launch: the runtime can run one at a time, but ctypes lets other threads of Python
# run meanwhile.
_launching: Final = threading.Lock()


# The structures of runtime/state.h, field by field.


class _Parameter(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("argument", ctypes.c_void_p),
        ("itemsize", ctypes.c_uint32),
        ("constant", ctypes.c_uint32),
    )


class _Variable(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("start", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
    )


class _Image(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("bss_start", ctypes.c_void_p),
        ("bss_end", ctypes.c_void_p),
        ("variables", ctypes.POINTER(_Variable)),
        ("variable_count", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("image", ctypes.POINTER(_Image)),
        ("seed", ctypes.c_uint64),
        ("parameter_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("access_limit", ctypes.c_uint32),
        ("sanitized", ctypes.c_uint32),
        ("shared_granule", ctypes.c_uint32),
    )


@dataclass(slots=True)
class _Library:
    """The kernels of one source, built and loaded."""

    path: Path
    handle: ctypes.CDLL
    image: _Image
    shared_granule: int = FLOAT_GRANULE

    def entry(self, kernel: str) -> int | None:
        return ctypes.cast(self.handle[CALL_PREFIX + kernel], ctypes.c_void_p).value


class EmulatorDevice(CpuDevice):
    """Runs kernels on the CPU, thread by thread, and checks every memory access they make.

    `order` is the order of blocks, and of threads between two barriers; a correct kernel gives the
    same bits in each order. `seed` is that of "random". With `sanitize` the compiler's sanitizers
    check the accesses instead: see `sanitizer_environment`. Raises DeviceError without a C++
    compiler; launches raise KernelError for a fault of the kernel.
    """

    name = "emulator"
    dtypes = DTYPES
    runs_kernels = True
    is_emulated = True
    product_name = name

    def __init__(
        self, order: Order = "ascending", seed: int = 0, *, sanitize: bool = False
    ) -> None:
        self._order = ORDERS.index(order)
        self._seed = seed
        self._sanitize = sanitize
        self._compiler = Compiler()
        self._libraries: dict[KernelSource, _Library] = {}
        if sanitize and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise DeviceError(
                "AddressSanitizer must be loaded before Python starts: run this in a process with "
                "the environment that gpu_gpt2.device.emulator.sanitizer_environment() gives"
            )
        self._runtime = ctypes.CDLL(str(self._compiler.runtime()))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new array in which every element is a NaN, or a large integer.

        A kernel that reads such an element before it has been written is reported, unless the
        array is of int8.
        """
        array, words = _aligned(shape, np.dtype(dtype))
        words.fill(POISON)
        return array

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        array, words = _aligned(shape, np.dtype(dtype))
        words.fill(0)
        return array

    def _launch(
        self,
        source: KernelSource,
        name: str,
        grid: Dim3,
        block: Dim3,
        args: tuple[Any, ...],
        shared_bytes: int,
    ) -> None:
        library = self._libraries.get(source) or self._load(source)
        arguments = (ctypes.c_void_p * len(args))()  # addresses of the arguments' values
        pointers = (ctypes.c_void_p * len(args))()  # set by the runtime: its copies of the arrays
        scalars = []
        parameters = []
        for i, (parameter, value) in enumerate(zip(source.parameters(name), args, strict=True)):
            if parameter.pointer:
                arguments[i] = ctypes.addressof(pointers) + i * ctypes.sizeof(ctypes.c_void_p)
                parameters.append(
                    _Parameter(
                        parameter.name.encode(),
                        str(value.dtype).encode(),
                        value.ctypes.data,
                        value.nbytes,
                        arguments[i],
                        value.itemsize,
                        parameter.const,
                    )
                )
            else:
                scalars.append(np.array(scalar_value(parameter, value)))
                arguments[i] = scalars[-1].ctypes.data
        launch = _Launch(
            entry=library.entry(name),
            arguments=arguments,
            parameters=(_Parameter * len(parameters))(*parameters),
            image=ctypes.pointer(library.image),
            seed=self._seed,
            parameter_count=len(parameters),
            grid=(*grid, 1, 1)[:3],
            block=(*block, 1, 1)[:3],
            shared_bytes=shared_bytes,
            order=self._order,
            access_limit=ACCESS_LIMIT,
            sanitized=self._sanitize,
            shared_granule=library.shared_granule,
        )
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        with _launching:
            outcome = FINER_GRANULE
            while outcome == FINER_GRANULE:
                outcome = self._runtime.emulator_launch(
                    ctypes.byref(launch), message, ctypes.c_uint64(MESSAGE_BYTES)
                )
        library.shared_granule = launch.shared_granule
        if outcome == FAULT:
            raise KernelError(f"{name} {_with_source_lines(message.value.decode(), library.path)}")

    def _load(self, source: KernelSource) -> _Library:
        path = self._compiler.kernels(source, sanitize=self._sanitize)
        handle = ctypes.CDLL(str(path))
        layout = read_image(path)
        kernel = CALL_PREFIX + next(iter(source.signatures))
        entry = ctypes.cast(handle[kernel], ctypes.c_void_p).value
        assert entry is not None
        base = entry - layout.symbols[kernel]
        variables = (_Variable * len(layout.variables))(
            *(_Variable(v.name.encode(), base + v.start, v.size) for v in layout.variables)
        )
        image = _Image(
            base,
            base + layout.size,
            base + layout.bss[0],
            base + layout.bss[1],
            variables,
            len(variables),
        )
        self._libraries[source] = _Library(path, handle, image)
        return self._libraries[source]


def sanitizer_environment() -> dict[str, str]:
    """Returns the environment variables of a process that uses EmulatorDevice(sanitize=True).

    They must be set before Python starts: they load AddressSanitizer's library first, and make
    every finding of the address and undefined behaviour sanitizers end the process with a report.
    Leaks are not checked, because Python itself leaks memory. Raises DeviceError if the compiler
    has no AddressSanitizer library.
    """
    compiler = Compiler()
    library = Path(compiler.library_file("libasan.so"))
    if not library.is_absolute():
        raise DeviceError(f"{compiler.words[0]} has no libasan.so; set CXX to g++")
    return {
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=0",
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, npt.NDArray[np.uint16]]:
    """Returns a new array whose address is a multiple of ALIGNMENT, and all memory behind it."""
    size = math.prod(shape) * dtype.itemsize
    words = np.empty((size + 1) // 2 + ALIGNMENT // 2, np.uint16)
    start = -words.ctypes.data % ALIGNMENT
    return words.view(np.uint8)[start : start + size].view(dtype).reshape(shape), words


def _with_source_lines(message: str, library: Path) -> str:
    """Returns the message with each {offset} into the library's code replaced by file and line."""
    return re.sub(r"\{([0-9a-f]+)\}", lambda match: _source_line(match[1], library), message)


def _source_line(offset: str, library: Path) -> str:
    """Returns " at file:line" of an offset into the library's code, with inlined callers, or ""."""
    command = ["addr2line", "-e", str(library), "-i", offset]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # addr2line is part of binutils, which clang++ works without
        return ""
    lines = [Path(line.split(" ")[0]).name for line in result.stdout.splitlines()]
    known = [line for line in lines if "?" not in line and not line.startswith(SHIM.name)]
    return " at " + ", called at ".join(known) if known else ""
