"""llama2.c's model files, versions 0, 1 and 2: a header with the sizes, then the tensors.

Version 0 has no magic number and ends its norms with two tables of RoPE angles, which llama2.c
skips. Version 1 has a header of 256 bytes and another order of the tensors. Both are float32.
Version 2 holds the matrices as int8 (see int8.py), each matrix of a layer followed by its scales.
llama2.c's `run` reads version 0, and its `runq` version 2. Source: llama2.c's export.py.

Matrices are (out, in) as ours. Our qkvw joins the rows of wq, wk and wv, and our fcw those of w1
and w3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import numpy as np
import numpy.typing as npt

from gpu_gpt2.config import RMS_NORM_EPS, ROPE_THETA, LlamaConfig, ModelConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.files import (
    BLOCK_BYTES,
    read_array,
    reading,
    unexpected,
    whole,
    write_array,
)
from gpu_gpt2.formats.int8 import dequantize, quantize
from gpu_gpt2.formats.llama2c_tokenizer import BOS, tokenizer_beside
from gpu_gpt2.models.rope import rope_angles
from gpu_gpt2.models.weights import FloatArray, Piece, Weights, WeightSource, pieces

MAGIC: Final = 0x616B3432  # begins versions 1 and 2; its bytes read "24ka"
GROUP_SIZE: Final = 64  # llama2.c's group size where it divides the rows
VERSIONS: Final = (0, 1, 2)

_INT8_VERSION: Final = 2
_SIZES: Final = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab, seq
_HEADER: Final = struct.Struct("<Ii7iBi")  # versions 1 and 2; in version 1 the last int is 0
_HEADER_BYTES: Final = 256  # size of a header of versions 1 and 2, which ends with zeros
_FLOAT32: Final = np.dtype("<f4")
_INT8: Final = np.dtype(np.int8)

# Tensors by llama2.c's names in the order of the files; those of a file that it lacks have no size.
_V0_ORDER: Final = (
    "tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3",
    "norm", "freqs_cos", "freqs_sin", "output",
)  # fmt: skip
_V1_ORDER: Final = (
    "attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2",
    "w3", "output",
)  # fmt: skip
# The tensors whose rows make up each of ours, from the first row to the last.
_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "wte": ("tok_embeddings",),
    "head": ("output",),
    "qkvw": ("wq", "wk", "wv"),
    "attprojw": ("wo",),
    "fcw": ("w1", "w3"),
    "fcprojw": ("w2",),
    "ln1w": ("attention_norm",),
    "ln2w": ("ffn_norm",),
    "lnfw": ("norm",),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """The shapes and offsets of the tensors in a file of one version."""

    config: LlamaConfig
    version: int
    group_size: int  # of int8 matrices; 0 in a file of float32

    @property
    def file_bytes(self) -> int:
        return self._end_of(_order(self.version)[-1])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of one layer if it is stacked."""
        c = self.config
        C, F, K = c.n_embd, c.n_inner, c.n_kv_head * c.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings": (c.vocab_size, C),
            "output": (c.vocab_size, C),
            "wq": (C, C),
            "wk": (K, C),
            "wv": (K, C),
            "wo": (C, C),
            "w1": (F, C),
            "w2": (C, F),
            "w3": (F, C),
            "attention_norm": (C,),
            "ffn_norm": (C,),
            "norm": (C,),
            "freqs_cos": (c.n_positions, c.head_size // 2),
            "freqs_sin": (c.n_positions, c.head_size // 2),
        }
        return shapes[name]

    def elements(self, name: str) -> int:
        """The elements of a tensor, of one layer if it is stacked; of a Python int's size."""
        count = 1
        for size in self.shape(name):
            count *= size
        return count

    def offset(self, name: str, layer: int | None) -> int:
        """The offset in bytes of a tensor, or of one layer of it."""
        order = _order(self.version)
        before = order[: order.index(name)]
        start = self._end_of(before[-1]) if before else _header_bytes(self.version)
        return start + (layer or 0) * self._bytes(name)

    def is_int8(self, name: str) -> bool:
        """True if a tensor is int8 in this file."""
        return self.group_size > 0 and not name.endswith("norm")

    def _bytes(self, name: str) -> int:
        """The bytes of a tensor, or of one layer of it, scales included."""
        count = self.elements(name)
        if self.is_int8(name):
            return count + count // self.group_size * _FLOAT32.itemsize
        return count * _FLOAT32.itemsize

    def _end_of(self, last: str) -> int:
        """The offset of the first byte after a tensor."""
        end = _header_bytes(self.version)
        for name in _order(self.version):
            stacked = name.startswith("w") or name in ("attention_norm", "ffn_norm")
            if name != "output" or not self.config.tie_word_embeddings:
                end += self._bytes(name) * (self.config.n_layer if stacked else 1)
            if name == last:
                break
        return end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Llama2cModel:
    """A checked model file of llama2.c as a source of weights; the values are float32."""

    path: Path
    config: ModelConfig
    layout: _Layout
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    folder: ClassVar[Path | None] = None  # none of its own: other models may lie beside the file

    @property
    def version(self) -> int:
        return self.layout.version

    @property
    def group_size(self) -> int:
        """The elements of a quantised group; 0 for a file of float32."""
        return self.layout.group_size

    @property
    def has_int8_rows(self) -> bool:
        """True if the file holds int8 whose groups lie within rows, so that `read_int8` works.

        llama2.c's exporter does not check that its groups divide the width of the MLP. Where they
        do not, its runq computes something else than the model. `read` is right for such a file.
        """
        widths = self.config.n_embd, self.layout.config.n_inner
        return self.group_size > 0 and not any(width % self.group_size for width in widths)

    @property
    def eot(self) -> int | None:
        """BOS, which separates the texts that llama2.c trains on."""
        return BOS if BOS < self.config.vocab_size else None

    @property
    def tokenizer_path(self) -> Path | None:
        """llama2.c's tokenizer file beside the model: tok{V}.bin or tokenizer.bin."""
        return tokenizer_beside(self.path, self.config.vocab_size)

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        for piece in pieces(self.config):
            yield piece, self.read_piece(piece)

    def read_piece(self, piece: Piece) -> FloatArray:
        """The values of one piece, dequantised if the file holds int8."""
        parts = []
        for name in _PARTS[piece.name]:
            if self.layout.is_int8(name):
                parts.append(dequantize(*self._quantized(name, piece.layer)))
            else:
                offset = self.layout.offset(name, piece.layer)
                parts.append(read_array(self.path, offset, self.layout.shape(name), _FLOAT32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_int8(
        self,
    ) -> Iterator[tuple[Piece, npt.NDArray[np.int8], npt.NDArray[np.float32]]]:
        """Yields every matrix once as (piece, q (O, I) int8, scales (O, I / group_size) float32).

        The matrices include wte; `read_piece` reads the norms, which are float32. Raises
        ConfigError for a file of float32, or if a group of the file extends over two rows.
        """
        if not self.group_size:
            raise ConfigError(
                f"{self.path} is a file of version {self.version}, whose weights are float32; "
                f"convert it to llama2c-v2 for weights of int8"
            )
        matrices = [piece for piece in pieces(self.config) if len(piece.shape) == 2]
        for piece in matrices:
            if piece.shape[1] % self.group_size:
                raise ConfigError(
                    f"{self.path}: its groups of {self.group_size} elements extend over the rows "
                    f"of {piece.shape[1]} of {piece.name}, which int8 matmuls cannot use; compute "
                    f"in another dtype, or convert the original model to llama2c-v2"
                )
        for piece in matrices:
            parts = [self._quantized(name, piece.layer) for name in _PARTS[piece.name]]
            q = np.concatenate([values for values, _ in parts])
            scales = np.concatenate([scale for _, scale in parts])
            yield piece, q, scales.reshape(len(q), -1)

    def _quantized(
        self, name: str, layer: int | None
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """The int8 values of a tensor, in its shape, and the scales of its groups (groups,)."""
        offset, shape = self.layout.offset(name, layer), self.layout.shape(name)
        count = self.layout.elements(name)
        q = read_array(self.path, offset, shape, _INT8)
        scales = read_array(self.path, offset + count, (count // self.group_size,), _FLOAT32)
        return q, scales


def is_llama2c(path: Path) -> bool:
    """True if a file begins like a model file of llama2.c; its size is not compared."""
    with reading(path, "model file"), path.open("rb") as file:
        start = file.read(_SIZES.size)
    if start[:4] == MAGIC.to_bytes(4, "little"):
        return True
    try:
        return len(start) == _SIZES.size and _config(path, _SIZES.unpack(start)) is not None
    except DataError:
        return False


def open_model(path: Path) -> Llama2cModel:
    """The model in a file of llama2.c, version 0, 1 or 2; DataError says what is wrong."""
    with reading(path, "model file of llama2.c"), path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    layout = _read_header(path, start, size)
    c = layout.config
    if size != layout.file_bytes:
        groups = f" in groups of {layout.group_size}" if layout.group_size else ""
        raise DataError(
            f"{path}: version {layout.version} of a Llama of {c.n_layer} layers of {c.n_embd}, "
            f"vocabulary {c.vocab_size}, context {c.n_positions}{groups} would make "
            f"{layout.file_bytes} bytes, but the file holds {size}; it was cut off, or is damaged "
            f"or of another kind"
        )
    return Llama2cModel(path=path, config=c, layout=layout)


def write_model(
    path: Path,
    source: WeightSource,
    version: int,
    watch: Callable[[Weights], None] = lambda values: None,
    *,
    group_size: int = GROUP_SIZE,
) -> None:
    """Writes version 0, 1 or 2, whole or not at all. Raises OSError.

    group_size: the most elements of a quantised group in version 2. It is halved until it divides
    the rows of all matrices. watch: called with each piece that has been written. Raises
    ConfigError for a model that llama2.c would compute otherwise, and DataError for weights that
    are not finite in version 2.
    """
    layout = layout_of(source.config, version, group_size)
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(_header(layout))
        if version == 0:
            c = layout.config
            angles = rope_angles(c.n_positions, c.head_size, c.rope_theta)
            for name, table in (("freqs_cos", angles[:, ::2]), ("freqs_sin", angles[:, 1::2])):
                write_array(file, layout.offset(name, None), table, _FLOAT32)
        for piece, values in source.read():
            start = 0
            for name in _PARTS[piece.name]:
                part = values[start : start + layout.shape(name)[0]]
                start += len(part)
                offset = layout.offset(name, piece.layer)
                if layout.is_int8(name):
                    _write_int8(file, offset, part, layout.group_size, piece)
                else:
                    write_array(file, offset, part, _FLOAT32)
            watch(values)


def layout_of(config: ModelConfig, version: int, group_size: int = GROUP_SIZE) -> _Layout:
    """Returns the layout of a new file; ConfigError for a model that llama2.c cannot run."""
    if not isinstance(config, LlamaConfig):
        raise ConfigError(
            "llama2.c's files hold Llama models only, and this model is a GPT-2; convert to hf, "
            "llmc-fp32 or llmc-bf16"
        )
    for name, value, constant in (
        ("rope_theta", config.rope_theta, ROPE_THETA),
        ("rms_norm_eps", config.rms_norm_eps, RMS_NORM_EPS),
    ):
        if value != constant:
            raise ConfigError(
                f"{name} is {value:g}, and llama2.c's files have no place for it: llama2.c always "
                f"computes with {constant:g}; convert to hf instead"
            )
    if version != _INT8_VERSION:
        return _Layout(config, version, 0)
    while config.n_embd % group_size or config.n_inner % group_size:
        group_size //= 2
    return _Layout(config, version, group_size)


def _order(version: int) -> tuple[str, ...]:
    return _V1_ORDER if version else _V0_ORDER


def _header_bytes(version: int) -> int:
    return _HEADER_BYTES if version else _SIZES.size


def _header(layout: _Layout) -> bytes:
    """The header of a file, up to the first tensor."""
    c = layout.config
    sizes = (c.n_embd, c.n_inner, c.n_layer, c.n_head, c.n_kv_head)
    if layout.version == 0:
        flag = 1 if c.tie_word_embeddings else -1
        return _SIZES.pack(*sizes, flag * c.vocab_size, c.n_positions)
    tied = int(c.tie_word_embeddings)
    words = (*sizes, c.vocab_size, c.n_positions, tied, layout.group_size)
    return _HEADER.pack(MAGIC, layout.version, *words).ljust(_HEADER_BYTES, b"\0")


def _read_header(path: Path, start: bytes, size: int) -> _Layout:
    """The layout that the first bytes of a file state; DataError says what is wrong."""
    if start[:4] != MAGIC.to_bytes(4, "little"):
        if len(start) < _SIZES.size:
            raise DataError(
                f"{path} holds {size} bytes, less than the {_SIZES.size} of a header of llama2.c"
            )
        return _Layout(_config(path, _SIZES.unpack_from(start)), 0, 0)
    if len(start) < _HEADER_BYTES:
        raise DataError(
            f"{path} holds {size} bytes, less than the {_HEADER_BYTES} of a header of llama2.c"
        )
    _, version, *sizes, tied, group_size = _HEADER.unpack_from(start)
    if version not in (1, _INT8_VERSION):
        raise unexpected(path, f"version {version}", 4, f"1 or {_INT8_VERSION}")
    if sizes[5] < 1:
        raise unexpected(path, f"vocabulary size {sizes[5]}", 28, "1 or more")
    if tied not in (0, 1):
        raise unexpected(path, f"shared classifier {tied}", 36, "0 or 1")
    sizes[5] *= 1 if tied else -1
    config = _config(path, tuple(sizes))
    if version != _INT8_VERSION:
        return _Layout(config, version, 0)
    if group_size < 1:
        raise unexpected(path, f"group size {group_size}", 37, "1 or more")
    layout = _Layout(config, version, group_size)
    for name in ("tok_embeddings", "wq", "wk", "w1"):
        if layout.elements(name) % group_size:
            raise unexpected(
                path,
                f"group size {group_size}",
                37,
                f"a divisor of the {layout.elements(name)} elements of {name}",
            )
    return layout


def _config(path: Path, sizes: tuple[int, ...]) -> LlamaConfig:
    """The model of the seven sizes; a negative vocabulary size means a head of its own."""
    n_embd, n_inner, n_layer, n_head, n_kv_head, vocab_size, n_positions = sizes
    try:
        return LlamaConfig(
            vocab_size=abs(vocab_size),
            n_positions=n_positions,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            n_kv_head=n_kv_head,
            n_inner=n_inner,
            tie_word_embeddings=vocab_size > 0,
        )
    except ConfigError as e:
        raise DataError(f"{path}: {e}; the file is damaged or of another kind") from e


def _write_int8(
    file: BinaryIO, offset: int, values: Weights, group_size: int, piece: Piece
) -> None:
    """Writes a matrix as int8 values and, behind them, the scales. Raises OSError, DataError."""
    O, I = values.shape
    step = max(1, BLOCK_BYTES // (I * _FLOAT32.itemsize))
    for row in range(0, O, step):
        if not np.isfinite(values[row : row + step]).all():
            layer = "" if piece.layer is None else f" of layer {piece.layer}"
            raise DataError(
                f"{piece.name}{layer} has values that are not finite, which int8 cannot hold; "
                f"the model is damaged"
            )
        q, scales = quantize(values[row : row + step], group_size)
        write_array(file, offset + row * I, q, _INT8)
        group = row * I // group_size
        write_array(file, offset + O * I + group * _FLOAT32.itemsize, scales, _FLOAT32)
