"""Every op on one device, measured against NumPy in float64: cases.py, and measure.py for how."""

from gpu_gpt2.check.cases import CASES, LARGE_CASES, Case
from gpu_gpt2.check.measure import CheckResult, run_case, run_checks, table

__all__ = [
    "CASES",
    "LARGE_CASES",
    "Case",
    "CheckResult",
    "run_case",
    "run_checks",
    "table",
]
