"""Sizes of models and settings of training runs, and their defaults and presets."""

from gpu_gpt2.config.gpt2 import (
    GPT2_SIZES,
    GPT2_VOCAB_SIZE,
    HF_SIZES,
    LAYER_NORM_EPSILON,
    GPT2Config,
)
from gpu_gpt2.config.llama import RMS_NORM_EPS, ROPE_THETA, LlamaConfig
from gpu_gpt2.config.model import MAX_HEAD_SIZE, VOCAB_PADDING, ModelConfig
from gpu_gpt2.config.named_models import MODELS, model_config
from gpu_gpt2.config.option import AUTO, EPOCHS, Option
from gpu_gpt2.config.presets import (
    PRESETS_DIR,
    TOKENS_PER_PARAM,
    defaults_for,
    device_defaults,
    named_presets,
    read_preset,
    read_settings,
    settings_text,
)
from gpu_gpt2.config.train import (
    DEFAULTS,
    MAX_BATCH_TOKENS,
    MAX_RECOMPUTE,
    OPTIONS,
    TrainConfig,
)

__all__ = [
    "AUTO",
    "DEFAULTS",
    "EPOCHS",
    "GPT2_SIZES",
    "GPT2_VOCAB_SIZE",
    "HF_SIZES",
    "LAYER_NORM_EPSILON",
    "MAX_BATCH_TOKENS",
    "MAX_HEAD_SIZE",
    "MAX_RECOMPUTE",
    "MODELS",
    "OPTIONS",
    "PRESETS_DIR",
    "RMS_NORM_EPS",
    "ROPE_THETA",
    "TOKENS_PER_PARAM",
    "VOCAB_PADDING",
    "GPT2Config",
    "LlamaConfig",
    "ModelConfig",
    "Option",
    "TrainConfig",
    "defaults_for",
    "device_defaults",
    "model_config",
    "named_presets",
    "read_preset",
    "read_settings",
    "settings_text",
]
