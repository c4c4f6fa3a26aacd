"""Selects tests by the devices that they need, and counts them by device at the end of a run.

`pytest` runs the tests that need no GPU. `pytest -m gpu` runs the others, and stops with an error
if there is no GPU, so that nobody takes skipped tests for passed ones.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_gpt2.cli.app import main
from gpu_gpt2.device import source
from gpu_gpt2.device.cuda import gpu_count
from gpu_gpt2.errors import DeviceError

DEVICES = ("cpu", "emulator", "cuda")


@pytest.fixture
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the test's kernels are read, with the headers of kernels/ in it."""
    for header in source.kernels_dir().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(source, "kernels_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs gpu-gpt2 in an empty folder as a user would, with its own cache.

    It takes the words of the command line, and returns the exit status, the output and the errors.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu-gpt2", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


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
    """The device of a test by its mark or its parameter `device`; "cpu" if it has neither."""
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
    ran = Counter(
        value for report in reports for name, value in report.user_properties if name == "device"
    )
    counts = ", ".join(f"{device} {ran[device]}" for device in DEVICES)
    terminalreporter.write_line(f"tests run by device: {counts}")
