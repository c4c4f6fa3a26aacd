"""Matrices quantized in groups, as llama2.c's exporter writes them."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.int8 import dequantize, quantize
from gpu_gpt2.ops.reference import ReferenceOps


def test_halves_are_rounded_to_even() -> None:
    """With a largest magnitude of 127 the scale is 1."""
    row = np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], np.float32)
    q, scales = quantize(row, 8)
    assert scales.tolist() == [1.0]
    assert q.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert q.dtype == np.int8
    assert scales.dtype == np.float32


def test_groups_follow_each_other_in_the_flattened_matrix() -> None:
    """Groups of 4 in rows of 6: the second group spans two rows."""
    matrix = np.array([[1, 2, 3, 4, 100, 5], [6, 7, 0, 0, 0, -127]], np.float32)
    q, scales = quantize(matrix, 4)
    np.testing.assert_array_equal(scales, np.array([4, 100, 127], np.float32) / np.float32(127))
    assert q.tolist() == [[32, 64, 95, 127, 127, 6], [8, 9, 0, 0, 0, -127]]


@pytest.mark.parametrize("group_size", [1, 4, 32, 64])
@pytest.mark.parametrize("scale", [1e-30, 0.02, 1.0, 1e30])
def test_an_element_is_off_by_half_a_scale_at_most(group_size: int, scale: float) -> None:
    matrix = (scale * np.random.default_rng(0).standard_normal((8, 64))).astype(np.float32)
    q, scales = quantize(matrix, group_size)
    assert np.abs(q.astype(int)).reshape(-1, group_size).max(axis=1).tolist() == [127] * scales.size
    error = np.abs(dequantize(q, scales).astype(np.float64) - matrix).reshape(-1, group_size)
    assert (error <= 0.5000001 * scales[:, None]).all()


@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-45])
def test_a_group_whose_scale_is_zero_becomes_zeros(zero: float) -> None:
    q, scales = quantize(np.full((2, 4), zero, np.float32), 8)
    assert scales.tolist() == [0.0]
    assert not q.any()
    assert not np.signbit(dequantize(q, scales)).any()


def test_very_large_and_very_small_numbers_stay_within_127() -> None:
    smallest = np.float32(190 * 2.0**-149)  # divided by 127 and rounded, it is 2^-149
    q, scales = quantize(np.array([3e38, -3e38, smallest, -smallest], np.float32), 2)
    assert q.tolist() == [127, -127, 127, -127]
    assert np.isfinite(dequantize(q, scales)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_numbers_that_are_not_finite(value: float) -> None:
    with pytest.raises(DataError, match="a NaN or an infinity cannot be quantized"):
        quantize(np.array([1.0, value], np.float32), 2)


def test_refuses_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="12 elements cannot be cut into groups of 5"):
        quantize(np.ones((3, 4), np.float32), 5)
    with pytest.raises(ValueError, match="12 elements cannot be cut into groups of 0"):
        quantize(np.ones((3, 4), np.float32), 0)
    with pytest.raises(ValueError, match="12 elements cannot be cut into 5 groups"):
        dequantize(np.ones((3, 4), np.int8), np.ones(5, np.float32))


def test_the_op_multiplies_by_the_dequantized_matrix() -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 24)), rng.standard_normal((2, 24)).astype(np.float32)
    q, scales = quantize(w, 8)
    x_q, x_scales = np.empty((2, 24), np.int8), np.empty((2, 3), np.float32)
    y = np.empty((2, 5), np.float32)
    ReferenceOps().quantize_rows(x_q, x_scales, x)
    ReferenceOps().matmul_int8(y, x_q, x_scales, q, scales.reshape(5, -1))
    expected = dequantize(x_q, x_scales) @ dequantize(q, scales).T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, x @ w.T, atol=0.1)
