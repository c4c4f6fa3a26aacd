"""Converts a model from any kind of file into another, piece by piece."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpu_gpt2.config import GPT2_VOCAB_SIZE
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats import hf, llmc, tokenizer_bin
from gpu_gpt2.formats.files import whole
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import Weights, WeightSource, pieces
from gpu_gpt2.open_model import tokenizer_of

TARGETS: Final = ("hf", "llmc-fp32", "llmc-bf16")
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json",
)  # fmt: skip

_SMALL_FILES: Final = 4 << 20  # bytes of JSON and headers; GPT-2's tokenizer.json is most of it


def bytes_of(source: WeightSource) -> int:
    """The bytes of a model's weights in its own dtype, without padding rows."""
    return source.dtype.itemsize * sum(math.prod(p.shape) for p in pieces(source.config))


def convert(source: WeightSource, destination: Path, to: str, watch: Callable[[int], None]) -> None:
    """Writes a model as `to`, one of TARGETS, whole or not at all; UserError.

    "hf" makes a folder with the weights in the source's dtype, and the tokenizer if there is one.
    The other targets make a file of llm.c, and a gpt2_tokenizer.bin beside it unless one exists.
    watch: called with the bytes converted since its last call; their sum is `bytes_of(source)`.
    """
    if to not in TARGETS:
        raise ConfigError(f"unknown kind of file {to!r}; choose --to {' | '.join(TARGETS)}")
    destination = Path(os.path.abspath(destination))
    dtype = source.dtype if to == "hf" else llmc.DTYPES[to.removeprefix("llmc-")]
    _check_free(destination, folder=to == "hf")

    def watch_piece(values: Weights) -> None:
        watch(values.size * source.dtype.itemsize)

    try:
        _check_room(destination, dtype.itemsize * parameter_count(source.config) + _SMALL_FILES)
        if to == "hf":
            with whole(destination) as folder:
                hf.write_model(folder, source, watch_piece)
                _write_tokenizer(folder, source)
        else:
            llmc.write_model(destination, source, to.removeprefix("llmc-"), watch_piece)
            _write_tokenizer_bin(destination.parent, source)
    except OSError as e:
        raise DataError(
            f"cannot write {destination}: {e.strerror or e}; nothing of it is left, so mend that "
            f"and try again"
        ) from e


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
    """Copies the source's tokenizer files, or writes GPT-2's if its vocabulary has that size."""
    here = source.folder
    found = [here / name for name in TOKENIZER_FILES if (here / name).is_file()] if here else []
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if not found and source.config.vocab_size == GPT2_VOCAB_SIZE:
        GPT2Tokenizer.gpt2().save(folder)


def _write_tokenizer_bin(folder: Path, source: WeightSource) -> None:
    """Writes the source's tokenizer under the name that llm.c expects, unless there is a file."""
    path = folder / tokenizer_bin.TOKENIZER_BIN
    if path.exists():
        return
    with suppress(DataError):  # a model without a tokenizer can be converted too
        tokenizer_of(source).save_bin(path)
