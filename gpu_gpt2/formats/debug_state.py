"""llm.c's debug state: a batch with PyTorch's logits, loss and gradients, to verify a model with.

A header (magic, version, B, T), then inputs and targets (B, T) int32, logits (B * T, V) float32,
the mean loss (1,) float32, and the gradient of every parameter tensor, float32, in llm.c's order
with wte padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.errors import DataError
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.llmc import TENSORS
from gpu_gpt2.formats.llmc_header import (
    DEBUG_STATE_MAGIC,
    HEADER_BYTES,
    INT32_MAX,
    Header,
    header_bytes,
    read_header,
)
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.weights import FloatArray

VERSION: Final = 2  # version 1 had the gradient of wte without padding rows
MAX_BATCH: Final = 2**15 - 1  # a larger batch size means that the header is damaged


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DebugState:
    """A debug state; its logits and gradients are memory maps of the file."""

    tokens: npt.NDArray[np.int32]  # (B, T)
    targets: npt.NDArray[np.int32]  # (B, T)
    logits: FloatArray  # (B * T, V)
    loss: float  # nats per token
    grads: Mapping[str, FloatArray]  # gradients by the names in families.parameters, in its shapes


def read_debug_header(path: Path) -> Header:
    """The header of a debug state; DataError if the file is of another kind."""
    header = read_header(path, "debug state")
    header.expect_magic(DEBUG_STATE_MAGIC)
    header.expect(1, "version", (VERSION,))
    return header


def batch_shape(header: Header, max_seq_len: int = INT32_MAX) -> tuple[int, int]:
    """B and T of a debug state's batch; DataError if they cannot be."""
    B = header.expect(2, "batch size", range(1, MAX_BATCH + 1))
    return B, header.expect(3, "sequence length", range(1, max_seq_len + 1))


def read_debug_state(path: Path, config: ModelConfig) -> DebugState:
    """The debug state in a file made for a model of these sizes; DataError says what is wrong."""
    header = read_debug_header(path)
    B, T = batch_shape(header, config.n_positions)
    shapes = _shapes(config, B, T)
    header.expect_size(
        HEADER_BYTES + 4 * sum(math.prod(shape) for _, shape, _ in shapes),
        f"a batch of {B} x {T} with the logits and gradients of a GPT-2 of {config.n_layer} "
        f"layers of {config.n_embd}, vocabulary {config.vocab_size},",
    )
    arrays: dict[str, Any] = {}
    offset = HEADER_BYTES
    for name, shape, dtype in shapes:
        arrays[name] = np.memmap(path, dtype, "r", offset=offset, shape=shape)
        offset += arrays[name].nbytes
    for name in ("tokens", "targets"):
        outside = (arrays[name] < 0) | (arrays[name] >= config.vocab_size)
        if outside.any():
            token = arrays[name].flat[int(outside.argmax())]
            raise DataError(
                f"{path}: {name} hold {token}, outside the vocabulary of {config.vocab_size}; "
                f"the file is damaged"
            )
    loss = float(arrays.pop("loss")[0])
    if not math.isfinite(loss):
        raise DataError(f"{path}: its loss is {loss}; the file is damaged, so make it again")
    return DebugState(
        tokens=np.array(arrays.pop("tokens"), np.int32),
        targets=np.array(arrays.pop("targets"), np.int32),
        logits=arrays.pop("logits"),
        loss=loss,
        grads=arrays,
    )


def write_debug_state(path: Path, config: ModelConfig, state: DebugState) -> None:
    """Writes `state` for a model of these sizes, whole or not at all. Raises OSError."""
    B, T = state.tokens.shape
    values = {
        "tokens": state.tokens,
        "targets": state.targets,
        "logits": state.logits,
        "loss": np.array([state.loss]),
        **state.grads,
    }
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(header_bytes(DEBUG_STATE_MAGIC, VERSION, B, T))
        for name, shape, dtype in _shapes(config, B, T):
            if values[name].shape != shape:
                raise ValueError(f"{name}: expected {shape}, got {values[name].shape}")
            file.write(np.ascontiguousarray(values[name], dtype).data)


def _shapes(config: ModelConfig, B: int, T: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each array that follows the header, in order."""
    shape = {spec.name: spec.shape for spec in parameters(config)}
    return [
        ("tokens", (B, T), "<i4"),
        ("targets", (B, T), "<i4"),
        ("logits", (B * T, config.vocab_size), "<f4"),
        ("loss", (1,), "<f4"),
        *((name, shape[name], "<f4") for name in TENSORS),
    ]
