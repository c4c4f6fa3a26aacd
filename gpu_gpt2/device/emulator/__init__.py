"""Runs the CUDA C of kernels/ without a GPU and reports what hardware would not forgive."""

from gpu_gpt2.device.emulator.device import EmulatorDevice, sanitizer_environment

__all__ = ["EmulatorDevice", "sanitizer_environment"]
