"""A launch whose arguments do not fit its kernel, or an op its tensors, is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import make_ops

from gpu_gpt2.device import source as source_module
from gpu_gpt2.device.base import BFLOAT16, FLOAT32, INT32
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.emulator import EmulatorDevice
from gpu_gpt2.device.source import kernel_files, kernel_source
from gpu_gpt2.errors import ConfigError, LaunchError
from gpu_gpt2.ops import kernels
from gpu_gpt2.ops.kernels import KernelOps, attention_decode_defines, attention_defines
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import Ops

EMBEDDING = kernel_source("embedding.cu", "fp32")
SOFTMAX = kernel_source("softmax.cu", "fp32")
ADAMW = kernel_source("adamw.cu", "fp32")


@pytest.fixture(scope="module")
def device() -> EmulatorDevice:
    return EmulatorDevice()


def _floats(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def _softmax(*args: Any, grid: tuple[int, ...] = (1,), block: tuple[int, ...] = (32,)) -> Any:
    return SOFTMAX, "softmax_fwd", grid, block, args


def _wte(**changed: Any) -> Any:
    tokens = np.zeros(4, np.int32)
    args = {"dwte": _floats(4, 8), "dx": _floats(4, 8), "tokens": tokens, "order": tokens}
    args |= {"N": 4, "C": 8}
    return EMBEDDING, "embedding_bwd_wte", (4, 1), (32,), tuple((args | changed).values())


def _adamw(n: Any = 8, eps: Any = 0.1) -> Any:
    args = (*(_floats(8) for _ in range(5)), _floats(5), n, 0, 0.1, 0.1, eps, 0.1)
    return ADAMW, "adamw", (1,), (32,), args


REFUSALS: dict[str, tuple[Any, str]] = {
    "too few arguments": (
        _softmax(_floats(8), _floats(8)),
        "softmax_fwd: 2 arguments for 3 parameters (floatX* y, const floatX* x, int V)",
    ),
    "too many arguments": (
        _softmax(_floats(8), _floats(8), 8, 8),
        "softmax_fwd: 4 arguments for 3",
    ),
    "dtype": (
        _softmax(_floats(8), np.zeros(8, np.float64), 8),
        "softmax_fwd: const floatX* x: expected dtype float32, got float64",
    ),
    "activations of the other dtype": (
        _softmax(np.zeros(8, BFLOAT16), _floats(8), 8),
        "floatX* y: expected dtype float32, got bfloat16",
    ),
    "whole numbers of the wrong size": (
        _wte(tokens=np.zeros(4, np.int64)),
        "const int* tokens: expected dtype int32, got int64",
    ),
    "strided view": (
        _softmax(_floats(8), _floats(8, 2)[:, 0], 8),
        "shape (8,) is a strided view; pass a C-contiguous array",
    ),
    "number for an array": (_softmax(_floats(8), 1.5, 8), "expected an array, got float 1.5"),
    "numpy number for an array": (
        _softmax(_floats(8), np.float32(1.5), 8),
        "expected an array, got float32 np.float32(1.5)",
    ),
    "nothing for an array": (_softmax(_floats(8), None, 8), "expected an array, got NoneType None"),
    "array for a number": (
        _softmax(_floats(8), _floats(8), np.array([8])),
        "int V: expected a number, got an array of shape (1,)",
    ),
    "fraction for a whole number": (
        _wte(N=4.0),
        "int N: expected a whole number, got float 4.0",
    ),
    "bool for a whole number": (_wte(N=True), "int N: expected a whole number, got a bool"),
    "bool for a number": (_adamw(eps=True), "float eps: expected a number, got bool True"),
    "text for a number": (_adamw(eps="0.1"), "float eps: expected a number, got str '0.1'"),
    "too large for int": (_wte(N=2**31), "int N: 2147483648 does not fit into int"),
    "too small for int": (_wte(C=-(2**31) - 1), "int C: -2147483649 does not fit into int"),
    "too large for long long": (
        _adamw(n=2**63),
        "long long n: 9223372036854775808 does not fit into long long",
    ),
    "no grid": (_softmax(_floats(8), _floats(8), 8, grid=()), "grid () must have 1 to 3 sizes"),
    "four dimensions": (
        _softmax(_floats(8), _floats(8), 8, grid=(1, 1, 1, 1)),
        "grid (1, 1, 1, 1) must have 1 to 3 sizes",
    ),
    "empty grid": (
        _softmax(_floats(8), _floats(8), 8, grid=(0,)),
        "grid (0,): each size must be 1 to (2147483647,)",
    ),
    "grid too high": (
        _softmax(_floats(8), _floats(8), 8, grid=(1, 65536)),
        "grid (1, 65536): each size must be 1 to (2147483647, 65535)",
    ),
    "block too deep": (
        _softmax(_floats(8), _floats(8), 8, block=(1, 1, 65)),
        "block (1, 1, 65): each size must be 1 to (1024, 1024, 64)",
    ),
    "too many threads": (
        _softmax(_floats(8), _floats(8), 8, block=(64, 32)),
        "2048 threads a block; at most 1024",
    ),
    "unknown kernel": (
        (SOFTMAX, "softmax_backward", (1,), (32,), ()),
        "softmax.cu has no kernel 'softmax_backward'; it has softmax_fwd, softmax_bwd",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_launch_refuses(what: str, device: EmulatorDevice) -> None:
    call, message = REFUSALS[what]
    with pytest.raises(LaunchError, match=re.escape(message)):
        device.launch(*call)


def test_launch_refuses_negative_shared_memory(device: EmulatorDevice) -> None:
    with pytest.raises(LaunchError, match="softmax_fwd: negative shared memory -1"):
        device.launch(*_softmax(_floats(8), _floats(8), 8), shared_bytes=-1)


def test_launch_refuses_arrays_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatorDevice, "owns", lambda _self, value: value is own)
    own = _floats(8)
    with pytest.raises(LaunchError, match=r"x: the array is in another device's memory \(numpy"):
        EmulatorDevice().launch(*_softmax(own, _floats(8), 8))


def test_the_cpu_launches_nothing() -> None:
    with pytest.raises(LaunchError, match="the CPU runs NumPy"):
        CpuDevice().launch(*_softmax(_floats(8), _floats(8), 8))


def test_a_fitting_launch_runs(device: EmulatorDevice) -> None:
    y, x = _floats(8), np.full(8, 100.0, np.float32)
    device.launch(*_softmax(y, x, np.int64(8)))
    assert y.tolist() == [0.125] * 8


# --- signatures ---


@pytest.fixture
def write_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a text where the kernel file odd.cu is looked for."""
    monkeypatch.setattr(source_module, "kernels_dir", lambda: tmp_path)
    (tmp_path / "common.cuh").write_text("// nothing\n")

    def write(text: str) -> None:
        (tmp_path / "odd.cu").write_text(text)

    return write


@pytest.mark.parametrize(
    "parameter", ["double x", "float** x", "unsigned int n", "bool b", "half* x", "long long* n"]
)
def test_signature_with_a_type_that_cannot_be_passed(
    parameter: str, write_kernel: Callable[[str], None]
) -> None:
    write_kernel(f'extern "C" __global__ void odd(float* y, {parameter}) {{}}')
    message = f"odd.cu: odd: cannot pass parameter '{parameter}'; pointers are to float, floatX"
    with pytest.raises(LaunchError, match=re.escape(message)):
        _ = kernel_source("odd.cu", "fp32").signatures


def test_signature_is_read_past_comments_and_qualifiers(
    write_kernel: Callable[[str], None],
) -> None:
    write_kernel(
        '// extern "C" __global__ void gone(int a) {}\n'
        'extern "C" __global__ void __launch_bounds__(128) kept(\n'
        "    float* __restrict__ y /* (N) */, const floatX *x, bf16* z,  // three arrays\n"
        "    const int n, long long m, float scale) {}\n"
    )
    signatures = kernel_source("odd.cu", "bf16").signatures
    assert {name: [str(p) for p in found] for name, found in signatures.items()} == {
        "kept": [
            "float* y",
            "const floatX* x",
            "bf16* z",
            "const int n",
            "long long m",
            "float scale",
        ]
    }


def test_every_kernel_file_has_kernels_that_can_be_passed() -> None:
    found = [name for file in kernel_files() for name in kernel_source(file, "bf16").signatures]
    assert len(found) == len(set(found)) > len(kernel_files())


# --- ops on kernels ---


def _ops() -> KernelOps:
    ops = make_ops("emulator", "fp32")
    assert isinstance(ops, KernelOps)
    return ops


def test_shapes_that_disagree() -> None:
    with pytest.raises(
        ValueError, match=r"layernorm_fwd: w is \(4,\), expected \(C\) with .*C = 5"
    ):
        _ops().layernorm_fwd(
            _floats(3, 5), _floats(3), _floats(3), _floats(3, 5), _floats(4), _floats(5), 1e-5
        )


def test_biases_of_another_length() -> None:
    y, x, rows, w = _floats(3, 5), _floats(3, 5), _floats(3), _floats(5)
    with pytest.raises(ValueError, match=r"gelu_fwd: b is \(1,\), expected \(O\)"):
        _ops().gelu_fwd(y, x, _floats(1))
    with pytest.raises(ValueError, match=r"gelu_bwd: b is \(6,\), expected \(O\)"):
        _ops().gelu_bwd(y, y, x, _floats(6))
    with pytest.raises(ValueError, match=r"layernorm_fwd: bias is \(4,\), expected \(C\)"):
        _ops().residual_layernorm_fwd(y, y, rows, rows, x, x, _floats(4), w, w, 1e-5)


def test_wrong_number_of_dimensions() -> None:
    with pytest.raises(ValueError, match=r"bias_fwd: y is \(3, 5, 1\), expected \(N, O\)"):
        _ops().bias_fwd(_floats(3, 5, 1), _floats(5))


def test_qkv_of_another_number_of_dimensions() -> None:
    with pytest.raises(ValueError, match=r"qkv is \(1, 4, 3, 1, 8\), expected \(B, T, R, D\)"):
        _ops().attention_fwd(_floats(1, 4, 1, 8), _floats(1, 1, 4), _floats(1, 4, 3, 1, 8))


@pytest.mark.parametrize("ops", [_ops(), ReferenceOps()], ids=["kernels", "reference"])
@pytest.mark.parametrize(
    ("H", "R", "G"),
    [(1, 2, 0), (2, 2, 0), (2, 5, 1), (4, 10, 3), (3, 2, -1), (2, 6, 1)],
    ids=["odd", "no keys", "odd, one key", "no divisor", "fewer than H", "another G"],
)
def test_rows_whose_heads_do_not_fit(H: int, R: int, G: int, ops: Ops) -> None:
    """kv_append and attention_decode take G from the cache, attention_fwd and _bwd from R."""
    y, lse, qkv = _floats(1, 1, H, 4), _floats(1, H, 1), _floats(1, 1, R, 4)
    cache, starts = _floats(1, max(G, 1), 3, 4), np.zeros(1, INT32)
    if R != 3 * H:
        with pytest.raises(ConfigError, match=f"attention_fwd: rows of R = {R} .* H = {H} query"):
            ops.attention_fwd(y, lse, qkv)
        with pytest.raises(ConfigError, match=f"attention_bwd: rows of R = {R} .* H = {H} query"):
            ops.attention_bwd(qkv, lse, y, qkv, y, lse)
    with pytest.raises(ConfigError, match=f"attention_decode: rows of R = {R} heads do not fit"):
        ops.attention_decode(y, qkv, cache, cache, starts)


@pytest.mark.parametrize("ops", [_ops(), ReferenceOps()], ids=["kernels", "reference"])
@pytest.mark.parametrize(("R", "G"), [(2, 1), (1, 1), (7, 2)])
def test_rows_whose_heads_do_not_fit_into_a_cache(R: int, G: int, ops: Ops) -> None:
    cache, starts = _floats(1, G, 3, 4), np.zeros(1, INT32)
    with pytest.raises(ConfigError, match=f"kv_append: rows of R = {R} heads .* G = {G} key/value"):
        ops.kv_append(cache, cache, _floats(1, 1, R, 4), starts)


def test_elements_of_different_shapes() -> None:
    bfloat16 = np.zeros(9, BFLOAT16)
    with pytest.raises(ValueError, match=r"cast: x is \(9,\), expected \(n\) with n = 8"):
        _ops().cast(_floats(8), bfloat16)


def test_no_rows() -> None:
    with pytest.raises(ConfigError, match="softmax_fwd: N = 0 must be 1 to"):
        _ops().softmax_fwd(_floats(0, 5), _floats(0, 5))


def test_no_elements() -> None:
    with pytest.raises(ConfigError, match="cast: n = 0 must be 1 to"):
        _ops().cast(_floats(0), np.zeros(0, BFLOAT16))


def test_more_positions_than_embeddings() -> None:
    tokens = np.zeros((1, 4), INT32)
    with pytest.raises(ValueError, match=r"fwd: wpe is \(3, 2\), expected \(>= T, C\) .* T = 4"):
        _ops().embedding_fwd(
            _floats(1, 4, 2), tokens, np.zeros(1, INT32), _floats(9, 2), _floats(3, 2)
        )
    with pytest.raises(ValueError, match=r"bwd: dwpe is \(3, 2\), expected \(>= T, C\)"):
        _ops().embedding_bwd(
            _floats(9, 2), _floats(3, 2), _floats(1, 4, 2), tokens, np.zeros(4, INT32)
        )


def test_order_that_leaves_rows_out() -> None:
    tokens = np.zeros((2, 4), INT32)
    with pytest.raises(ValueError, match=r"order is \(4,\), expected \(B \* T\) .* B = 2, T = 4"):
        _ops().embedding_bwd(
            _floats(9, 2), _floats(4, 2), _floats(2, 4, 2), tokens, np.zeros(4, INT32)
        )


@pytest.mark.parametrize("size", [0, 257])
def test_head_size_that_does_not_fit(size: int) -> None:
    with pytest.raises(ConfigError, match=f"head size {size}: kernels/attention.cu takes 1 to 256"):
        attention_defines(size)
    with pytest.raises(ConfigError, match=f"attention_decode: D = {size} must be 1 to 256"):
        attention_decode_defines(size, group=1, width=1)


def test_columns_beyond_the_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCRATCH_FLOATS", 8)
    _ops().bias_bwd(_floats(8), _floats(3, 8))
    with pytest.raises(ConfigError, match="bias_bwd: column sums = 9 must be 1 to 8"):
        _ops().bias_bwd(_floats(9), _floats(3, 9))


def test_sizes_beyond_what_counters_hold() -> None:
    huge = np.lib.stride_tricks.as_strided(_floats(1), (2**30 + 1, 1), (0, 0))
    with pytest.raises(ConfigError, match="bias_bwd: N = 1073741825 must be 1 to 1073741824"):
        _ops().bias_bwd(_floats(1), huge)


def test_dtype_that_kernels_do_not_know() -> None:
    with pytest.raises(ConfigError, match="kernels run in fp32, bf16, fp16, not 'fp8'"):
        KernelOps(EmulatorDevice(), "fp8")


def test_activations_of_the_other_dtype() -> None:
    ops = KernelOps(EmulatorDevice(), "bf16")
    with pytest.raises(LaunchError, match="expected dtype bfloat16, got float32"):
        ops.bias_fwd(np.zeros((1, 8), FLOAT32), np.zeros(8, FLOAT32))
