"""The summary of a run that is printed before it begins."""

from __future__ import annotations

from gpu_gpt2.config import ModelConfig, TrainConfig
from gpu_gpt2.data.dataset import Dataset
from gpu_gpt2.models.families import decayed_count, parameter_count
from gpu_gpt2.models.size import flops_per_token, parameter_groups
from gpu_gpt2.training.muon import muon_count


def run_summary(config: TrainConfig, model: ModelConfig, data: Dataset) -> str:
    """Returns the sizes of the model, the data and the run, in a few lines.

    Parameters and flops are counted with the padded vocabulary, as llm.c does.
    """
    n, train_tokens = parameter_count(model), sum(map(len, data.train))
    tokens = config.steps * config.total_batch_tokens
    flops = flops_per_token(model, config.seq_len)
    name = f"from {config.init_from}" if config.init_from else config.model
    groups = ", ".join(f"{group} {short(size)}" for group, size in parameter_groups(model).items())
    heads = f"{model.n_head}"
    if model.kv_heads != model.n_head:
        heads += f" ({model.kv_heads} of keys and values)"
    muon = f", {short(muon_count(model))} updated by Muon" if config.optimizer == "muon" else ""
    return (
        f"{model.title} {name}: {n:,} parameters, {config.dtype} on {config.device}\n"
        f"  {groups}; {short(decayed_count(model))} with weight decay{muon}\n"
        f"  layers {model.n_layer}, channels {model.n_embd}, heads {heads}, context "
        f"{model.n_positions}\n"
        f"{data.name}: {train_tokens:,} tokens to train on, {len(data.val):,} held out, "
        f"tokenizer {config.tokenizer}\n"
        f"{config.steps} steps of {config.total_batch_tokens:,} tokens "
        f"({config.grad_accum_steps} x {config.batch_size} x {config.seq_len}, "
        f"recompute level {config.recompute}) into {config.run_dir}\n"
        f"  {short(tokens)} tokens in all: {tokens / train_tokens:.3g} epochs, "
        f"{tokens / n:.3g} tokens per parameter; {short(flops)}FLOP per token, "
        f"{short(flops * tokens)}FLOP in all"
    )


def short(number: float) -> str:
    """Returns a number with three digits and an SI prefix, for example "124 M"."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{_digits(number / 10**power)} {prefix}"
    return _digits(number)


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
