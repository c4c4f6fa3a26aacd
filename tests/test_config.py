"""Sizes and settings: what is refused, and the published sizes of GPT-2."""

from dataclasses import asdict, replace

import pytest

from gpu_gpt2.config import (
    GPT2_VOCAB_SIZE,
    HF_SIZES,
    MODELS,
    TRAIN_DEFAULTS,
    ModelConfig,
    TrainConfig,
    model_config,
)
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.gpt2 import decayed_count, parameter_count, parameters

# Parameters with the padded vocabulary, as llm.c counts them, and channels in a head.
PUBLISHED = {
    "gpt2:d6": (30_357_504, 64),
    "gpt2:d12": (124_475_904, 64),
    "gpt2:d24": (354_871_296, 64),
    "gpt2:d36": (774_090_240, 64),
    "gpt2:d48": (1_557_686_400, 64),
    "gpt2:d60": (2_754_259_200, 64),
    "gpt2:d72": (7_316_887_680, 96),
    "gpt2:d84": (12_220_657_920, 96),
    "gpt3:c384": (30_750_720, 64),
    "gpt3:c768": (125_262_336, 64),
    "gpt3:c1024": (355_919_872, 64),
    "gpt3:c1536": (760_372_224, 96),
    "gpt3:c2048": (1_315_819_520, 128),
    "gpt3:c2560": (2_651_673_600, 80),
    "gpt3:c4096": (6_658_596_864, 128),
    "gpt3:c12288": (174_604_836_864, 128),
}


def train_config(**changes: object) -> TrainConfig:
    values = {
        **TRAIN_DEFAULTS["cpu"], "data": "python-docs", "device": "cpu", "dtype": "fp32",
        "seed": 1, "run_dir": "runs/1",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = model_config(name)
    assert config.vocab_size == GPT2_VOCAB_SIZE
    assert config.n_positions == (2048 if name.startswith("gpt3") else 1024)
    assert (parameter_count(config), config.head_size) == PUBLISHED[name]


def test_llmc_s_short_names() -> None:
    short = {name.removeprefix("gpt2:") for name in PUBLISHED if name.startswith("gpt2:")}
    assert MODELS.keys() == PUBLISHED.keys() | short | HF_SIZES.keys() | {"mini", "nano"}
    assert [MODELS[name] for name in HF_SIZES] == [MODELS[f"d{n}"] for n in (12, 24, 36, 48)]
    for name in short:
        assert MODELS[name] == MODELS[f"gpt2:{name}"]


@pytest.mark.parametrize("name", MODELS)
def test_decayed_parameters_are_the_matrices_and_come_first(name: str) -> None:
    specs = parameters(MODELS[name])
    matrices = [spec.init in ("normal", "residual") for spec in specs]
    assert matrices == sorted(matrices, reverse=True)
    assert decayed_count(MODELS[name]) == sum(s.size for s in specs[: sum(matrices)])


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


@pytest.mark.parametrize("name", ["gpt5", "d13", "", "gpt3:c5120", "gpt2:12", "D12"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_config(name, 257)
    assert str(error.value) == (
        f"unknown model {name!r}; choose one of dN or gpt2:dN with N = 6, 12, 24, 36, 48, 60, 72, "
        f"84; gpt3:cN with N = 384, 768, 1024, 1536, 2048, 2560, 4096, 12288; gpt2, "
        f"gpt2-medium, gpt2-large, gpt2-xl; mini; nano"
    )


def test_the_size_that_no_head_divides() -> None:
    with pytest.raises(ConfigError, match=r"gpt3:c5140 cannot be built: 5140 .* heads of 128"):
        model_config("gpt3:c5140")


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
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": 1 << 32}, "seed must be at most 4294967295, not 4294967296"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"dtype": "fp8"}, "dtype must be fp32, bf16 or fp16"),
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
