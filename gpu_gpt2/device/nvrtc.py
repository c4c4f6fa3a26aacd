"""Compiles kernels for any GPU architecture, without a GPU, and reports what ptxas says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gpu_gpt2.device.source import KernelSource
from gpu_gpt2.errors import DeviceError, KernelError

# Compiler options besides -D: those that CuPy passes to NVRTC for a RawModule (see
# cupy/cuda/compiler.py), so that the same code is compiled, and -v for ptxas's report.
OPTIONS: Final = (
    "--std=c++17",
    "-ftz=true",
    "--device-as-default-execution-space",
    "--ptxas-options=-v",
)
# What ptxas -v prints about one kernel.
ENTRY: Final = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResources:
    """The registers and memory that one compiled kernel needs."""

    kernel: str
    registers: int  # per thread
    shared_bytes: int  # static shared memory per block
    stack_bytes: int  # local memory per thread, which arrays with dynamic indices need
    spill_bytes: int  # loads and stores per thread of values that did not fit into registers


def compile_for(source: KernelSource, architecture: str) -> tuple[KernelResources, ...]:
    """Compiles all kernels of `source` for an architecture such as "sm_90".

    Raises KernelError with the compiler's message for an error or a warning, and DeviceError if
    NVRTC is not installed.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise DeviceError(
            f"NVRTC cannot be opened ({str(error).splitlines()[0]}); install it with: "
            f"pip install nvidia-cuda-nvrtc-cu12"
        ) from None
    program = nvrtc.createProgram(source.text, source.file, [], [])
    try:
        nvrtc.compileProgram(program, [*source.options(), *OPTIONS, f"-arch={architecture}"])
        log = str(nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError:
        log = "error: " + str(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)
    if log.startswith("error: ") or "warning" in log:
        raise KernelError(f"{source.file} {dict(source.defines)} for {architecture}: {log}")
    return tuple(map(_resources, ENTRY.finditer(log)))


def _resources(entry: re.Match[str]) -> KernelResources:
    shared = re.search(r"(\d+) bytes smem", entry["rest"])
    return KernelResources(
        kernel=entry["kernel"],
        registers=int(entry["registers"]),
        shared_bytes=int(shared[1]) if shared else 0,
        stack_bytes=int(entry["stack"]),
        spill_bytes=int(entry["stores"]) + int(entry["loads"]),
    )
