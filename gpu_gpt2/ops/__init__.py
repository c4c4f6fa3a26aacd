"""Chooses the implementation of the ops that a device runs."""

from __future__ import annotations

from gpu_gpt2.device.base import Device
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import Ops


def ops_for(device: Device, dtype: str) -> Ops:
    """Returns the NumPy ops for the CPU and kernel launches for every other device."""
    if type(device) is CpuDevice:
        return ReferenceOps(device)
    return KernelOps(device, dtype)
