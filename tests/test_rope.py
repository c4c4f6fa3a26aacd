"""kernels/rope.cu, the NumPy op and the table of angles, on every device and against Llama's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import assert_case, every_device, make_ops, op_cases, upload
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from gpu_gpt2.device.base import FLOAT32, INT32, X_DTYPES
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.rope import rope_angles
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.reference import ReferenceOps


@op_cases("rope_fwd", "rope_bwd")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
def test_values_keep_their_bits(dtype: str, device: str) -> None:
    ops, X = make_ops(device, dtype), X_DTYPES[dtype]
    qkv = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(X)  # H = 4, G = 2
    x = upload(ops.device, qkv, X)
    starts = upload(ops.device, [1, 5], INT32)
    angles = upload(ops.device, rope_angles(8, 4, 100.0), FLOAT32)
    ops.rope_fwd(x, starts, angles, 2)
    same = (ops.device.download(x) == qkv).all(axis=(0, 1, 3))
    assert same.tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    ("R", "D", "kv_heads", "error", "message"),
    [
        (3, 5, 1, ValueError, "rope_fwd: D = 5 is odd, but pairs of elements are rotated"),
        (
            5,
            4,
            0,
            ConfigError,
            "rope_fwd: rows of R = 5 heads do not fit H = 5 query heads and G = 0",
        ),
        (
            4,
            4,
            2,
            ConfigError,
            "rope_fwd: rows of R = 4 heads do not fit H = 0 query heads and G = 2",
        ),
        (
            7,
            4,
            2,
            ConfigError,
            "rope_fwd: rows of R = 7 heads do not fit H = 3 query heads and G = 2",
        ),
    ],
)
def test_heads_that_cannot_be(
    R: int, D: int, kv_heads: int, error: type[Exception], message: str
) -> None:
    ops = make_ops("emulator", "fp32")
    qkv, angles = np.zeros((1, 1, R, D), np.float32), np.zeros((1, D), np.float32)
    with pytest.raises(error, match=message):
        ops.rope_fwd(qkv, np.zeros(1, np.int32), angles, kv_heads)


def test_the_table_of_llama2_c_at_position_3() -> None:
    """The values with which llama2.c rotates, for a head of 16 elements."""
    angles = rope_angles(4, 16, 10000.0)
    assert (angles.dtype, angles.shape) == (np.float32, (4, 16))
    cos = [-0.9899925, 0.5827536, 0.9553365, 0.9955034, 0.9995500, 0.9999550, 0.9999955, 0.9999995]
    sin = [0.1411200, 0.8126489, 0.2955202, 0.0947261, 0.0299955, 0.0094867, 0.0030000, 0.0009487]
    np.testing.assert_allclose(angles[3, 0::2], cos, atol=6e-8)
    np.testing.assert_allclose(angles[3, 1::2], sin, atol=6e-8)


def test_the_table_is_rounded_once() -> None:
    """In float32 a position of 100,000 times a rounded frequency is off by up to 0.006 radians."""
    p, D, theta = 100_000, 64, 500_000.0
    angles = rope_angles(p + 1, D, theta)
    exact = [p * theta ** (-2 * j / D) for j in range(D // 2)]
    np.testing.assert_array_equal(angles[p, 0::2], np.cos(exact).astype(np.float32))
    np.testing.assert_array_equal(angles[p, 1::2], np.sin(exact).astype(np.float32))


def test_agrees_with_hugging_face() -> None:
    """Hugging Face's pairs are elements j and j + D / 2; ours are 2 j and 2 j + 1."""
    B, T, H, D, theta = 2, 5, 3, 8, 10000.0
    qkv = np.random.default_rng(0).normal(size=(B, T, 3 * H, D)).astype(np.float32)
    config = LlamaConfig(hidden_size=H * D, num_attention_heads=H, head_dim=D, rope_theta=theta)
    halves = [*range(0, D, 2), *range(1, D, 2)]  # from our order to theirs
    q, k = (
        torch.tensor(qkv[:, :, part, :][..., halves]).transpose(1, 2)
        for part in (slice(0, H), slice(H, 2 * H))
    )
    positions = torch.arange(2, T + 2)[None]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(q, positions)
    rotated = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    starts = np.full(B, 2, np.int32)
    ReferenceOps().rope_fwd(qkv, starts, rope_angles(T + 2, D, theta), H)
    for part, theirs in zip((slice(0, H), slice(H, 2 * H)), rotated, strict=True):
        ours = qkv[:, :, part, :][..., halves]
        np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=2e-6)
