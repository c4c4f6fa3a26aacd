"""A model from any file into another kind of file, piece by piece."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpu_gpt2.config import GPT2_VOCAB_SIZE, ModelConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats import hf, llmc
from gpu_gpt2.formats.files import whole
from gpu_gpt2.models.gpt2 import parameter_count
from gpu_gpt2.models.weights import Piece, Weights, WeightSource, pieces
from gpu_gpt2.open_model import TOKENIZER_BIN, folder_of, tokenizer_of
from gpu_gpt2.tokenizer import Tokenizer

TARGETS: Final = ("hf", "llmc-fp32", "llmc-bf16")
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json",
)  # fmt: skip

_SMALL_FILES: Final = 4 << 20  # bytes: JSON and headers; GPT-2's tokenizer.json is most of it


@dataclass(frozen=True, slots=True)
class _Watched:
    """A source that reports the bytes of each piece when it has been dealt with."""

    source: WeightSource
    watch: Callable[[int], None]

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def read(self) -> Iterator[tuple[Piece, Weights]]:
        for piece, values in self.source.read():
            yield piece, values
            self.watch(values.size * self.dtype.itemsize)


def bytes_of(source: WeightSource) -> int:
    """Bytes of a model's weights in its own dtype, without padding rows."""
    return source.dtype.itemsize * sum(math.prod(p.shape) for p in pieces(source.config))


def convert(source: WeightSource, destination: Path, to: str, watch: Callable[[int], None]) -> None:
    """Writes a model as `to`, one of TARGETS, whole or not at all; UserError.

    "hf" makes a folder with the weights in the source's dtype, and a tokenizer if there is one;
    the others make a file of llm.c, and gpt2_tokenizer.bin beside it where there is none. `watch`
    gets the bytes dealt with since its last call; in the end their sum is `bytes_of(source)`.
    """
    if to not in TARGETS:
        raise ConfigError(f"unknown kind of file {to!r}; choose --to {' | '.join(TARGETS)}")
    destination = Path(os.path.abspath(destination))
    dtype = source.dtype if to == "hf" else llmc.DTYPES[to.removeprefix("llmc-")]
    _check_free(destination, folder=to == "hf")
    try:
        _check_room(destination, dtype.itemsize * parameter_count(source.config) + _SMALL_FILES)
        if to == "hf":
            with whole(destination) as folder:
                hf.write_model(folder, _Watched(source, watch), _eot(source))
                _write_tokenizer(folder, source)
        else:
            llmc.write_model(destination, _Watched(source, watch), to.removeprefix("llmc-"))
            _write_tokenizer_bin(destination.parent, source)
    except OSError as e:
        raise DataError(
            f"cannot write {destination}: {e.strerror or e}; nothing of it is left, so mend that "
            f"and try again"
        ) from e


def _check_free(destination: Path, *, folder: bool) -> None:
    """Refuses a destination that would replace something."""
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
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise DataError(
            f"{destination} needs up to {needed / 1e6:,.1f} MB, but its disk has "
            f"{free / 1e6:,.1f} MB free; free some space or name another place"
        )


def _eot(source: WeightSource) -> int | None:
    """The token that ends a text, as far as it is known."""
    if isinstance(source, hf.HFModel):
        return source.eot
    return GPT2_VOCAB_SIZE - 1 if source.config.vocab_size == GPT2_VOCAB_SIZE else None


def _write_tokenizer(folder: Path, source: WeightSource) -> None:
    """The source's tokenizer files as they are, else GPT-2's where the vocabulary has its size."""
    here = folder_of(source)
    found = [here / name for name in TOKENIZER_FILES if (here / name).is_file()] if here else []
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if not found and source.config.vocab_size == GPT2_VOCAB_SIZE:
        Tokenizer.gpt2().save(folder)


def _write_tokenizer_bin(folder: Path, source: WeightSource) -> None:
    """The source's tokenizer as llm.c's programs look for it, unless one lies there already."""
    if (folder / TOKENIZER_BIN).exists():
        return
    with suppress(DataError):  # a model without a tokenizer is a model all the same
        tokenizer_of(source).save_bin(folder / TOKENIZER_BIN)
