"""NVRTC compiles every kernel for three generations of GPUs, on a machine that has none.

The options are those that CuPy passes when it compiles a RawModule (cupy/cuda/compiler.py). What
ptxas says of registers and memory is printed at the end of the test run.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from cupy_backends.cuda.libs import nvrtc

from gpu_gpt2.device.cupy_device import DEFAULT_SHARED_BYTES
from gpu_gpt2.device.launch import MAX_THREADS
from gpu_gpt2.device.source import KernelSource, kernel_files, kernel_source
from gpu_gpt2.ops.kernels import attention_defines

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
REGISTERS = 65536  # of a multiprocessor: a block that needs more does not start
HEAD_SIZES = (10, 64, 80, 112, 128, 256)
VARIANTS: list[tuple[str, dict[str, int]]] = [
    (file, defines)
    for file in kernel_files()
    for defines in (
        [attention_defines(size) for size in HEAD_SIZES] if file == "attention.cu" else [{}]
    )
]
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers[^\n]*",
    re.DOTALL,
)


def _compile(source: KernelSource, architecture: str) -> str:
    """The compiler's and ptxas' messages; raises NVRTCError with them if it does not compile."""
    program = nvrtc.createProgram(source.text, source.file, [], [])
    options = [*source.options(), "--std=c++17", "-ftz=true", f"-arch={architecture}"]
    options += ["--device-as-default-execution-space", "--ptxas-options=-v"]
    try:
        nvrtc.compileProgram(program, options)
        assert nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        pytest.fail(f"{source.file} for {architecture}: {nvrtc.getProgramLog(program)}")
    else:
        return str(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _name(value: object) -> str:
    return f"D{value['HEAD_SIZE']}" if isinstance(value, dict) and value else str(value or "")


@pytest.mark.parametrize(("file", "defines"), VARIANTS, ids=_name)
def test_compiles_without_warning_or_spill(
    file: str, defines: dict[str, int], record_property: Callable[[str, object], None]
) -> None:
    registers: dict[str, list[str]] = {}
    shared: dict[str, int] = {}
    for architecture in ARCHITECTURES:
        for bf16 in (False, True):
            source = kernel_source(file, bf16=bf16, **defines)
            log = _compile(source, architecture)
            where = f"{file} {defines} bf16={bf16} {architecture}"
            assert "warning" not in log, f"{where}: {log}"
            entries = list(ENTRY.finditer(log))
            assert {entry[1] for entry in entries} == set(source.signatures), log
            for entry in entries:
                kernel, stack, stores, loads, used = entry.groups()
                assert (stack, stores, loads) == ("0", "0", "0"), f"{where}: {entry[0]}"
                threads = defines.get("THREADS", MAX_THREADS)
                assert int(used) * threads <= REGISTERS, f"{where}: {entry[0]}"
                registers.setdefault(kernel, []).append(used)
                memory = re.search(r"(\d+) bytes smem", entry[0])
                shared[kernel] = int(memory[1]) if memory else 0
                assert shared[kernel] <= DEFAULT_SHARED_BYTES, f"{where}: {entry[0]}"
    for kernel, used in registers.items():
        head = f"D={defines['HEAD_SIZE']}" if defines else ""
        pairs = [f"{used[i]}/{used[i + 1]}" for i in range(0, len(used), 2)]
        columns = " ".join(f"{a} {p:<8}" for a, p in zip(ARCHITECTURES, pairs, strict=True))
        record_property(
            "kernel", f"{kernel:<24}{head:<7}{columns} registers fp32/bf16, {shared[kernel]} shared"
        )
