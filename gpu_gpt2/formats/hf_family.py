"""The part of Hugging Face's files that differs from family to family: names, layouts, settings."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import numpy as np

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.formats.safetensors import TensorFile
from gpu_gpt2.models.weights import Piece, Weights

Config = TypeVar("Config", bound=ModelConfig)

HEAD: Final = "lm_head.weight"  # the head; its name has no prefix in any family


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a model file: a piece of our model, or some rows of one."""

    name: str  # without the prefix of the file's names
    shape: tuple[int, ...]  # in the file
    transposed: bool = False  # the weight of a Conv1D, (in, out)
    half_split_heads: int = 0  # heads of a rotated projection, whose rows are permuted: see `ours`

    def ours(self, values: Weights) -> Weights:
        """Returns the tensor's values in our layout; a view if no rows are permuted.

        In the file, the rows of a head of D elements that RoPE rotates are the first elements of
        all D / 2 pairs, then the second ones. Ours are pair after pair, as in llama2.c.
        """
        if self.half_split_heads:
            halves = values.reshape(self.half_split_heads, 2, -1, values.shape[-1])
            pairs: Weights = halves.swapaxes(1, 2)
            return pairs.reshape(values.shape)
        return values.T if self.transposed else values

    def theirs(self, values: Weights) -> Weights:
        """Returns values in our layout as they stand in the file: the inverse of `ours`."""
        if self.half_split_heads:
            pairs = values.reshape(self.half_split_heads, -1, 2, values.shape[-1])
            halves: Weights = pairs.swapaxes(1, 2)
            return halves.reshape(values.shape)
        return values.T if self.transposed else values

    @property
    def our_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


class HFFamily(ABC):
    """Names, layouts and settings of one family in Hugging Face's files."""

    architecture: ClassVar[str]  # transformers' class of the whole model
    prefix: ClassVar[str]  # begins the tensors' names in `architecture`, but not in the base model
    ignored: ClassVar[re.Pattern[str]]  # names, without prefix, of tensors that hold no weights
    # Settings that change what a model computes, with the values under which it computes what ours
    # does. The first value is the one that a config.json without the setting implies.
    supported: ClassVar[Mapping[str, tuple[Any, ...]]]

    @abstractmethod
    def stored(self, piece: Piece, config: Any) -> tuple[StoredTensor, ...]:
        """Returns the tensors of a file that hold a piece, in the order of its rows.

        `config` is the configuration of the family, and `piece` belongs to a model of it.
        """

    @abstractmethod
    def config_of_settings(self, path: Path, values: Mapping[str, Any]) -> ModelConfig:
        """Returns the sizes in the config.json at `path`, whose `supported` settings are checked.

        Raises DataError if that model computes something else than ours.
        """

    @abstractmethod
    def config_of_shapes(
        self, where: Path, files: Mapping[str, TensorFile], prefix: str
    ) -> ModelConfig:
        """Returns the sizes of a model without config.json from its shapes. Raises DataError."""

    @abstractmethod
    def settings(self, config: Any, eot: int | None) -> dict[str, Any]:
        """Returns the entries of config.json that describe a model of the family.

        `eot` ends a text, and stands before the first one too.
        """

    def check_supported(self, path: Path, values: Mapping[str, Any]) -> None:
        """Raises DataError if a setting in the config.json at `path` has an unsupported value."""
        for name, supported in self.supported.items():
            if (value := values.get(name, supported[0])) not in supported:
                allowed = " or ".join(repr(s) for s in supported)
                raise DataError(f"{path}: {name} is {value!r}; only {allowed} is supported")

    def full_name(self, stored: StoredTensor, prefix: str) -> str:
        """Returns the name of a tensor in a file whose names begin with `prefix`."""
        return stored.name if stored.name == HEAD else prefix + stored.name


def new_config(path: Path, config: type[Config], sizes: Mapping[str, Any]) -> Config:
    """Returns a configuration of the sizes in the file `path`; DataError if one is missing."""
    if missing := [name for name, value in sizes.items() if value is None]:
        raise DataError(f"{path}: {', '.join(missing)} missing")
    try:
        return config(**sizes)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error


def rows_of(tensors: tuple[StoredTensor, ...], piece: Weights) -> Iterator[Weights]:
    """Yields the rows of a piece (or of its memory) that each of its stored tensors holds."""
    start = 0
    for tensor in tensors:
        stop = start + tensor.our_shape[0]
        yield piece[start:stop]
        start = stop


def dtype_of(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """Returns the narrowest dtype that holds all values of these dtypes exactly."""
    return next(iter(dtypes)) if len(dtypes) == 1 else np.dtype(np.float32)
