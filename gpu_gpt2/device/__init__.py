"""From the name of a device to the device and the ops that run on it."""

from __future__ import annotations

from gpu_gpt2.device.base import Device
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.cuda import CudaDevice, gpu_count
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.errors import ConfigError, DeviceError

DEVICES = ("auto", "cuda", "cpu", "emulator")
BF16_CAPABILITY = 80  # tensor cores take bfloat16 from Ampere on
FP16_CAPABILITY = 70  # and float16 from Volta on


def open_device(name: str, *, tf32: bool = False) -> Device:
    """The device called `name`; "auto" is the GPU where there is one, else the CPU.

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
    try:
        return gpu_count() > 0
    except DeviceError:
        return False


def choose_dtype(name: str, device: Device) -> str:
    """One of DTYPES for `name`; "auto" is the fastest that the device's tensor cores take."""
    if name == "auto":
        capability = device.compute_capability if isinstance(device, CudaDevice) else 0
        if capability >= BF16_CAPABILITY:
            return "bf16"
        return "fp16" if capability >= FP16_CAPABILITY else "fp32"
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; choose one of auto, {', '.join(DTYPES)}")
    if name != "fp32" and device.name == "cpu":
        raise ConfigError(f"the CPU trains in fp32 only; leave out --dtype {name}")
    return name
