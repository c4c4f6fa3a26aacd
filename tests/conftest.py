"""Which tests run on which device, and the reports at the end of a run.

`pytest` runs what needs no GPU. `pytest -m gpu` runs the tests of the kernels on a GPU, and stops
at once where there is none: a check that was asked for must not be skipped in silence.
"""

from __future__ import annotations

from collections import Counter

import pytest

from gpu_gpt2.device.cuda import gpu_count
from gpu_gpt2.errors import DeviceError

DEVICES = ("cpu", "emulator", "cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.markexpr:
        needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)
    for item in items:
        item.user_properties.append(("device", _device(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("gpu") for item in session.items):
        try:
            gpu_count()
        except DeviceError as error:
            raise pytest.UsageError(f"tests marked gpu cannot run: {error}") from None


def _device(item: pytest.Item) -> str:
    """Where a test runs its kernels, or "cpu": its mark, or its parameter `device`."""
    if item.get_closest_marker("gpu"):
        return "cuda"
    if item.get_closest_marker("emulator"):
        return "emulator"
    parameters = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    device = parameters.get("device")
    return device if device in DEVICES else "cpu"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    kernels = [
        value for report in reports for name, value in report.user_properties if name == "kernel"
    ]
    if kernels:
        terminalreporter.section("registers and memory of each kernel (ptxas)")
        for line in sorted(kernels):
            terminalreporter.write_line(line)
    ran = Counter(
        value for report in reports for name, value in report.user_properties if name == "device"
    )
    counts = ", ".join(f"{device} {ran[device]}" for device in DEVICES)
    terminalreporter.write_line(f"tests run by device: {counts}")
