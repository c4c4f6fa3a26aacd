"""The families of models: what is asked of a configuration, whichever family it belongs to."""

from __future__ import annotations

from typing import Final

from gpu_gpt2.config import GPT2Config, LlamaConfig, ModelConfig
from gpu_gpt2.models.arena import TensorSpec, element_count
from gpu_gpt2.models.gpt2 import GPT2
from gpu_gpt2.models.llama import Llama
from gpu_gpt2.models.model import Model
from gpu_gpt2.ops.table import Ops

CONFIGS: Final[dict[str, type[ModelConfig]]] = {
    config.family: config for config in (GPT2Config, LlamaConfig)
}
_MODELS: Final[dict[str, type[Model]]] = {"gpt2": GPT2, "llama": Llama}


def new_model(
    config: ModelConfig,
    ops: Ops,
    *,
    max_batch: int,
    max_seq_len: int,
    recompute: int = 0,
    training: bool = True,
    with_logits: bool = True,
) -> Model:
    """Returns a model of the family of `config`, whose weights are not set yet: see Model."""
    return _MODELS[config.family](
        config,
        ops,
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        recompute=recompute,
        training=training,
        with_logits=with_logits,
    )


def parameters(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Returns the parameter tensors of a model, those with weight decay first."""
    return _MODELS[config.family].parameters(config)


def parameter_count(config: ModelConfig) -> int:
    """Returns the elements of the parameter arena, padded vocabulary rows included."""
    return element_count(parameters(config))


def decayed_count(config: ModelConfig) -> int:
    """Returns how many elements, at the start of the parameter arena, have weight decay."""
    return element_count(spec for spec in parameters(config) if spec.decay)


def constants(config: ModelConfig, T: int) -> tuple[TensorSpec, ...]:
    """Returns the tensors that are computed once: see Model.constants."""
    return _MODELS[config.family].constants(config, T)


def activations(
    config: ModelConfig,
    B: int,
    T: int,
    *,
    recompute: int = 0,
    training: bool = True,
) -> tuple[TensorSpec, ...]:
    """Returns the other tensors of a pass over a batch (B, T): see Model.activations."""
    return _MODELS[config.family].activations(config, B, T, recompute=recompute, training=training)
