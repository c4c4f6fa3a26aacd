"""Builds the runtime and the kernels with the host's C++ compiler, and caches the results on disk.

The name of a cached file is the hash of everything it was built from, so no file is ever stale.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from gpu_gpt2.cache import cache_dir
from gpu_gpt2.device.source import KernelSource, Parameter
from gpu_gpt2.errors import DeviceError, KernelError

HERE: Final = Path(__file__).resolve().parent
SHIM: Final = HERE / "shim.h"  # stands in front of a kernel's text: CUDA's built-in names for g++
RUNTIME: Final = HERE / "runtime"  # folder of the C++ library that runs the threads of a launch
CALL_PREFIX: Final = "emulator_call_"  # names the C++ functions that call kernels

# Compiler flags of every kernel. They allow no optimisation that adds, moves or widens memory
# accesses, so that the emulator checks exactly the accesses that the kernel's text makes.
KERNEL_FLAGS: Final = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-gdwarf-4",  # from version 5 of DWARF on, addr2line of 2022 names the wrong file
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-stack-protector",
    "-fvisibility=hidden",
    "-Werror=return-type",
)
GCC_FLAGS: Final = (  # flags that only g++ knows
    "-fno-gnu-unique",  # else equal functions of two kernel files share their static variables
    "-fno-toplevel-reorder",  # keeps the guard of a shared variable in front of the variable
    "-fno-tree-loop-im",
    "-fno-tree-cselim",
    "-fno-tree-vectorize",
)
# Flags of kernels that the emulator checks: the compiler calls the runtime at every load and store.
CHECKED_FLAGS: Final = "-fsanitize=thread,alignment,integer-divide-by-zero"
GCC_BOUNDS: Final = ",bounds"
CLANG_BOUNDS: Final = ",array-bounds"  # clang's "bounds" calls functions that the runtime lacks
LINK_FLAGS: Final = ("-shared", "-nostartfiles", "-Wl,-Bsymbolic,-z,now")
# ThreadSanitizer's library is not linked: the runtime has the functions that it would define.
CHECKED_LINK_FLAGS: Final = ("-Wl,-z,defs,--wrap=memcpy,--wrap=memset",)
# Flags of kernels that the compiler's sanitizers check instead.
SANITIZED_FLAGS: Final = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
RUNTIME_FLAGS: Final = (
    "-std=c++17",
    "-O2",
    "-w",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-shared",
)


class Compiler:
    """The host's C++ compiler: $CXX, or else g++, or else clang++.

    Raises DeviceError if there is none.
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
            raise DeviceError(
                f"the emulator runs on Linux on x86-64 and aarch64, this is {sys.platform} on "
                f"{platform.machine()}; use --device cpu"
            )
        named = shlex.split(os.environ.get("CXX", ""))
        candidates = [named] if named else [["g++"], ["clang++"]]
        found = [words for words in candidates if shutil.which(words[0])]
        if not found:
            looked = f"$CXX is {' '.join(named)!r}, which is not there" if named else "found none"
            raise DeviceError(
                f"the emulator needs a C++ compiler: {looked}; install g++ (Debian and Ubuntu: "
                f"apt install g++) or clang++"
            )
        self.words = found[0]
        self.version = self.run("--version").stdout

    def run(self, *arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Runs the compiler with `text` as its standard input; the result has the exit status."""
        command = [*self.words, *map(str, arguments)]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def runtime(self) -> Path:
        """Returns the shared library of runtime/, built if it is not in the cache.

        Raises DeviceError if it does not compile.
        """
        text = "".join(file.read_text() for file in sorted(RUNTIME.iterdir()))
        path = built_dir() / f"runtime-{_digest(self.version, *RUNTIME_FLAGS, text)}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / "built.so"
                result = self.run(*RUNTIME_FLAGS, RUNTIME / "runtime.cpp", "-o", built)
                if result.returncode:
                    raise DeviceError(f"{self.words[0]} cannot build the emulator: {result.stderr}")
                os.replace(built, path)
        return path

    def kernels(self, source: KernelSource, *, sanitize: bool) -> Path:
        """Returns the shared library of a kernel file, built if it is not in the cache.

        The library has a function emulator_call_<kernel> for each kernel. Raises KernelError with
        the compiler's messages, which name the .cu file, if the file does not compile.
        """
        clang = "clang" in self.version
        checked = (CHECKED_FLAGS + (CLANG_BOUNDS if clang else GCC_BOUNDS),)
        flags = (
            *KERNEL_FLAGS,
            *(() if clang else GCC_FLAGS),
            *(SANITIZED_FLAGS if sanitize else checked),
            *source.options(),
        )
        link_flags = (*LINK_FLAGS, *(SANITIZED_FLAGS if sanitize else CHECKED_LINK_FLAGS))
        runtime = self.runtime()
        calls = [_call(kernel, parameters) for kernel, parameters in source.signatures.items()]
        text = "\n".join([source.text, '#line 1 "emulator calls"', *calls, ""])
        key = _digest(self.version, *flags, *link_flags, str(runtime), SHIM.read_text(), text)
        path = built_dir() / f"{Path(source.file).stem}-{key}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                compiled, linked = Path(folder) / "compiled.o", Path(folder) / "linked.so"
                read_text = ("-include", SHIM, "-x", "c++", "-c", "-")
                result = self.run(*flags, *read_text, "-o", compiled, text=text)
                if result.returncode == 0:
                    result = self.run(*link_flags, compiled, runtime, "-lm", "-o", linked)
                if result.returncode:
                    raise KernelError(f"{source.file} does not compile:\n{result.stderr.strip()}")
                os.replace(linked, path)
        return path

    def library_file(self, name: str) -> str:
        """Returns the path of one of the compiler's own libraries."""
        return self.run(f"-print-file-name={name}").stdout.strip()


def built_dir() -> Path:
    """Returns the folder of built libraries, created if it does not exist.

    Raises DeviceError if the folder cannot be created.
    """
    folder = cache_dir("emulator")
    if folder is None:
        raise DeviceError("no folder for built kernels: set XDG_CACHE_HOME to one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(
            f"cannot make the folder {folder} for built kernels ({error.strerror}); "
            f"set XDG_CACHE_HOME to one that can be written"
        ) from None
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _call(kernel: str, parameters: tuple[Parameter, ...]) -> str:
    """Returns the C++ text of a function that calls the kernel.

    Its parameter is the array of the addresses of the kernel's arguments.
    """
    arguments = ", ".join(
        f"*({'const ' if p.const else ''}{p.ctype}{'*' if p.pointer else ''}*)arguments[{i}]"
        for i, p in enumerate(parameters)
    )
    return (
        f'extern "C" __attribute__((visibility("default"), no_sanitize_thread)) '
        f"void {CALL_PREFIX}{kernel}(void** arguments) {{ {kernel}({arguments}); }}"
    )
