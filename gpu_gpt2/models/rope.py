"""The table of angles of rotary position embeddings (RoPE; Su et al. 2021).

The table is float32 and made on the host in float64. In 16 bits it would lose angles: bfloat16 has
8 significant bits, so that neighbouring positions would get the same cosine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rope_angles(n_positions: int, head_size: int, theta: float) -> npt.NDArray[np.float32]:
    """Returns the table `angles` (n_positions, head_size) of `Ops.rope_fwd`; head_size is even.

    Columns 2 j and 2 j + 1 of row p are the cosine and the sine of p theta^(-2 j / head_size),
    computed in float64 and rounded once.
    """
    frequencies = theta ** (-np.arange(0, head_size, 2) / head_size)
    angles = np.arange(n_positions)[:, None] * frequencies
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return pairs.reshape(n_positions, head_size).astype(np.float32)
