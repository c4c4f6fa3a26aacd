"""Compiles kernels for any GPU on a machine without one, and says what ptxas made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gpu_gpt2.device.source import KernelSource
from gpu_gpt2.errors import DeviceError, KernelError

# Beside -D: what CuPy passes when it compiles a RawModule (cupy/cuda/compiler.py).
OPTIONS: Final = (
    "--std=c++17",
    "-ftz=true",
    "--device-as-default-execution-space",
    "--ptxas-options=-v",
)
ENTRY: Final = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResources:
    """What one compiled kernel needs."""

    kernel: str
    registers: int  # of each thread
    shared_bytes: int  # of each block, static
    stack_bytes: int  # of each thread: arrays that did not fit into registers
    spill_bytes: int  # of each thread: loads and stores for want of registers


def compile_for(source: KernelSource, architecture: str) -> tuple[KernelResources, ...]:
    """Compiles all kernels of `source` for an architecture such as "sm_90".

    Raises KernelError with the compiler's message if it does not compile without a warning, and
    DeviceError without NVRTC.
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
