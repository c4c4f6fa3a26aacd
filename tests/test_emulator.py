"""The emulator computes the results of a GPU, reports each planted fault, and reports nothing else.

The kernels are in faults/. They are correct when they are built with FAULT=0, and have a fault when
they are built with FAULT=1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from gpu_gpt2.device import source
from gpu_gpt2.device.emulator import EmulatorDevice, build, device, sanitizer_environment
from gpu_gpt2.device.emulator.device import Order
from gpu_gpt2.device.emulator.elf import read_image
from gpu_gpt2.device.launch import pointer_dtype
from gpu_gpt2.device.source import kernel_source
from gpu_gpt2.errors import DeviceError, KernelError

pytestmark = pytest.mark.emulator

FAULTS: Final = Path(__file__).parent / "faults"
ORDERS: Final[tuple[Order, ...]] = ("ascending", "descending", "random")
F32: Final = np.float32
BF16: Final = ml_dtypes.bfloat16
I32: Final = np.int32


@pytest.fixture(autouse=True)
def _planted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are read from faults/ instead of the package's folder."""
    monkeypatch.setattr(source, "kernels_dir", lambda: FAULTS)


@pytest.fixture(scope="module")
def emulator() -> EmulatorDevice:
    return EmulatorDevice()


PLANTED_FILES: Final = ("barriers.cu", "bounds.cu", "races.cu", "values.cu")


class Planted(NamedTuple):
    """A kernel of faults/, with the launch and the report that the comment above it states."""

    file: str
    kernel: str
    grid: int
    block: int
    shared_bytes: int
    report: str  # with file:line for the words HERE and THERE


def planted_in(file: str) -> list[Planted]:
    """Reads the kernels of a file and the comments above them."""
    text = (FAULTS / file).read_text()
    comments = re.findall(
        r'// <<<(\d+), (\d+)(?:, (\d+))?>>> (.*?)\nextern "C" __global__ void (\w+)',
        text,
        re.DOTALL,
    )
    planted = []
    for grid, block, shared_bytes, comment, kernel in comments:
        report = comment.replace("\n// ", " ")
        for number, line in enumerate(text.splitlines(), 1):
            if mark := re.search(rf"// (here|there): {kernel}$", line):
                report = re.sub(rf"\b{mark[1].upper()}\b", f"{file}:{number}", report)
        planted.append(Planted(file, kernel, int(grid), int(block), int(shared_bytes or 0), report))
    return planted


PLANTED: Final = [planted for file in PLANTED_FILES for planted in planted_in(file)]
every_planted = pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.kernel)


def integers(on: EmulatorDevice, n: int, dtype: Any = F32) -> Any:
    """The integers 1 to n, exact in every dtype used here (in bfloat16 up to n = 256)."""
    array = on.empty((n,), dtype)
    on.upload(array, np.arange(1, n + 1).astype(dtype))
    return array


def run_planted(on: EmulatorDevice, planted: Planted, fault: int) -> list[Any]:
    """Launches a kernel of faults/ and returns its arrays, which have one element per thread.

    Inputs hold 1, 2, 3 ...; integer outputs start as zeros, others as `empty` returns them.
    """
    kernels = kernel_source(planted.file, "fp32", FAULT=fault)
    n = planted.grid * planted.block
    arrays: list[Any] = []
    for parameter in kernels.parameters(planted.kernel):
        dtype = pointer_dtype(parameter, kernels)
        if parameter.const or parameter.name == "z_in_out":
            arrays.append(integers(on, n, dtype))
        elif dtype == I32:
            arrays.append(on.zeros((n,), dtype))
        else:
            arrays.append(on.empty((n,), dtype))
    on.launch(
        kernels,
        planted.kernel,
        (planted.grid,),
        (planted.block,),
        tuple(arrays),
        planted.shared_bytes,
    )
    return arrays


def test_every_kernel_of_the_fault_files_states_its_fault() -> None:
    for file in PLANTED_FILES:
        kernels = kernel_source(file, "fp32").signatures
        assert set(kernels) == {planted.kernel for planted in PLANTED if planted.file == file}


@every_planted
def test_a_kernel_with_a_planted_fault_is_reported(
    emulator: EmulatorDevice, monkeypatch: pytest.MonkeyPatch, planted: Planted
) -> None:
    monkeypatch.setattr(device, "ACCESS_LIMIT", 100_000)
    with pytest.raises(KernelError) as caught:
        run_planted(emulator, planted, fault=1)
    assert str(caught.value).startswith(f"{planted.kernel} ")
    assert planted.report in str(caught.value)


@every_planted
@pytest.mark.parametrize("order", ORDERS)
def test_a_kernel_without_its_fault_is_not_reported(order: Order, planted: Planted) -> None:
    arrays = run_planted(EmulatorDevice(order), planted, fault=0)
    assert all(np.isfinite(array.astype(F32)).any() for array in arrays)


def test_a_reported_launch_leaves_the_arrays_unchanged(emulator: EmulatorDevice) -> None:
    kernels = kernel_source("bounds.cu", "fp32", FAULT=1)
    y, x = emulator.zeros((64,), F32), integers(emulator, 64)
    with pytest.raises(KernelError):
        emulator.launch(kernels, "read_past_end", (2,), (32,), (y, x))
    assert not y.any()


# --- correct kernels ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 33), (32, 32), (65, 31)])
def test_a_transpose_through_shared_memory_is_exact(order: Order, n: int, m: int) -> None:
    on = EmulatorDevice(order, seed=3)
    y, x = on.empty((m, n), F32), integers(on, n * m).reshape(n, m)
    grid = (-(-m // 32), -(-n // 32))
    on.launch(kernel_source("right.cu", "fp32"), "transpose", grid, (32, 32), (y, x, n, m))
    np.testing.assert_array_equal(y, x.T)


@pytest.mark.parametrize("block", [32, 96, 1024])
def test_a_sum_has_the_same_bits_in_every_order(block: int) -> None:
    x = np.random.default_rng(0).normal(size=5000).astype(F32)
    sums = []
    for order in ORDERS:
        on = EmulatorDevice(order, seed=7)
        y = on.empty((1,), F32)
        args = (y, x, x.size, 0.5)
        total = kernel_source("right.cu", "fp32")
        on.launch(total, "total", (1,), (block,), args, shared_bytes=block // 8)
        sums.append(y.tobytes())
    np.testing.assert_allclose(y[0], 0.5 * x.sum(dtype=np.float64), rtol=1e-5)
    assert sums[0] == sums[1] == sums[2]


def test_threads_run_in_the_order_asked_for() -> None:
    def rank(on: EmulatorDevice) -> list[int]:
        counter, ranks = on.zeros((1,), I32), on.empty((3 * 64,), I32)
        kernel = kernel_source("right.cu", "fp32")
        on.launch(kernel, "order_of_threads", (3,), (64,), (counter, ranks))
        return [int(value) for value in ranks]

    ascending = list(range(3 * 64))
    assert rank(EmulatorDevice("ascending")) == ascending
    assert rank(EmulatorDevice("descending")) == ascending[::-1]
    shuffled = rank(EmulatorDevice("random", seed=1))
    assert shuffled not in (ascending, ascending[::-1])
    assert sorted(shuffled) == ascending
    assert shuffled == rank(EmulatorDevice("random", seed=1))
    assert shuffled != rank(EmulatorDevice("random", seed=2))


def test_the_poison_pattern_written_by_a_kernel_counts_as_written(emulator: EmulatorDevice) -> None:
    y = emulator.empty((32,), F32)
    emulator.launch(kernel_source("right.cu", "fp32"), "write_poison", (1,), (32,), (y,))
    assert np.isnan(y[1:]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_write_halves_of_one_word_do_not_race(order: Order) -> None:
    on = EmulatorDevice(order)
    y, x = on.empty((64,), BF16), integers(on, 64, BF16)
    on.launch(kernel_source("right.cu", "bf16"), "reverse_halves", (1,), (64,), (y, x))
    np.testing.assert_array_equal(y, x[::-1])


def test_overlapping_arguments_share_their_memory_during_a_launch(emulator: EmulatorDevice) -> None:
    right = kernel_source("right.cu", "fp32")
    x = integers(emulator, 64)
    emulator.launch(right, "add", (2,), (32,), (x, x))
    np.testing.assert_array_equal(x, 2 * np.arange(1, 65))
    arena = integers(emulator, 96)
    emulator.launch(right, "add", (1,), (32,), (arena[:64], arena[32:]))
    np.testing.assert_array_equal(arena[:32], 2 * np.arange(1, 33) + 32)
    np.testing.assert_array_equal(arena[32:], np.arange(33, 97))
    with pytest.raises(KernelError, match=r"race on"):
        emulator.launch(right, "add", (2,), (32,), (arena[:64], arena[32:]))


def test_an_index_into_the_next_array_of_an_arena_is_out_of_bounds(
    emulator: EmulatorDevice,
) -> None:
    arena = integers(emulator, 128)
    kernels = kernel_source("bounds.cu", "fp32", FAULT=1)
    with pytest.raises(KernelError, match=r"reads x\[64\] out of bounds \(x has 64 elements"):
        emulator.launch(kernels, "read_past_end", (2,), (32,), (arena[64:], arena[:64]))


def test_a_view_keeps_the_alignment_of_its_address(emulator: EmulatorDevice) -> None:
    arena = integers(emulator, 96)
    right = kernel_source("bounds.cu", "fp32", FAULT=0)
    y = emulator.empty((32,), F32)
    emulator.launch(right, "misaligned", (1,), (32,), (y, arena[4:]))
    with pytest.raises(KernelError, match=r"x\[0\], an address that is not a multiple of 16"):
        emulator.launch(right, "misaligned", (1,), (32,), (y, arena[2:]))


def test_warp_collectives_return_what_cuda_defines(emulator: EmulatorDevice) -> None:
    out = emulator.empty((11, 32), I32)
    emulator.launch(kernel_source("right.cu", "fp32"), "exchanges", (1,), (32,), (out,))
    lanes = np.arange(32)
    thirds = sum(1 << lane for lane in range(0, 32, 3))
    expected = [
        np.full(32, 5),
        lanes // 8 * 8 + (lanes + 1) % 8,
        np.where(lanes >= 3, lanes - 3, lanes),
        np.where(lanes % 8 >= 3, lanes - 3, lanes),
        np.where(lanes + 3 < 32, lanes + 3, lanes),
        np.where(lanes % 8 + 3 < 8, lanes + 3, lanes),
        lanes ^ 9,
        np.full(32, thirds).astype(np.uint32).view(I32),
        np.full(32, 1),
        np.full(32, 0),
        lanes ^ 1,
    ]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_atomic_sums_of_integers_are_exact_in_every_order(order: Order) -> None:
    on = EmulatorDevice(order)
    counts = on.zeros((2,), I32)
    right = kernel_source("right.cu", "fp32")
    on.launch(right, "count", (3,), (32,), (counts, integers(on, 77, I32), 77))
    assert counts.tolist() == [38, 39]


def test_arithmetic_functions_return_what_cuda_defines(emulator: EmulatorDevice) -> None:
    out = emulator.empty((6,), I32)
    a, b = [-128, 5, 127, -1], [-128, -7, 127, 3]
    x = np.array([a, b], np.int8).view(I32).reshape(2)
    x = np.append(x, I32(1000))
    # The product is rounded to 1, so the sum is 0; a fused multiply-add would give 2^-36.
    z = np.array([1 + 2**-12, 1 - 2**-12 + 2**-24, -1, 2.5], F32)
    emulator.launch(kernel_source("right.cu", "fp32"), "arithmetic", (1,), (1,), (out, x, z))
    wide = int(x[0].view(np.uint32)) << 32 | int(x[1].view(np.uint32))
    upper = np.array([wide * wide >> 96, wide * wide >> 64 & 0xFFFFFFFF], np.uint32).view(I32)
    expected_sum = (z[0] * z[1] + z[2]).view(I32)
    dot = 1000 + 128 * 128 - 35 + 127 * 127 - 3
    assert out.tolist() == [dot, *upper, expected_sum, 2, 3]


# --- the device ---


@pytest.mark.parametrize("dtype", [F32, BF16, I32, np.uint8])
def test_empty_arrays_are_aligned_and_hold_nan_or_large_integers(
    emulator: EmulatorDevice, dtype: Any
) -> None:
    array = emulator.empty((3, 5), dtype)
    assert array.ctypes.data % 256 == 0
    assert array.shape == (3, 5)
    if array.dtype in (F32, BF16):
        assert np.isnan(array.astype(F32)).all()
    else:
        assert (array != 0).all()
    assert not emulator.zeros((3, 5), dtype).any()
    assert emulator.empty((0, 5), dtype).shape == (0, 5)


@pytest.mark.parametrize(("fault", "line"), [(0, 5), (1, 7)])
def test_a_compile_error_names_file_and_line(
    emulator: EmulatorDevice, fault: int, line: int
) -> None:
    y = emulator.empty((32,), F32)
    broken = kernel_source("broken.cu", "fp32", FAULT=fault)
    report = rf"broken\.cu does not compile:\n(.|\n)*broken\.cu:{line}:\d+: error"
    with pytest.raises(KernelError, match=report):
        emulator.launch(broken, "broken", (1,), (32,), (y,))


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        EmulatorDevice()
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(DeviceError, match=r"\$CXX is 'no-such-compiler -v', which is not there"):
        EmulatorDevice()


def test_a_cache_folder_that_cannot_be_made_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"cannot make the folder .*set XDG_CACHE_HOME"):
        EmulatorDevice()


def test_kernels_and_runtime_are_built_once_for_the_same_text_and_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands: list[tuple[Any, ...]] = []
    run = build.Compiler.run

    def recorded(self: build.Compiler, *arguments: Any, text: str = "") -> Any:
        commands.append(arguments)
        return run(self, *arguments, text=text)

    monkeypatch.setattr(build.Compiler, "run", recorded)

    def built(order: Order, fault: int) -> int:
        commands.clear()
        run_planted(EmulatorDevice(order), PLANTED[0], fault)
        return len([arguments for arguments in commands if arguments != ("--version",)])

    assert built("ascending", 0) == 3  # the runtime; the kernels compiled, and linked
    assert built("descending", 0) == 0
    monkeypatch.setattr(build, "KERNEL_FLAGS", (*build.KERNEL_FLAGS, "-DANYTHING"))
    assert built("ascending", 0) == 2
    names = sorted(path.name for path in (tmp_path / "gpu-gpt2" / "emulator").iterdir())
    assert [name.split("-")[0] for name in names] == ["barriers", "barriers", "runtime"]


def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(DeviceError, match=r"this is linux on riscv64; use --device cpu"):
        EmulatorDevice()


def test_without_a_home_folder_the_cache_must_be_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DeviceError, match="set XDG_CACHE_HOME to one"):
        EmulatorDevice()


@pytest.fixture
def _failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """$CXX knows its version and prints names of files as they are, but compiles nothing."""
    compiler = tmp_path / "failing-c++"
    compiler.write_text(
        """#!/bin/sh
case $1 in
    --version) echo failing-c++ 1.0 ;;
    -print-file-name=*) echo "${1#*=}" ;;
    *) echo "internal compiler error" >&2; exit 1 ;;
esac
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("_failing_compiler")
def test_a_compiler_that_cannot_build_the_runtime_is_an_error() -> None:
    with pytest.raises(
        DeviceError, match=r"failing-c\+\+ cannot build the emulator: internal comp"
    ):
        EmulatorDevice()


@pytest.mark.usefixtures("_failing_compiler")
def test_a_compiler_without_sanitizers_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"failing-c\+\+ has no libasan\.so; set CXX to g\+\+"):
        sanitizer_environment()


def test_without_addr2line_reports_lack_the_line_but_not_the_fault(
    emulator: EmulatorDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planted = next(planted for planted in PLANTED if planted.kernel == "read_past_end")
    with pytest.raises(KernelError, match=r"out of bounds .* at bounds\.cu:\d+"):
        run_planted(emulator, planted, fault=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="out of bounds") as caught:
        run_planted(emulator, planted, fault=1)
    assert "bounds.cu" not in str(caught.value)


def test_a_file_that_is_no_shared_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(ValueError, match=r"text\.so is not a 64-bit little-endian ELF file"):
        read_image(tmp_path / "text.so")


# --- the compiler's sanitizers ---

SANITIZED: Final = """
import sys
from pathlib import Path

import numpy as np

from gpu_gpt2.device import source
from gpu_gpt2.device.emulator import EmulatorDevice

source.kernels_dir = lambda: Path(sys.argv[1])
on = EmulatorDevice(sanitize=True)
y, z, x = on.empty((32,), np.float32), on.empty((32,), np.int32), on.zeros((32,), np.float32)
kernel = source.kernel_source("sanitizers.cu", "fp32", FAULT=int(sys.argv[2]))
on.launch(kernel, "sanitized", (1,), (32,), (y, z, x, 1))
print("sum", y.sum())
"""


def run_sanitized(fault: int, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(FAULTS), str(fault)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (1, r"sanitizers\.cu:\d+:\d+: runtime error: index 4 out of bounds for type 'float \[4\]'"),
        (2, r"stack-buffer-overflow|insufficient space for an object of type 'float'"),
        (3, r"heap-buffer-overflow"),
        (4, r"sanitizers\.cu:\d+:\d+: runtime error: signed integer overflow"),
        (5, r"sanitizers\.cu:\d+:\d+: runtime error: (left shift|shift exponent)"),
        (6, r"global-buffer-overflow|insufficient space for an object of type 'float'"),
    ],
    ids=["index", "local", "array", "sum", "shift", "shared"],
)
def test_a_fault_found_by_the_sanitizers_ends_the_process(fault: int, report: str) -> None:
    result = run_sanitized(fault, sanitizer_environment())
    assert result.returncode != 0
    assert "sum" not in result.stdout
    assert re.search(report, result.stderr)


def test_the_sanitizers_are_silent_without_a_fault() -> None:
    result = run_sanitized(0, sanitizer_environment())
    assert result.stderr == ""
    assert result.stdout == "sum 80.0\n"


def test_unwritten_shared_memory_is_nan_under_the_sanitizers() -> None:
    assert run_sanitized(7, sanitizer_environment()).stdout == "sum nan\n"


def test_the_sanitizers_need_their_environment() -> None:
    result = run_sanitized(0, {})
    assert "DeviceError: AddressSanitizer must be loaded before Python starts" in result.stderr
