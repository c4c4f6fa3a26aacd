"""Train GPT-2 with CUDA C kernels you can read."""

__version__ = "0.1.0"
