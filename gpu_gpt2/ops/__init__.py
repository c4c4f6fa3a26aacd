"""Chooses the implementation of the ops that a device runs."""

from __future__ import annotations

from gpu_gpt2.device.base import Device
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import Ops


def ops_for(device: Device, dtype: str) -> Ops:
    """Returns kernel launches for a device that runs kernels, else the NumPy ops, in float32."""
    return KernelOps(device, dtype) if device.runs_kernels else ReferenceOps(device)
