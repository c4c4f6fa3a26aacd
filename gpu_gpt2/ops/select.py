"""The ops that fit a device."""

from __future__ import annotations

from gpu_gpt2.device.base import Device
from gpu_gpt2.device.host import HostDevice
from gpu_gpt2.ops.interface import Ops
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.ops.reference import ReferenceOps


def ops_for(device: Device, dtype: str) -> Ops:
    """NumPy on the CPU, kernels elsewhere."""
    if type(device) is HostDevice:
        return ReferenceOps(device)
    return KernelOps(device, dtype)
