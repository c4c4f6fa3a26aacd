"""Train GPT-2 and Llama with CUDA C kernels you can read."""

import os

__version__ = "0.1.0"

# OpenBLAS lets its threads spin for a while after each matmul, on cores that our own threads
# need by then. It reads this variable (2^n cycles of spinning) when NumPy is first imported.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
