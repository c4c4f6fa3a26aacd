"""Sizes of Llama models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from gpu_gpt2.config.model import ModelConfig
from gpu_gpt2.errors import ConfigError

RMS_NORM_EPS: Final = 1e-5  # llama2.c's constant
ROPE_THETA: Final = 10000.0  # base of the rotary angles (Su et al. 2021), and llama2.c's constant
INNER_MULTIPLE: Final = 32  # the MLP of llama2.c's models has a multiple of this many channels


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Sizes and constants of a Llama, with GPT-2's names where both families have a size.

    Every group of n_head / n_kv_head query heads shares one key head and one value head (Ainslie
    et al. 2023). In Hugging Face's config.json the sizes are called hidden_size (n_embd),
    num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size (n_inner) and
    max_position_embeddings (n_positions).
    """

    family: ClassVar[str] = "llama"
    title: ClassVar[str] = "Llama"

    n_kv_head: int
    n_inner: int  # channels between the two matmuls of the MLP
    rms_norm_eps: float = RMS_NORM_EPS  # added to the mean square
    rope_theta: float = ROPE_THETA
    tie_word_embeddings: bool = True  # the head is wte

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        if self.n_head % self.n_kv_head:
            raise ConfigError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; each key "
                f"head serves the same number of query heads"
            )
        if self.head_size % 2:
            raise ConfigError(
                f"head size {self.head_size} (n_embd / n_head) is odd, and RoPE rotates pairs of "
                f"elements; choose sizes with an even head size"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head

    def resized(self, **sizes: int) -> LlamaConfig:
        """Returns this model with other sizes.

        With another n_embd the MLP gets llama2.c's width for it, and with another n_head as many
        query heads share a key head as before, if that divides n_head; otherwise none do.
        """
        if "n_embd" in sizes:
            sizes = {"n_inner": inner_size(sizes["n_embd"])} | sizes
        if "n_head" in sizes:
            shared = self.n_head // self.n_kv_head
            n_head = sizes["n_head"]
            sizes = {"n_kv_head": n_head if n_head % shared else n_head // shared} | sizes
        resized = ModelConfig.resized(self, **sizes)
        assert isinstance(resized, LlamaConfig)
        return resized


def inner_size(n_embd: int, multiple: int = INNER_MULTIPLE) -> int:
    """Returns llama2.c's width of the MLP: two thirds of 4 n_embd, rounded up to a multiple."""
    return math.ceil((8 * n_embd // 3) / multiple) * multiple


LLAMA_MODELS: Final[Mapping[str, LlamaConfig]] = {
    # llama2.c's models, trained on TinyStories.
    "llama:260k": LlamaConfig(
        vocab_size=512, n_positions=512, n_embd=64, n_layer=5, n_head=8, n_kv_head=4,
        n_inner=inner_size(64, multiple=4),
    ),
    "llama:15m": LlamaConfig(
        vocab_size=32000, n_positions=256, n_embd=288, n_layer=6, n_head=6, n_kv_head=6,
        n_inner=inner_size(288),
    ),
    "llama:42m": LlamaConfig(
        vocab_size=32000, n_positions=1024, n_embd=512, n_layer=8, n_head=8, n_kv_head=8,
        n_inner=inner_size(512),
    ),
    "llama:110m": LlamaConfig(
        vocab_size=32000, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_kv_head=12,
        n_inner=inner_size(768),
    ),
    # The shape of Hugging Face's SmolLM-135M.
    "smollm-135m": LlamaConfig(
        vocab_size=49152, n_positions=2048, n_embd=576, n_layer=30, n_head=9, n_kv_head=3,
        n_inner=1536,
    ),
    # For a CPU and for the emulator, like GPT-2's models of the same names.
    "llama:mini": LlamaConfig(
        vocab_size=32000, n_positions=64, n_embd=256, n_layer=2, n_head=4, n_kv_head=2,
        n_inner=inner_size(256),
    ),
    "llama:nano": LlamaConfig(
        vocab_size=32000, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_kv_head=2,
        n_inner=inner_size(32),
    ),
}  # fmt: skip
LLAMA_NAMES: Final = ", ".join(LLAMA_MODELS)
