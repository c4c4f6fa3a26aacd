"""The angles of rotary position embeddings (Su et al. 2021)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def rope_angles(n_positions: int, head_size: int, theta: float) -> npt.NDArray[np.float32]:
    """Returns cosines and sines (n_positions, head_size) float32, computed in float64."""
    exponents = np.arange(0, head_size, 2) / head_size
    angles = np.arange(n_positions)[:, None] * theta**-exponents
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return table.reshape(n_positions, head_size).astype(np.float32)
