"""kernels/matmul_int8.cu and the NumPy ops, on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import FLOAT32, INT8, X_DTYPES
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.kernels import matmul_int8_defines
from gpu_gpt2.ops.table import Ops


@op_cases("quantize_rows", "matmul_int8")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


def quantized(ops: Ops, x: npt.ArrayLike, groups: int) -> tuple[npt.NDArray[Any], ...]:
    """Returns q and scales of the rows of x."""
    device = ops.device
    rows = upload(device, x, X_DTYPES[ops.dtype])
    q, scales = device.empty(rows.shape, INT8), device.empty((len(rows), groups), FLOAT32)
    ops.quantize_rows(q, scales, rows)
    return device.download(q), device.download(scales)


def multiplied(
    ops: Ops,
    x: npt.NDArray[Any],
    x_scales: npt.NDArray[Any],
    w: npt.NDArray[Any],
    w_scales: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """Returns y of `matmul_int8`."""
    device = ops.device
    y = device.empty((len(x), len(w)), X_DTYPES[ops.dtype])
    values = ((x, INT8), (x_scales, FLOAT32), (w, INT8), (w_scales, FLOAT32))
    ops.matmul_int8(y, *(upload(device, value, dtype) for value, dtype in values))
    return device.download(y)


@every_device
def test_halves_are_rounded_away_from_zero(dtype: str, device: str) -> None:
    """With a largest magnitude of 127 the scale is 1. All values are exact in all dtypes."""
    x = [[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5], [-127, 0.49, -0.49, 62.5, 0.51, -0.51, 2, 0]]
    q, scales = quantized(make_ops(device, dtype), x, 1)
    assert scales.tolist() == [[1.0], [1.0]]
    assert q.tolist() == [[127, 1, 2, 3, -1, -2, -3, 64], [-127, 0, 0, 63, 1, -1, 2, 0]]


@every_device
def test_just_below_a_half_is_rounded_down(dtype: str, device: str) -> None:
    """In float32 the largest number below 1/2, plus 1/2, would be rounded to 1."""
    below = np.nextafter(np.float32(0.5), np.float32(0)) if dtype == "fp32" else 0.498
    q, _ = quantized(make_ops(device, dtype), [[127, below, -below]], 1)
    assert q.tolist() == [[127, 0, 0]]


@every_device
def test_groups_of_zeros(dtype: str, device: str) -> None:
    x = [[0.0, -0.0, 3.0, -1.0], [-0.0, -0.0, 0.0, 0.0]]
    q, scales = quantized(make_ops(device, dtype), x, 2)
    np.testing.assert_array_equal(scales, np.array([[0, 3], [0, 0]], np.float32) / np.float32(127))
    assert q.tolist() == [[0, 0, 127, -42], [0, 0, 0, 0]]
    assert not np.signbit(scales).any()


@every_device
def test_a_number_that_is_not_finite_makes_all_products_of_its_row_nan(
    dtype: str, device: str
) -> None:
    ops = make_ops(device, dtype)
    x = np.ones((4, 6))
    x[0, 1], x[1, 4], x[2, 5] = np.nan, np.inf, -np.inf
    q, scales = quantized(ops, x, 2)
    assert q[[0, 1, 2]].tolist() == [[0] * 3 + [127] * 3, *[[127] * 3 + [0] * 3] * 2]
    with np.errstate(invalid="ignore"):
        y = multiplied(ops, q, scales, np.ones((5, 6)), np.ones((5, 2)))
    assert np.isnan(y.astype(float)).all(axis=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("device", ["cpu", "emulator"])
def test_a_scale_below_the_normal_numbers_gives_no_more_than_127(device: str) -> None:
    """190 times the smallest number, divided by 127, is rounded to the smallest number."""
    x = np.array([[190, -190, 3, 0]]) * 2.0**-149
    q, scales = quantized(make_ops(device, "fp32"), x, 1)
    assert scales.tolist() == [[2.0**-149]]
    assert q.tolist() == [[127, -127, 3, 0]]


@every_device
@pytest.mark.parametrize(("I", "J"), [(1040, 1), (4096, 1), (4096, 2), (4096, 64), (35, 5)])
def test_the_largest_products_are_exact(I: int, J: int, dtype: str, device: str) -> None:
    """Sums of I products of 127 x 127 and -128 x -128; with one scale of a power of two each."""
    q = np.full((3, I), 127)
    q[1], q[2] = -127, -128
    scale = np.full((3, J), 2.0**-13)
    y = multiplied(make_ops(device, dtype), q, scale, q, scale)
    expected = (q.astype(np.int64) @ q.T.astype(np.int64)) * 2.0**-26
    np.testing.assert_allclose(
        y.astype(np.float64), expected, rtol={"fp32": 1e-6, "bf16": 2**-8, "fp16": 2**-11}[dtype]
    )


@every_device
@pytest.mark.parametrize(("N", "O", "I", "J"), [(3, 5, 96, 2), (9, 4, 60, 5), (2, 6, 21, 3)])
def test_agrees_with_integer_sums(N: int, O: int, I: int, J: int, dtype: str, device: str) -> None:
    """Scales are powers of two, so that the sums over groups are exact in float32 too."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (N, I)), rng.integers(-127, 128, (O, I))
    x_scales, w_scales = 2.0 ** -rng.integers(6, 9, (N, J)), 2.0 ** -rng.integers(6, 9, (O, J))
    y = multiplied(make_ops(device, dtype), x, x_scales, w, w_scales)
    dots = np.einsum("njg,ojg->noj", x.reshape(N, J, -1), w.reshape(O, J, -1))  # int64
    expected = (dots * w_scales * x_scales[:, None, :]).sum(axis=2)
    np.testing.assert_array_equal(y, expected.astype(X_DTYPES[dtype]))


@every_device
def test_a_row_does_not_depend_on_the_other_rows(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (11, 256)), rng.integers(-127, 128, (7, 256))
    x_scales, w_scales = rng.uniform(0.1, 1, (11, 4)), rng.uniform(0.1, 1, (7, 4))
    together = multiplied(ops, x, x_scales, w, w_scales)
    for n in range(11):
        alone = multiplied(ops, x[n : n + 1], x_scales[n : n + 1], w, w_scales)
        if device != "cpu":  # BLAS may sum one row in another order than eleven
            assert alone.tobytes() == together[n].tobytes()
        np.testing.assert_allclose(alone[0].astype(float), together[n].astype(float), rtol=1e-5)


def test_refuses_groups_that_do_not_fit_into_a_row() -> None:
    ops = make_ops("emulator", "fp32")
    message = "rows of I = 10 elements cannot be cut into J = 4 equal groups"
    with pytest.raises(ValueError, match=f"quantize_rows: {message}"):
        quantized(ops, np.ones((2, 10)), 4)
    with pytest.raises(ValueError, match=f"matmul_int8: {message}"):
        multiplied(ops, np.ones((2, 10)), np.ones((2, 4)), np.ones((3, 10)), np.ones((3, 4)))


def test_pieces_divide_groups_and_rows_cover_the_batch() -> None:
    assert matmul_int8_defines(1, 64) == {"ROWS": 1, "PIECE": 16}
    assert matmul_int8_defines(3, 36) == {"ROWS": 4, "PIECE": 4}
    assert matmul_int8_defines(8, 31) == {"ROWS": 8, "PIECE": 1}
    assert matmul_int8_defines(33, 48) == {"ROWS": 8, "PIECE": 16}
