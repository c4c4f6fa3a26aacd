"""The compiler's address and undefined behaviour sanitizers find nothing in any kernel.

A sanitizer ends the process at its first finding, so that the cases run in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpu_gpt2.device.emulator import sanitizer_environment

CHECK = """
import sys
from gpu_gpt2.ops.cases import CASES
from gpu_gpt2.tools.check import run_checks
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.ops.kernels import KernelOps

cases = [
    case
    for case in CASES
    if case.sizes.get("D", 64) in (33, 64) and max(case.sizes.values()) <= 1200
]
device = EmulatorDevice(sanitize=True)
results = list(run_checks(lambda x: KernelOps(device, x), [sys.argv[1]], cases))
print(*(r for r in results if not r.passed), f"{len(results)} outputs checked", sep="\\n")
sys.exit(not all(r.passed for r in results))
"""


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sanitizers_find_nothing_in_the_small_cases_of_all_ops(dtype: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHECK, dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **sanitizer_environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "outputs checked" in result.stdout
