"""Runs the small cases of every op on the GPU, under compute-sanitizer: see .ci/gpu.

CuPy's memory pool is switched off, so that each array is an allocation of its own: otherwise
compute-sanitizer cannot see an access that leaves an array but stays inside the pool's memory.
Matmuls are left out, because they run in cuBLAS and not in kernels of ours.
"""

from __future__ import annotations

import sys

import cupy

from gpu_gpt2.device.cuda import CudaDevice
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.ops.cases import CASES
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.tools.check import run_checks

cupy.cuda.set_allocator(None)
device = CudaDevice()
cases = [case for case in CASES if case.op != "matmul"]
results = list(run_checks(lambda dtype: KernelOps(device, dtype), DTYPES, cases))
failed = [result for result in results if not result.passed]
print(*failed, f"{len(results)} outputs checked", sep="\n")
sys.exit(bool(failed))
