"""Matrices quantized to int8 in groups, as llama2.c's model files of version 2 hold them.

The elements of a matrix, row after row, are cut into groups of `group_size`. A group has one
float32 scale, its largest magnitude divided by 127, and each element is a multiple of the scale.
If the rows are a multiple of `group_size` long, the groups of a matrix (O, I) are those of the op
`matmul_int8`, and its w_scales are `scales.reshape(O, -1)`.

Halves are rounded to even here, as by llama2.c's exporter. The op `quantize_rows` rounds them away
from zero, as llama2.c's runq does with activations.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.errors import DataError

LARGEST: Final = 127  # the largest quantized magnitude; -128 is not used


def quantize(
    matrix: npt.NDArray[Any], group_size: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Returns the matrix as int8, in its shape, and the scales (groups,) float32.

    A group of zeros has the scale 0. Raises ValueError if the matrix is not a whole number of
    groups, and DataError if an element is a NaN or infinite.
    """
    if group_size < 1 or matrix.size % group_size:
        raise ValueError(f"{matrix.size} elements cannot be cut into groups of {group_size}")
    groups = np.asarray(matrix, np.float32).reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1) / np.float32(LARGEST)
    if not np.isfinite(scales).all():
        raise DataError("a matrix with a NaN or an infinity cannot be quantized to int8")
    divisors = np.where(scales > 0, scales, np.float32(1.0))
    # A scale below the normal float32 numbers is so inexact that a quotient can exceed 127.
    quotients = np.clip(np.rint(groups / divisors[:, None]), -LARGEST, LARGEST)
    quotients[scales == 0] = 0
    return quotients.astype(np.int8).reshape(matrix.shape), scales


def dequantize(q: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns the float32 matrix of the shape of q that `quantize` has turned into q and scales.

    Each element differs from the original by half a scale at most. Raises ValueError if q is not a
    whole number of groups.
    """
    if q.size % scales.size:
        raise ValueError(f"{q.size} elements cannot be cut into {scales.size} groups")
    groups = q.reshape(scales.size, -1) * scales.reshape(-1, 1)
    return groups.astype(np.float32, copy=False).reshape(q.shape)
