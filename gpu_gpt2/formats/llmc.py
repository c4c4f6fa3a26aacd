"""llm.c's model files: a header with the sizes, then the sixteen parameter tensors.

The tensors are in llm.c's order, each stacked over the layers; matrices are (out, in) as ours, and
wte has its padding rows, all zero. Version 3 is float32 and version 5 bfloat16. Version 1, float32
without padding rows, is read but not written. Source: llm.c's train_gpt2.py and train_gpt2.cu.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from gpu_gpt2.config import LAYER_NORM_EPSILON, GPT2Config, ModelConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats import tokenizer_bin
from gpu_gpt2.formats.files import BLOCK_BYTES, read_array, whole, write_array
from gpu_gpt2.formats.llmc_header import (
    HEADER_BYTES,
    INT32_MAX,
    KINDS,
    MODEL_MAGIC,
    header_bytes,
    other_kind,
    read_header,
)
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.weights import BFLOAT16, Piece, Weights, WeightSource, gpt2_eot, pieces

TENSORS: Final = (
    "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
    "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb",
)  # fmt: skip
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {"fp32": np.dtype(np.float32), "bf16": BFLOAT16}

_UNPADDED_VERSION: Final = 1
_READ: Final = {_UNPADDED_VERSION: "fp32", 3: "fp32", 5: "bf16"}  # the dtype of each version
_WRITTEN: Final = {"fp32": 3, "bf16": 5}  # the version of each dtype
_REFUSED: Final = {
    2: "stood for several byte layouts that cannot be told apart",
    4: "mixes bfloat16 with float32",
}
_SIZES: Final = range(1, INT32_MAX + 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LlmcModel:
    """A checked model file of llm.c as a source of weights."""

    path: Path
    config: ModelConfig
    dtype: np.dtype[Any]
    starts: Mapping[str, int]  # the first element of each tensor
    folder: ClassVar[Path | None] = None  # none of its own: other models may lie beside the file

    @property
    def eot(self) -> int | None:
        return gpt2_eot(self.config)

    @property
    def tokenizer_path(self) -> Path | None:
        """llm.c's tokenizer file beside the model, unless it is of another model."""
        path = self.path.parent / tokenizer_bin.TOKENIZER_BIN
        if path.exists() and tokenizer_bin.read_token_count(path) == self.config.vocab_size:
            return path
        return None

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        for piece in pieces(self.config):
            offset = _offset(self.starts, piece, self.dtype)
            yield piece, read_array(self.path, offset, piece.shape, self.dtype)


def open_model(path: Path) -> LlmcModel:
    """The model in a file of llm.c, version 1, 3 or 5; DataError says what is wrong."""
    header = read_header(path, "model file of llm.c")
    if header.magic in KINDS and header.magic != MODEL_MAGIC:
        raise other_kind(path, header.magic, f"a GPT-2 model (magic number {MODEL_MAGIC})")
    header.expect_magic(MODEL_MAGIC)
    if header.version in _REFUSED:
        raise DataError(
            f"{path}: version {header.version} at offset 4 {_REFUSED[header.version]}; export the "
            f"model again with a current llm.c, which writes versions 3 and 5"
        )
    version = header.expect(1, "version", tuple(_READ))
    vocab_size = header.expect(3, "vocabulary size", _SIZES)
    sizes = {
        "vocab_size": vocab_size,
        "n_positions": header.expect(2, "context length", _SIZES),
        "n_layer": header.expect(4, "number of layers", _SIZES),
        "n_head": header.expect(5, "number of heads", _SIZES),
        "n_embd": header.expect(6, "number of channels", _SIZES),
    }
    padded = (0,) if version == _UNPADDED_VERSION else range(vocab_size, INT32_MAX + 1)
    rows = header.expect(7, "padded vocabulary size", padded) or vocab_size
    try:
        config = GPT2Config(**sizes)
    except ConfigError as e:
        raise DataError(f"{path}: {e}; the file is damaged or of another kind") from e
    starts, count = _layout(config, rows)
    dtype = DTYPES[_READ[version]]
    header.expect_size(
        HEADER_BYTES + count * dtype.itemsize,
        f"a GPT-2 of {config.n_layer} layers of {config.n_embd}, vocabulary {rows}, context "
        f"{config.n_positions} in {dtype}",
    )
    model = LlmcModel(path=path, config=config, dtype=dtype, starts=starts)
    _check_padding(model, rows)
    return model


def write_model(
    path: Path,
    source: WeightSource,
    dtype: str,
    watch: Callable[[Weights], None] = lambda values: None,
) -> None:
    """Writes version 3 (`dtype` "fp32") or 5 ("bf16"), whole or not at all. Raises OSError.

    watch: called with each piece that has been written. ConfigError for a model that differs from
    GPT-2 in a way that the file cannot say.
    """
    if not isinstance(source.config, GPT2Config):
        raise ConfigError("llm.c's files hold GPT-2 only, and this model is a Llama; convert to hf")
    if source.config.layer_norm_epsilon != LAYER_NORM_EPSILON:
        raise ConfigError(
            f"layer_norm_epsilon is {source.config.layer_norm_epsilon}, and llm.c's files have no "
            f"place for any but {LAYER_NORM_EPSILON}; convert to hf instead"
        )
    c = source.config
    starts, _ = _layout(c, c.padded_vocab_size)
    with whole(path) as temporary, temporary.open("wb") as file:
        sizes = (c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.padded_vocab_size)
        file.write(header_bytes(MODEL_MAGIC, _WRITTEN[dtype], *sizes))
        for piece, values in source.read():
            offset = _offset(starts, piece, DTYPES[dtype])
            write_array(file, offset, values, DTYPES[dtype])  # skipped padding rows read as zero
            watch(values)


def _layout(config: ModelConfig, rows: int) -> tuple[dict[str, int], int]:
    """The first element of each tensor, if wte has `rows` rows, and the count of all elements."""
    sizes = {spec.name: spec.size for spec in parameters(config)}
    sizes["wte"] = rows * config.n_embd
    starts, end = {}, 0
    for name in TENSORS:
        starts[name] = end
        end += sizes[name]
    return starts, end


def _offset(starts: Mapping[str, int], piece: Piece, dtype: np.dtype[Any]) -> int:
    """The offset of a piece in the file, in bytes."""
    element = starts[piece.name] + (piece.layer or 0) * math.prod(piece.shape)
    return HEADER_BYTES + element * dtype.itemsize


def _check_padding(model: LlmcModel, rows: int) -> None:
    """Raises DataError if a padding row of wte is not zero, as our models have no place for it."""
    V, C = model.config.vocab_size, model.config.n_embd
    step = max(1, BLOCK_BYTES // (C * model.dtype.itemsize))
    for row in range(V, rows, step):
        offset = HEADER_BYTES + row * C * model.dtype.itemsize
        block = read_array(model.path, offset, (min(step, rows - row), C), model.dtype)
        if block.any():
            raise DataError(
                f"{model.path}: wte has values other than zero from offset {offset} on, in the "
                f"padding rows {V} to {rows - 1}; the file is damaged, so write it again"
            )
