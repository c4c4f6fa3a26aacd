"""Sizes of GPT-2 models, and the table of models with a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from gpu_gpt2.errors import ConfigError

GPT2_VOCAB_SIZE: Final = 50257
LAYER_NORM_EPSILON: Final = 1e-5  # GPT-2's layernorms add this to the variance
VOCAB_PADDING: Final = 128  # wte is padded to a multiple of this many rows: full tiles
MAX_HEAD_SIZE: Final = 256  # largest head that kernels/attention.cu holds in registers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a GPT-2, under the names of Hugging Face's config.json.

    Raises ConfigError for sizes that cannot be built.
    """

    vocab_size: int = GPT2_VOCAB_SIZE
    n_positions: int = 1024  # longest context
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = LAYER_NORM_EPSILON  # added to the variance

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "layer_norm_epsilon":
                if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
                    raise ConfigError(f"{name} must be a positive number, not {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, not {value!r}")
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
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_PADDING) * VOCAB_PADDING


# Channels, layers and heads (C, L, H) by the number in llm.c's name of a model. It counts layers in
# names of GPT-2 (Radford et al. 2019, table 2), and channels in names of GPT-3 (Brown et al. 2020,
# table 2.1). 30M, 2.8B, 7.3B, 12B and 31M are sizes that llm.c has added.
GPT2_SIZES: Final[Mapping[int, tuple[int, int, int]]] = {
    6: (384, 6, 6),  # 30M
    12: (768, 12, 12),  # 124M
    24: (1024, 24, 16),  # 355M
    36: (1280, 36, 20),  # 774M
    48: (1600, 48, 25),  # 1558M
    60: (1920, 60, 30),  # 2.8B
    72: (2880, 72, 30),  # 7.3B
    84: (3456, 84, 36),  # 12B
}
GPT3_SIZES: Final[Mapping[int, tuple[int, int, int]]] = {
    384: (384, 6, 6),  # 31M
    768: (768, 12, 12),  # 125M
    1024: (1024, 24, 16),  # 356M
    1536: (1536, 24, 16),  # 760M
    2048: (2048, 24, 16),  # 1.3B
    2560: (2560, 32, 32),  # 2.7B
    4096: (4096, 32, 32),  # 6.7B
    12288: (12288, 96, 96),  # 175B
}
HF_SIZES: Final[Mapping[str, tuple[int, int, int]]] = {  # GPT-2 by Hugging Face's names
    "gpt2": GPT2_SIZES[12],
    "gpt2-medium": GPT2_SIZES[24],
    "gpt2-large": GPT2_SIZES[36],
    "gpt2-xl": GPT2_SIZES[48],
}
GPT3_POSITIONS: Final = 2048


def _models(
    prefix: str, sizes: Mapping[int, tuple[int, int, int]], n_positions: int
) -> dict[str, ModelConfig]:
    return {
        f"{prefix}{number}": ModelConfig(n_positions=n_positions, n_embd=C, n_layer=L, n_head=H)
        for number, (C, L, H) in sizes.items()
    }


MODELS: Final[Mapping[str, ModelConfig]] = {
    **_models("d", GPT2_SIZES, 1024),
    **_models("gpt2:d", GPT2_SIZES, 1024),
    **_models("gpt3:c", GPT3_SIZES, GPT3_POSITIONS),
    **{name: ModelConfig(n_embd=C, n_layer=L, n_head=H) for name, (C, L, H) in HF_SIZES.items()},
    "mini": ModelConfig(n_layer=2, n_head=4, n_embd=256, n_positions=64),  # the CPU's default
    "nano": ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32),  # the emulator's
}
MODEL_NAMES: Final = (
    f"dN or gpt2:dN with N = {', '.join(map(str, GPT2_SIZES))}; "
    f"gpt3:cN with N = {', '.join(map(str, GPT3_SIZES))}; "
    f"{', '.join(HF_SIZES)}; mini; nano"
)


def model_config(
    name: str,
    vocab_size: int = GPT2_VOCAB_SIZE,
    *,
    n_layer: int = 0,
    n_head: int = 0,
    n_embd: int = 0,
    context: int = 0,
) -> ModelConfig:
    """Returns the sizes of the model `name` in MODELS, with a vocabulary of `vocab_size` tokens.

    Sizes that are not 0 replace those of the named model. Raises ConfigError.
    """
    if name == "gpt3:c5140":
        raise ConfigError(
            "gpt3:c5140 cannot be built: 5140 channels, as the paper prints, do not divide into "
            f"heads of 128; choose one of {MODEL_NAMES}"
        )
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; choose one of {MODEL_NAMES}")
    given = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": context}
    changes = {size: value for size, value in given.items() if value}
    return replace(MODELS[name], vocab_size=vocab_size, **changes)
