"""`gpu-gpt2 info` lists what is on a machine, and advises on what is missing or in conflict."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_gpt2.device.cuda import NOT_USABLE
from gpu_gpt2.errors import DeviceError
from gpu_gpt2.tools import info


def raise_device_error(*args: object) -> None:
    raise DeviceError("it is not there; install it")


def test_a_machine_without_gpu_compiler_and_cupy_gets_advice_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("Compiler", "cuda_versions", "gpu_count"):
        monkeypatch.setattr(info, name, raise_device_error)
    rows, advice = info.report()
    assert {("CuPy", "not installed"), ("GPU", "none"), ("emulator", "not usable")} <= set(rows)
    assert advice == [
        "it is not there; install it",
        "it is not there; install it; without a GPU training runs on the CPU",
        "it is not there; install it",
    ]


def test_each_gpu_has_a_row_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        product_name = "Some GPU"
        compute_capability = 90

        def __init__(self, index: int) -> None:
            self.memory = ((index + 1) << 30, 80 << 30)

    monkeypatch.setattr(info, "gpu_count", lambda: 2)
    monkeypatch.setattr(info, "CudaDevice", Gpu)
    rows = dict(info.report()[0])
    assert rows["GPU 0"] == "Some GPU, compute capability 9.0, 1.0 of 80.0 GiB free"
    assert rows["GPU 1"] == "Some GPU, compute capability 9.0, 2.0 of 80.0 GiB free"


def test_two_packages_of_cupy_are_said_to_be_in_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.importlib.metadata, "version", lambda name: "14.2")
    (advice,) = (line for line in info.report()[1] if "cupy" in line)
    assert "cupy-cuda12x and cupy-cuda13x overwrite each other: pip uninstall all" in advice


def test_libraries_that_cannot_be_opened_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"CuPy": "14.2", "NVRTC": NOT_USABLE, "cuBLAS": f"{NOT_USABLE}: no such file"}
    monkeypatch.setattr(info, "cuda_versions", lambda: versions)
    text = "\n".join(info.report()[1])
    assert "NVRTC cannot be opened: pip install nvidia-cuda-nvrtc" in text
    assert "cuBLAS cannot be opened: pip install nvidia-cublas" in text


def test_where_processes_do_not_list_their_libraries_none_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_text = Path.read_text

    def no_maps(self: Path, *args: str, **kwargs: str) -> str:
        if self == Path("/proc/self/maps"):
            raise FileNotFoundError(self)
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", no_maps)
    assert not [name for name, _ in info.report()[0] if name.strip().startswith("lib")]
