"""The emulator: it computes what a GPU would, and reports each planted fault and nothing else.

The kernels are in faults/: right when built with FAULT=0, wrong with FAULT=1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from gpu_gpt2.device import source
from gpu_gpt2.device.emulator import EmulatorDevice, build, device, sanitizer_environment
from gpu_gpt2.device.emulator.device import Order
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
def _planted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernel files come from faults/ instead of the package."""
    monkeypatch.setattr(source, "kernels_dir", lambda: FAULTS)
    _forget_texts()
    yield
    _forget_texts()


def _forget_texts() -> None:
    source._joined_text.cache_clear()
    source._signatures.cache_clear()


@pytest.fixture(scope="module")
def emulator() -> EmulatorDevice:
    return EmulatorDevice()


PLANTED_FILES: Final = ("barriers.cu", "bounds.cu", "races.cu", "values.cu")


class Planted(NamedTuple):
    """A kernel of faults/ and the comment above it: how to launch it and what must be reported."""

    file: str
    kernel: str
    grid: int
    block: int
    shared_bytes: int
    report: str  # with file:line for the words HERE and THERE


def planted_in(file: str) -> list[Planted]:
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


def numbers(on: EmulatorDevice, n: int, dtype: Any = F32) -> Any:
    """n whole numbers from 1 on, exact in every dtype used here (n <= 256 in bfloat16)."""
    array = on.empty((n,), dtype)
    on.upload(array, np.arange(1, n + 1).astype(dtype))
    return array


def run_planted(on: EmulatorDevice, planted: Planted, fault: int) -> list[Any]:
    """Launches a kernel of faults/ and returns its arrays, which have one element per thread.

    Inputs hold 1, 2, 3 ...; outputs of whole numbers start as zeros, others as `empty` makes them.
    """
    kernels = kernel_source(planted.file, "fp32", FAULT=fault)
    n = planted.grid * planted.block
    arrays: list[Any] = []
    for parameter in kernels.parameters(planted.kernel):
        dtype = pointer_dtype(parameter, kernels)
        if parameter.const or parameter.name == "z_in_out":
            arrays.append(numbers(on, n, dtype))
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


def test_every_kernel_has_a_planted_fault() -> None:
    for file in PLANTED_FILES:
        kernels = kernel_source(file, "fp32").signatures
        assert set(kernels) == {planted.kernel for planted in PLANTED if planted.file == file}


@every_planted
def test_reports_the_planted_fault(
    emulator: EmulatorDevice, monkeypatch: pytest.MonkeyPatch, planted: Planted
) -> None:
    monkeypatch.setattr(device, "ACCESS_LIMIT", 100_000)
    with pytest.raises(KernelError) as caught:
        run_planted(emulator, planted, fault=1)
    assert str(caught.value).startswith(f"{planted.kernel} ")
    assert planted.report in str(caught.value)


@every_planted
@pytest.mark.parametrize("order", ORDERS)
def test_is_silent_without_the_fault(order: Order, planted: Planted) -> None:
    arrays = run_planted(EmulatorDevice(order), planted, fault=0)
    assert all(np.isfinite(array.astype(F32)).any() for array in arrays)


def test_the_arrays_keep_their_contents_after_a_report(emulator: EmulatorDevice) -> None:
    kernels = kernel_source("bounds.cu", "fp32", FAULT=1)
    y, x = emulator.zeros((64,), F32), numbers(emulator, 64)
    with pytest.raises(KernelError):
        emulator.launch(kernels, "read_past_end", (2,), (32,), (y, x))
    assert not y.any()


# --- correct kernels ---


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 33), (32, 32), (65, 31)])
def test_transpose(order: Order, n: int, m: int) -> None:
    on = EmulatorDevice(order, seed=3)
    y, x = on.empty((m, n), F32), numbers(on, n * m).reshape(n, m)
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


def test_the_orders_differ() -> None:
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


def test_what_a_kernel_wrote_is_not_taken_for_unwritten(emulator: EmulatorDevice) -> None:
    y = emulator.empty((32,), F32)
    emulator.launch(kernel_source("right.cu", "fp32"), "write_poison", (1,), (32,), (y,))
    assert np.isnan(y[1:]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_share_a_word_do_not_race(order: Order) -> None:
    on = EmulatorDevice(order)
    y, x = on.empty((64,), BF16), numbers(on, 64, BF16)
    on.launch(kernel_source("right.cu", "bf16"), "reverse_halves", (1,), (64,), (y, x))
    np.testing.assert_array_equal(y, x[::-1])


def test_overlapping_arrays_stay_one_memory(emulator: EmulatorDevice) -> None:
    right = kernel_source("right.cu", "fp32")
    x = numbers(emulator, 64)
    emulator.launch(right, "add", (2,), (32,), (x, x))
    np.testing.assert_array_equal(x, 2 * np.arange(1, 65))
    arena = numbers(emulator, 96)
    emulator.launch(right, "add", (1,), (32,), (arena[:64], arena[32:]))
    np.testing.assert_array_equal(arena[:32], 2 * np.arange(1, 33) + 32)
    np.testing.assert_array_equal(arena[32:], np.arange(33, 97))
    with pytest.raises(KernelError, match=r"race on"):
        emulator.launch(right, "add", (2,), (32,), (arena[:64], arena[32:]))


def test_an_index_into_the_next_array_of_an_arena_is_out_of_bounds(
    emulator: EmulatorDevice,
) -> None:
    arena = numbers(emulator, 128)
    kernels = kernel_source("bounds.cu", "fp32", FAULT=1)
    with pytest.raises(KernelError, match=r"reads x\[64\] out of bounds \(x has 64 elements"):
        emulator.launch(kernels, "read_past_end", (2,), (32,), (arena[64:], arena[:64]))


def test_the_place_of_a_view_is_kept(emulator: EmulatorDevice) -> None:
    arena = numbers(emulator, 96)
    right = kernel_source("bounds.cu", "fp32", FAULT=0)
    y = emulator.empty((32,), F32)
    emulator.launch(right, "misaligned", (1,), (32,), (y, arena[4:]))
    with pytest.raises(KernelError, match=r"x\[0\], an address that is not a multiple of 16"):
        emulator.launch(right, "misaligned", (1,), (32,), (y, arena[2:]))


def test_exchanges_within_a_warp(emulator: EmulatorDevice) -> None:
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
def test_atomic_sums_of_whole_numbers(order: Order) -> None:
    on = EmulatorDevice(order)
    counts = on.zeros((2,), I32)
    right = kernel_source("right.cu", "fp32")
    on.launch(right, "count", (3,), (32,), (counts, numbers(on, 77, I32), 77))
    assert counts.tolist() == [38, 39]


# --- the device ---


@pytest.mark.parametrize("dtype", [F32, BF16, I32, np.uint8])
def test_new_arrays_are_aligned_and_poisoned(emulator: EmulatorDevice, dtype: Any) -> None:
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


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        EmulatorDevice()
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(DeviceError, match=r"\$CXX is 'no-such-compiler -v', which is not there"):
        EmulatorDevice()


def test_an_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DeviceError, match=r"cannot make the folder .*set XDG_CACHE_HOME"):
        EmulatorDevice()


def test_kernels_are_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
def test_the_sanitizers_end_the_process(fault: int, report: str) -> None:
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
