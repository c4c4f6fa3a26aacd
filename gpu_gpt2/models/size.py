"""The size of a model in numbers: its parameters by group, and the flops of training."""

from __future__ import annotations

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.models.families import parameter_count, parameters

_GROUPS = {
    "embeddings": ("wte", "wpe"),
    "head": ("head",),
    "attention": ("qkvw", "qkvb", "attprojw", "attprojb"),
    "MLP": ("fcw", "fcb", "fcprojw", "fcprojb"),
    "norms": ("ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb"),
}


def parameter_groups(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters in each part of the model, padded vocabulary included.

    A head that is tied to the embedding is no part of its own.
    """
    sizes = {spec.name: spec.size for spec in parameters(config)}
    counts = {group: sum(sizes.get(name, 0) for name in names) for group, names in _GROUPS.items()}
    return {group: count for group, count in counts.items() if count}


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Returns the flops of training on one token as llm.c counts them: 6 n + 6 L C T.

    n is the number of parameters without those of wte if the head is a matrix of its own: then wte
    is in no matmul.
    """
    sizes = {spec.name: spec.size for spec in parameters(config)}
    n = parameter_count(config) - (sizes["wte"] if "head" in sizes else 0)
    return 6.0 * (n + config.n_layer * config.n_embd * seq_len)
