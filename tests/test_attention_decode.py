"""kernels/kv_cache.cu, kernels/attention_decode.cu and the NumPy ops, on every device."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import INT32, X_DTYPES
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.kernels import SCRATCH_FLOATS, KernelOps


@op_cases("kv_append", "attention_decode")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@pytest.mark.parametrize(
    ("H", "G", "D"), [(2, 2, 64), (4, 2, 80), (3, 1, 33), (8, 1, 16)], ids=lambda size: str(size)
)
@every_device
def test_every_token_decodes_as_the_row_of_a_forward_pass(
    dtype: str, device: str, H: int, G: int, D: int
) -> None:
    """A batch whose sequences are at different positions, up to the end of the cache.

    Both results are means of rows of v, and add in another order: they differ by less than 64
    places of float32 of the largest element of v. In 16 bits each is rounded once, and flash
    attention also rounds p, which makes three halves of a place. The cache begins as NaN, so that
    a read of anything that was not appended would show.
    """
    T, start_of = 70, (0, 9, 68)
    B = len(start_of)
    ops = make_ops(device, dtype)
    X, new = X_DTYPES[dtype], ops.device.empty
    rows = np.random.default_rng(0).normal(size=(B, T, H + 2 * G, D)).astype(X)
    qkv, y, lse = upload(ops.device, rows, X), new((B, T, H, D), X), new((B, H, T), np.float32)
    ops.attention_fwd(y, lse, qkv)
    expected = ops.device.download(y).astype(np.float64)
    size = np.abs(rows[:, :, H + G :].astype(np.float64)).max()
    limit = 64 * 2.0**-23 * size
    if dtype != "fp32":
        limit += 1.5 * float(ml_dtypes.finfo(X).eps) * size

    k, v = (upload(ops.device, np.full((B, G, T, D), np.nan), X) for _ in range(2))
    for b, start in enumerate(start_of):  # the prompts
        if start > 0:
            prompt = upload(ops.device, rows[b : b + 1, :start], X)
            ops.kv_append(k[b : b + 1], v[b : b + 1], prompt, upload(ops.device, [0], INT32))
    one, out = new((B, 1, H + 2 * G, D), X), new((B, 1, H, D), X)
    starts = new((B,), INT32)
    for step in range(T):
        positions = np.minimum(np.add(start_of, step), T - 1)
        ops.device.upload(starts, positions.astype(INT32))
        ops.device.upload(one, rows[np.arange(B), positions][:, None])
        ops.kv_append(k, v, one, starts)
        ops.attention_decode(out, one, k, v, starts)
        found = ops.device.download(out)[:, 0].astype(np.float64)
        error = np.abs(found - expected[np.arange(B), positions]).max()
        assert error <= limit, (step, error, limit)


class Recorder(CpuDevice):
    """Runs nothing; `launched` has grid and arguments of each launch by the kernel's name."""

    def __init__(self) -> None:
        self.launched: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {}

    def _launch(self, source: object, name: str, *rest: Any) -> None:
        grid, _block, args, _shared_bytes = rest
        self.launched[name] = grid, args


def decode_launches(B: int, H: int, G: int, S: int, D: int) -> Recorder:
    """The launches of attention_decode in bf16 at these sizes."""
    device = Recorder()
    X = X_DTYPES["bf16"]
    k = np.empty((B, G, S, D), X)
    qkv, y = np.empty((B, 1, H + 2 * G, D), X), np.empty((B, 1, H, D), X)
    KernelOps(device, "bf16").attention_decode(y, qkv, k, k, np.zeros(B, INT32))
    return device


@pytest.mark.parametrize(
    ("B", "H", "G", "S", "D", "blocks", "splits", "length"),
    [
        (1, 12, 12, 1024, 64, 12, 16, 64),  # GPT-2 124M
        (1, 6, 6, 256, 48, 6, 4, 64),  # a small Llama
        (1, 32, 8, 8192, 128, 8, 128, 64),
        (1, 32, 8, 131072, 128, 8, 256, 512),
        (64, 32, 8, 2048, 128, 512, 4, 512),
        (1, 71, 1, 2048, 64, 9, 32, 64),  # nine blocks share a group of 71 query heads
        (200, 96, 96, 100, 100, 19200, 1, 100),
        (8, 128, 8, 8192, 255, 128, 7, 1171),  # as many partial results as scratch memory holds
    ],
)
def test_splits_of_the_cache(
    B: int, H: int, G: int, S: int, D: int, blocks: int, splits: int, length: int
) -> None:
    launched = decode_launches(B, H, G, S, D).launched
    grid, args = launched["attention_decode_partial"]
    assert (grid, args[-1]) == ((blocks, splits), length)
    assert (splits - 1) * length < S <= splits * length
    assert args[0].size == B * H * splits * (D + 2) <= SCRATCH_FLOATS
    grid, args = launched["attention_decode_total"]
    assert grid[0] == B * H
    assert args[-2:] == (splits, length)


def test_a_batch_beyond_the_scratch_memory() -> None:
    with pytest.raises(ConfigError, match=r"decode: B \* H \* \(D \+ 2\) = 2099200 must be 1 to"):
        decode_launches(B=200, H=41, G=1, S=1, D=254)
