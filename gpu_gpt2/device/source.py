"""The text of a kernel file as every compiler gets it, and the signatures of its kernels.

A source is `common.cuh`, the headers of ours that the `.cu` file includes, and that file, joined
with `#line` marks: compile errors name the real file and line, and a compiler cache keyed by the
text can never serve a stale header.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpu_gpt2.errors import LaunchError

HEADER: Final = "common.cuh"  # stands in front of every kernel file, which need not include it
INCLUDE: Final = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
SCALARS: Final = ("int", "long long", "float")  # types of parameters that are not pointers
# Types that pointers may point to. CUDA does not say whether `char` has a sign.
POINTEES: Final = ("float", "floatX", "bf16", "fp16", "int", "signed char")
DTYPES: Final = ("fp32", "bf16", "fp16")  # types that floatX can stand for


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel: `const float* x` is (name "x", ctype "float", pointer, const)."""

    name: str
    ctype: str
    pointer: bool
    const: bool

    def __str__(self) -> str:
        star = "*" if self.pointer else ""
        return f"{'const ' if self.const else ''}{self.ctype}{star} {self.name}"


@dataclass(frozen=True, slots=True)
class KernelSource:
    """One kernel file with the values of its compile-time names, `defines`.

    `dtype` is the type that `floatX` stands for: "fp32", "bf16" or "fp16".
    """

    file: str
    dtype: str
    defines: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The joined text of headers and file."""
        return _joined_text(kernels_dir(), self.file)

    @property
    def signatures(self) -> dict[str, tuple[Parameter, ...]]:
        """The parameters of every kernel in the file, by the kernel's name."""
        return _signatures(kernels_dir(), self.file)

    def parameters(self, kernel: str) -> tuple[Parameter, ...]:
        """Returns the parameters of a kernel. Raises LaunchError if the file does not have it."""
        if kernel not in self.signatures:
            raise LaunchError(
                f"{self.file} has no kernel {kernel!r}; it has {', '.join(self.signatures)}"
            )
        return self.signatures[kernel]

    def options(self) -> tuple[str, ...]:
        """Returns the -D options, which every compiler takes."""
        floatx = ("FLOATX", self.dtype.upper())
        return tuple(f"-D{name}={value}" for name, value in (floatx, *self.defines))


def kernel_source(file: str, dtype: str, **defines: int) -> KernelSource:
    """Returns the source of `file` with activations in `dtype`, one of DTYPES."""
    assert dtype in DTYPES, dtype
    return KernelSource(file, dtype, tuple(sorted(defines.items())))


@functools.cache
def kernels_dir() -> Path:
    """Returns the folder of the .cu files: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "kernels", package.parent / "kernels"):
        if (candidate / HEADER).is_file():
            return candidate
    raise FileNotFoundError(
        f"no kernels: looked for {HEADER} in {package / 'kernels'} and {package.parent / 'kernels'}"
        f"; install gpu-gpt2 again"
    )


def kernel_files() -> tuple[str, ...]:
    """Returns the names of all kernel files, sorted."""
    return tuple(sorted(path.name for path in kernels_dir().glob("*.cu")))


@functools.cache
def _joined_text(folder: Path, file: str) -> str:
    text = (folder / file).read_text()
    headers = (HEADER, *INCLUDE.findall(text))
    parts = [(name, (folder / name).read_text()) for name in headers]
    parts.append((file, INCLUDE.sub("", text)))
    return "\n".join(f'#line 1 "{name}"\n{part}' for name, part in parts)


@functools.cache
def _signatures(folder: Path, file: str) -> dict[str, tuple[Parameter, ...]]:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", (folder / file).read_text(), flags=re.DOTALL)
    heads = re.finditer(
        r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)',
        text,
    )
    return {
        head[1]: tuple(_parameter(file, head[1], part) for part in head[2].split(","))
        for head in heads
    }


def _parameter(file: str, kernel: str, text: str) -> Parameter:
    words = text.replace("*", " * ").replace("__restrict__", " ").split()
    name = words.pop()
    pointer = "*" in words
    const = "const" in words
    ctype = " ".join(word for word in words if word not in ("*", "const"))
    if ctype not in (POINTEES if pointer else SCALARS) or words.count("*") > 1:
        raise LaunchError(
            f"{file}: {kernel}: cannot pass parameter '{text.strip()}'; pointers are to "
            f"{', '.join(POINTEES)} and scalars are {', '.join(SCALARS)}"
        )
    return Parameter(name, ctype, pointer, const)
