"""The sizes that all families of models have, under the names of Hugging Face's GPT-2 config."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Final

from gpu_gpt2.errors import ConfigError

VOCAB_PADDING: Final = 128  # wte is padded to a multiple of this many rows: full tiles
MAX_SIZE: Final = 2**31 - 1  # files and kernels hold sizes and positions as int32
MAX_HEAD_SIZE: Final = 256  # largest head that kernels/attention.cu holds in registers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a model: the part that all families share.

    Each family has a subclass of its own. Raises ConfigError for sizes that cannot be built.
    """

    family: ClassVar[str]  # model_type in Hugging Face's config.json
    title: ClassVar[str]  # name of the family in output and messages

    vocab_size: int
    n_positions: int  # longest context
    n_embd: int  # channels
    n_layer: int
    n_head: int  # query heads

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                if type(value) is not bool:
                    raise ConfigError(f"{field.name} must be true or false, not {value!r}")
            elif field.type == "float":
                if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
                    raise ConfigError(f"{field.name} must be a positive number, not {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field.name} must be a whole number >= 1, not {value!r}")
            elif value > MAX_SIZE:
                raise ConfigError(f"{field.name} must be at most {MAX_SIZE:,}, not {value}")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd {self.n_embd} does not divide into n_head {self.n_head} equal heads; "
                f"choose a multiple of n_head"
            )
        if self.head_size > MAX_HEAD_SIZE:
            raise ConfigError(
                f"head size {self.head_size} (n_embd / n_head) is above {MAX_HEAD_SIZE}, the most "
                f"that the attention kernel holds; use more heads"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """The number of key heads, and of value heads."""
        return self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_PADDING) * VOCAB_PADDING

    def resized(self, **sizes: int) -> ModelConfig:
        """Returns this model with other sizes; a family adapts the sizes that follow from them."""
        return replace(self, **sizes)
