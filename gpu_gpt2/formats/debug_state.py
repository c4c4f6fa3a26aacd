"""llm.c's debug state: a batch and what PyTorch makes of it, to hold a model against.

After the header (magic, version, B, T): inputs and targets (B, T) int32, logits (B * T, V) float32,
the mean loss (1,) float32, and its gradient by every parameter tensor, float32, in llm.c's order
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
from gpu_gpt2.formats.llmc_header import HEADER_BYTES, header_bytes, read_header
from gpu_gpt2.models.gpt2 import parameters
from gpu_gpt2.models.weights import FloatArray

MAGIC: Final = 20240327
VERSION: Final = 2  # 1 had gradients of wte without padding rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DebugState:
    """A debug state; the large arrays are memory maps of the file."""

    tokens: npt.NDArray[np.int32]  # (B, T)
    targets: npt.NDArray[np.int32]  # (B, T)
    logits: FloatArray  # (B * T, V)
    loss: float  # nats per token
    grads: Mapping[str, FloatArray]  # by parameters' names, and in its shapes


def read_debug_state(path: Path, config: ModelConfig) -> DebugState:
    """The debug state in a file made for a model of these sizes; DataError says what is wrong."""
    header = read_header(path, "debug state")
    header.expect(0, "magic number", (MAGIC,))
    header.expect(1, "version", (VERSION,))
    B = header.expect(2, "batch size", range(1, 2**15))
    T = header.expect(3, "sequence length", range(1, config.n_positions + 1))
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
        file.write(header_bytes(MAGIC, VERSION, B, T))
        for name, shape, dtype in _shapes(config, B, T):
            if values[name].shape != shape:
                raise ValueError(f"{name}: expected {shape}, got {values[name].shape}")
            file.write(np.ascontiguousarray(values[name], dtype).data)


def _shapes(config: ModelConfig, B: int, T: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of all that follows the header."""
    shape = {spec.name: spec.shape for spec in parameters(config)}
    return [
        ("tokens", (B, T), "<i4"),
        ("targets", (B, T), "<i4"),
        ("logits", (B * T, config.vocab_size), "<f4"),
        ("loss", (1,), "<f4"),
        *((name, shape[name], "<f4") for name in TENSORS),
    ]
