"""Weights as int8 with one scale for each group of elements: llama2.c's quantisation, Q8_0.

A group is `group_size` consecutive elements of a matrix in row-major order. Its scale is
max |w| / 127, so that an element is about its int8 value times the scale.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

INT8_MAX: Final = 127  # the largest magnitude of a quantised element; -128 is not used


def quantize(
    matrix: npt.NDArray[Any], group_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Returns q (O, I) int8 and scales (O, I / group_size) float32 of a matrix (O, I).

    Quotients are rounded to nearest, ties to even. A group of zeros has scale 0. `group_size` must
    divide I. The scale of a group with a NaN or an infinity is not finite.
    """
    O, I = matrix.shape
    groups = np.asarray(matrix, np.float32).reshape(O, I // group_size, group_size)
    scales = np.abs(groups).max(axis=-1) / np.float32(INT8_MAX)
    with np.errstate(invalid="ignore"):  # of values that are not finite, infinity / infinity
        quotients = groups / np.where(scales > 0, scales, np.float32(1))[..., None]
        q = np.rint(quotients).astype(np.int8)
    return q.reshape(O, I), scales


def dequantize(q: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns the float32 elements of q, an array of any shape, in the shape of q.

    scales: one for each group, in the order of the groups. A group may extend from one row of q
    into the next.
    """
    groups = q.reshape(scales.size, -1).astype(np.float32)
    groups *= scales.reshape(-1, 1)
    return groups.reshape(q.shape)
