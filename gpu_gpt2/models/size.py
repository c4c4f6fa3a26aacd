"""The size of a model in numbers: its parameters by group, and the flops of training."""

from __future__ import annotations

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.families import parameter_count, parameters

_GROUPS = {
    "embeddings": ("wte", "wpe"),
    "attention": ("qkvw", "qkvb", "attprojw", "attprojb"),
    "MLP": ("fcw", "fcb", "fcprojw", "fcprojb"),
    "layernorms": ("ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb"),
}


def parameter_groups(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters in each part of the model, padded vocabulary included."""
    sizes = {spec.name: spec.size for spec in parameters(config)}
    return {group: sum(sizes[name] for name in names) for group, names in _GROUPS.items()}


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Returns the flops of training on one token as llm.c counts them: 6 n + 6 L C T."""
    attention = config.n_layer * config.n_embd * seq_len
    return 6.0 * (parameter_count(config) + attention)
