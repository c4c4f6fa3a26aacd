"""The table of models that have a name, of all families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gpu_gpt2.config.gpt2 import GPT2_MODELS, GPT2_NAMES
from gpu_gpt2.config.llama import LLAMA_MODELS, LLAMA_NAMES
from gpu_gpt2.config.model import ModelConfig
from gpu_gpt2.errors import ConfigError

MODELS: Final[Mapping[str, ModelConfig]] = {**GPT2_MODELS, **LLAMA_MODELS}
MODEL_NAMES: Final = f"{GPT2_NAMES}; {LLAMA_NAMES}"


def model_config(
    name: str,
    vocab_size: int = 0,
    *,
    n_layer: int = 0,
    n_head: int = 0,
    n_embd: int = 0,
    context: int = 0,
) -> ModelConfig:
    """Returns the sizes of the model `name` in MODELS.

    Sizes that are not 0 replace those of the named model: see `ModelConfig.resized`. Raises
    ConfigError.
    """
    if name == "gpt3:c5140":
        raise ConfigError(
            "gpt3:c5140 cannot be built: 5140 channels, as the paper prints, do not divide into "
            f"heads of 128; choose one of {MODEL_NAMES}"
        )
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; choose one of {MODEL_NAMES}")
    given = {
        "vocab_size": vocab_size,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "n_positions": context,
    }
    return MODELS[name].resized(**{size: value for size, value in given.items() if value})
