"""Opens a device by its name, and chooses the dtype that it computes in."""

from __future__ import annotations

from gpu_gpt2.device.base import Device
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.cuda import CudaDevice, gpu_count
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.errors import ConfigError, DeviceError

DEVICES = ("auto", "cuda", "cpu", "emulator")


def open_device(name: str, *, tf32: bool = False) -> Device:
    """Returns the device called `name`; "auto" is the GPU where there is one, else the CPU.

    `tf32` is for a GPU: see CudaDevice.

    Raises DeviceError for a GPU that is not here, ConfigError for an unknown name.
    """
    if name == "auto":
        name = "cuda" if has_gpu() else "cpu"
    if name == "cuda":
        return CudaDevice(tf32=tf32)
    if name == "cpu":
        return CpuDevice()
    if name == "emulator":
        return EmulatorDevice()
    raise ConfigError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")


def has_gpu() -> bool:
    """Returns True if CuPy finds an NVIDIA GPU."""
    try:
        return gpu_count() > 0
    except DeviceError:
        return False


def choose_dtype(name: str, device: Device) -> str:
    """Returns the dtype called `name`, one of DTYPES; "auto" is the first of device.dtypes.

    Raises ConfigError for an unknown dtype, or one that the device does not compute in.
    """
    if name == "auto":
        return device.dtypes[0]
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; choose one of auto, {', '.join(DTYPES)}")
    if name not in device.dtypes:
        raise ConfigError(
            f"the {device.product_name} trains in {', '.join(device.dtypes)} only, not {name}; use "
            f"--dtype {device.dtypes[0]}"
        )
    return name
