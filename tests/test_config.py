"""Sizes and settings: what is refused, and the published sizes of GPT-2."""

from dataclasses import asdict, replace

import pytest

from gpu_gpt2 import layout
from gpu_gpt2.config import (
    GPT2_VOCAB_SIZE,
    MODELS,
    TRAIN_DEFAULTS,
    ModelConfig,
    TrainConfig,
    model_config,
)
from gpu_gpt2.errors import ConfigError

# Parameters with the padded vocabulary, as llm.c counts them.
PUBLISHED = {
    "d6": 30_357_504,
    "d12": 124_475_904,
    "d24": 354_871_296,
    "d36": 774_090_240,
    "d48": 1_557_686_400,
}


def train_config(**changes: object) -> TrainConfig:
    values = {
        **TRAIN_DEFAULTS["cpu"], "data": "python-docs", "device": "cpu", "dtype": "fp32",
        "seed": 1, "run_dir": "runs/1",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_sizes(name: str, count: int) -> None:
    assert layout.parameter_count(model_config(name, GPT2_VOCAB_SIZE)) == count


@pytest.mark.parametrize("name", MODELS)
def test_decayed_parameters_are_the_matrices_and_come_first(name: str) -> None:
    specs = layout.parameters(MODELS[name])
    matrices = [spec.init in ("normal", "residual") for spec in specs]
    assert matrices == sorted(matrices, reverse=True)
    assert layout.decayed_count(MODELS[name]) == sum(s.size for s in specs[: sum(matrices)])


@pytest.mark.parametrize("place", TRAIN_DEFAULTS)
def test_defaults_are_a_valid_run(place: str) -> None:
    config = train_config(**TRAIN_DEFAULTS[place])
    assert config.seq_len <= MODELS[config.model].n_positions
    assert TrainConfig.from_dict(asdict(config)) == config


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 0}, "n_layer must be a whole number >= 1, not 0"),
        ({"n_embd": 770}, "does not divide into n_head 12"),
        ({"n_embd": 768.0}, "n_embd must be a whole number"),
        ({"n_head": 1}, "head size 768"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**sizes)


def test_unknown_model() -> None:
    with pytest.raises(ConfigError, match="unknown model 'gpt5'; choose one of d12, "):
        model_config("gpt5", 257)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"data": 5}, "data must be str, not 5"),
        ({"batch_size": 8.5}, "batch_size must be int, not 8.5"),
        ({"beta1": "x"}, "beta1 must be float, not 'x'"),
        ({"batch_size": 2**40}, "at most 1,073,741,824 tokens"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"dtype": "fp8"}, "dtype must be fp32 or bf16"),
        ({"batch_size": 3, "seq_len": 5, "total_batch_tokens": 31}, "not a multiple .* use 45"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(**change)


def test_saved_settings_with_other_keys_are_refused() -> None:
    values = train_config().to_dict()
    with pytest.raises(ConfigError, match="unknown training settings: colour"):
        TrainConfig.from_dict({**values, "colour": "red"})
    del values["lr"]
    with pytest.raises(ConfigError, match="missing training settings: lr"):
        TrainConfig.from_dict(values)


def test_grad_accum_steps() -> None:
    assert train_config().grad_accum_steps == 1
    tokens = train_config().total_batch_tokens
    assert replace(train_config(), total_batch_tokens=4 * tokens).grad_accum_steps == 4
