"""The KV cache: keys and values of all tokens so far, so that a new token computes only its own."""

from __future__ import annotations

import math

import numpy as np

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.device.base import Array, Device


class KVCache:
    """Keys and values of `batch` sequences of up to `length` tokens, for every layer.

    `layers[l]` are k and v of layer l, (B, G, S, D) X each, with S = length. In a Llama, keys are
    stored after RoPE.
    """

    def __init__(
        self, config: ModelConfig, device: Device, x_dtype: np.dtype, *, batch: int, length: int
    ) -> None:
        k, v = (device.zeros(_shape(config, batch, length), x_dtype) for _ in range(2))
        self.layers: list[tuple[Array, Array]] = [(k[l], v[l]) for l in range(config.n_layer)]


def cache_bytes(config: ModelConfig, x_dtype: np.dtype, *, batch: int, length: int) -> int:
    """Returns the bytes of a KVCache."""
    return 2 * math.prod(_shape(config, batch, length)) * x_dtype.itemsize


def _shape(config: ModelConfig, batch: int, length: int) -> tuple[int, ...]:
    return config.n_layer, batch, config.kv_heads, length, config.head_size
