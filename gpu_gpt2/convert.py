"""Converts a model from any kind of file into another, piece by piece."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats import hf, llama2c, llmc, tokenizer_bin
from gpu_gpt2.formats.files import whole
from gpu_gpt2.formats.llama2c_tokenizer import TOKENIZER_BIN, tokenizer_beside
from gpu_gpt2.formats.vocabulary import holds_vocabulary
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import Weights, WeightSource, pieces
from gpu_gpt2.open_model import tokenizer_of
from gpu_gpt2.tokenizer import GPT2Tokenizer, Llama2cTokenizer, Tokenizer, open_tokenizer

TARGETS: Final = (
    "hf",
    *(f"llmc-{dtype}" for dtype in llmc.DTYPES),
    *(f"llama2c-v{version}" for version in llama2c.VERSIONS),
)
# Files beside the weights in a folder that say how text becomes tokens, and where a text ends.
TEXT_FILES: Final = (
    "tokenizer.bin", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip

_SMALL_FILES: Final = 4 << 20  # bytes of JSON and headers; GPT-2's tokenizer.json is most of it


def bytes_of(source: WeightSource) -> int:
    """The bytes of a model's weights in its own dtype, without padding rows."""
    return source.dtype.itemsize * sum(math.prod(p.shape) for p in pieces(source.config))


def convert(source: WeightSource, destination: Path, to: str, watch: Callable[[int], None]) -> None:
    """Writes a model as `to`, one of TARGETS, whole or not at all; UserError.

    "hf" makes a folder with the weights in the source's dtype, and the tokenizer if there is one.
    The other targets make a file of llm.c or llama2.c. Beside it they write the tokenizer as
    gpt2_tokenizer.bin or tokenizer.bin, if that file can hold it and there is none yet.
    watch: called with the bytes converted since its last call; their sum is `bytes_of(source)`.
    """
    if to not in TARGETS:
        raise ConfigError(f"unknown kind of file {to!r}; choose --to {' | '.join(TARGETS)}")
    destination = Path(os.path.abspath(destination))
    kind, _, variant = to.partition("-")
    _check_free(destination, folder=to == "hf")

    def watch_piece(values: Weights) -> None:
        watch(values.size * source.dtype.itemsize)

    try:
        _check_room(destination, _bytes_needed(source, kind, variant))
        if kind == "hf":
            with whole(destination) as folder:
                hf.write_model(folder, source, watch_piece)
                _write_tokenizer(folder, source)
        elif kind == "llmc":
            llmc.write_model(destination, source, variant, watch_piece)
            _write_llmc_tokenizer(destination.parent, source)
        else:
            llama2c.write_model(destination, source, _version(variant), watch_piece)
            _write_llama2c_tokenizer(destination, source)
    except OSError as e:
        raise DataError(
            f"cannot write {destination}: {e.strerror or e}; nothing of it is left, so mend that "
            f"and try again"
        ) from e


def tokenizer_with(destination: Path, to: str, vocab_size: int) -> Path | None:
    """The tokenizer's file or folder with which a converted model is opened; None without one."""
    if to == "hf":
        return destination if holds_vocabulary(destination) else None
    if to.startswith("llmc"):
        path: Path | None = destination.parent / tokenizer_bin.TOKENIZER_BIN
    else:
        path = tokenizer_beside(destination, vocab_size)
    if path is None or not path.is_file():
        return None
    try:
        return path if open_tokenizer(path).vocab_size == vocab_size else None
    except DataError:
        return None


def _version(variant: str) -> int:
    """The version of llama2.c's files in the name of a target: 2 for "v2"."""
    return int(variant.removeprefix("v"))


def _bytes_needed(source: WeightSource, kind: str, variant: str) -> int:
    """About the most bytes that a converted model takes; ConfigError if llama2.c cannot hold it."""
    if kind == "llama2c":
        return llama2c.layout_of(source.config, _version(variant)).file_bytes + _SMALL_FILES
    dtype = source.dtype if kind == "hf" else llmc.DTYPES[variant]
    return dtype.itemsize * parameter_count(source.config) + _SMALL_FILES


def _check_free(destination: Path, *, folder: bool) -> None:
    """Raises DataError if the new file or folder would replace something."""
    if not destination.parent.is_dir():
        raise DataError(f"{destination.parent}: no such folder; make it first")
    if not os.path.lexists(destination):
        return
    if not folder:
        raise DataError(f"{destination} exists already; name a file that does not")
    if not destination.is_dir() or any(destination.iterdir()):
        raise DataError(f"{destination} exists already and is no empty folder; name another")
    if destination.is_mount():
        raise DataError(f"{destination} is a mounted disk; name a folder inside it")


def _check_room(destination: Path, needed: int) -> None:
    """Raises DataError if the disk has fewer than `needed` free bytes."""
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise DataError(
            f"{destination} needs up to {needed / 1e6:,.1f} MB, but its disk has "
            f"{free / 1e6:,.1f} MB free; free some space or name another place"
        )


def _write_tokenizer(folder: Path, source: WeightSource) -> None:
    """Copies the source's tokenizer files, or writes the tokenizer that belongs to the source."""
    if source.folder:
        for name in TEXT_FILES:
            if (path := source.folder / name).is_file():
                shutil.copyfile(path, folder / name)
    if not holds_vocabulary(folder) and (tokenizer := _known_tokenizer(source)):
        tokenizer.save(folder)


def _write_llmc_tokenizer(folder: Path, source: WeightSource) -> None:
    """Writes the source's tokenizer under the name that llm.c expects, unless there is a file."""
    path = folder / tokenizer_bin.TOKENIZER_BIN
    if path.exists():
        return
    tokenizer = _known_tokenizer(source)
    if isinstance(tokenizer, GPT2Tokenizer):
        tokenizer.save_bin(path)


def _write_llama2c_tokenizer(model: Path, source: WeightSource) -> None:
    """Writes tokenizer.bin beside a model, if the source's is llama2.c's; it replaces no file.

    If there is a tokenizer.bin of another model, the name is tok{V}.bin.
    """
    tokenizer = _known_tokenizer(source)
    if not isinstance(tokenizer, Llama2cTokenizer):
        return
    for name in (TOKENIZER_BIN, f"tok{tokenizer.vocab_size}.bin"):
        if tokenizer_with(model, "llama2c", tokenizer.vocab_size):
            return
        if not (path := model.parent / name).exists():
            tokenizer.save_bin(path)


def _known_tokenizer(source: WeightSource) -> Tokenizer | None:
    """The tokenizer of a model; None if it has none, as such a model can be converted too."""
    try:
        return tokenizer_of(source)
    except DataError:
        return None
