"""Sizes of GPT-2 models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from gpu_gpt2.config.model import ModelConfig

GPT2_VOCAB_SIZE: Final = 50257
LAYER_NORM_EPSILON: Final = 1e-5  # GPT-2's layernorms add this to the variance


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Sizes and constants of a GPT-2, under the names of Hugging Face's config.json."""

    family: ClassVar[str] = "gpt2"
    title: ClassVar[str] = "GPT-2"

    vocab_size: int = GPT2_VOCAB_SIZE
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = LAYER_NORM_EPSILON  # added to the variance


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
) -> dict[str, GPT2Config]:
    return {
        f"{prefix}{number}": GPT2Config(n_positions=n_positions, n_embd=C, n_layer=L, n_head=H)
        for number, (C, L, H) in sizes.items()
    }


GPT2_MODELS: Final[Mapping[str, GPT2Config]] = {
    **_models("d", GPT2_SIZES, 1024),
    **_models("gpt2:d", GPT2_SIZES, 1024),
    **_models("gpt3:c", GPT3_SIZES, GPT3_POSITIONS),
    **{name: GPT2Config(n_embd=C, n_layer=L, n_head=H) for name, (C, L, H) in HF_SIZES.items()},
    "mini": GPT2Config(n_layer=2, n_head=4, n_embd=256, n_positions=64),  # the CPU's default
    "nano": GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32),  # the emulator's
}
GPT2_NAMES: Final = (
    f"dN or gpt2:dN with N = {', '.join(map(str, GPT2_SIZES))}; "
    f"gpt3:cN with N = {', '.join(map(str, GPT3_SIZES))}; "
    f"{', '.join(HF_SIZES)}; mini; nano"
)
