"""Every op's small cases on the GPU, for compute-sanitizer to look at; see .ci/gpu.

CuPy's pool is left out: each array is an allocation of its own, for inside the pool's memory an
access beyond an array looks like any other. Products are left out too: cuBLAS is not ours to judge.
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
