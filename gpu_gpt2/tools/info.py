"""Lists the hardware and libraries that gpu-gpt2 finds on this machine, and advises on repairs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Final

import numpy as np

import gpu_gpt2
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.device.cuda import NOT_USABLE, CudaDevice, cuda_versions, gpu_count
from gpu_gpt2.device.emulator.build import Compiler
from gpu_gpt2.device.source import kernels_dir
from gpu_gpt2.errors import DeviceError

# Beginnings of the file names of the CUDA libraries that CuPy opens.
CUDA_LIBRARIES: Final = ("libcuda.so", "libcudart", "libnvrtc.so", "libcublas.so")
# CuPy's packages, one for each major version of CUDA. At most one of them may be installed, because
# they all install the same module.
CUPY_PACKAGES: Final = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


def report() -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (name, value) rows about this machine, and one line of advice for each problem."""
    rows = [
        ("gpu-gpt2", f"{gpu_gpt2.__version__} in {Path(gpu_gpt2.__file__).parent}"),
        ("kernels", str(kernels_dir())),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("NumPy", f"{np.__version__}, {os.cpu_count()} CPU cores"),
    ]
    advice: list[str] = []
    rows += _cuda_rows(advice)
    rows += _gpu_rows(advice)
    rows.append(("emulator", _emulator(advice)))
    device = open_device("auto")
    rows.append(("train would use", f"{device.name}, {choose_dtype('auto', device)}"))
    return rows, advice


def _emulator(advice: list[str]) -> str:
    try:
        return f"builds kernels with {' '.join(Compiler().words)}"
    except DeviceError as error:
        advice.append(str(error))
        return "not usable"


def _cuda_rows(advice: list[str]) -> list[tuple[str, str]]:
    installed = [name for name in CUPY_PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        advice.append(
            f"{' and '.join(installed)} overwrite each other: pip uninstall all of them, then "
            f"install the one that fits your driver"
        )
    try:
        versions = cuda_versions()
    except DeviceError as error:
        advice.append(str(error))
        return [("CuPy", "not installed")]
    versions["CuPy"] += f" ({', '.join(installed)})"
    for name, package in (("NVRTC", "nvidia-cuda-nvrtc"), ("cuBLAS", "nvidia-cublas")):
        if NOT_USABLE in versions[name]:
            suffix = "-cu12" if "cupy-cuda12x" in installed else ""
            advice.append(f"{name} cannot be opened: pip install {package}{suffix}")
    paths = [(f"  {path.name}", str(path.parent)) for path in _loaded_libraries()]
    return [*versions.items(), *paths]


def _gpu_rows(advice: list[str]) -> list[tuple[str, str]]:
    try:
        count = gpu_count()
    except DeviceError as error:
        advice.append(f"{error}; without a GPU training runs on the CPU")
        return [("GPU", "none")]
    rows = []
    for index in range(count):
        gpu = CudaDevice(index)
        free, total = gpu.memory
        rows.append(
            (
                f"GPU {index}",
                f"{gpu.product_name}, compute capability {gpu.compute_capability / 10:.1f}, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
            )
        )
    return rows


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _loaded_libraries() -> list[Path]:
    """Returns the CUDA libraries that this process has opened so far; none except on Linux."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if path.name.startswith(CUDA_LIBRARIES))
