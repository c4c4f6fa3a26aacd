"""Sizes and settings: what is refused, and the published sizes of GPT-2."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gpu_gpt2.config import (
    AUTO,
    GPT2_VOCAB_SIZE,
    HF_SIZES,
    MODELS,
    OPTIONS,
    PRESETS_DIR,
    GPT2Config,
    Option,
    TrainConfig,
    defaults_for,
    device_defaults,
    model_config,
)
from gpu_gpt2.config.gpt2 import GPT2_MODELS
from gpu_gpt2.device import DEVICES
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.families import decayed_count, parameter_count, parameters
from gpu_gpt2.tools.bench.results import option_tables, replace_block

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
    """The default run on a CPU, with `changes`."""
    values = {**defaults_for("cpu"), "device": "cpu", "dtype": "fp32", "run_dir": "runs/1"}
    return TrainConfig(**{**values, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config = model_config(name)
    assert config.vocab_size == GPT2_VOCAB_SIZE
    assert config.n_positions == (2048 if name.startswith("gpt3") else 1024)
    assert (parameter_count(config), config.head_size) == PUBLISHED[name]


def test_llmc_s_short_names() -> None:
    short = {name.removeprefix("gpt2:") for name in PUBLISHED if name.startswith("gpt2:")}
    assert GPT2_MODELS.keys() == PUBLISHED.keys() | short | HF_SIZES.keys() | {"mini", "nano"}
    assert [MODELS[name] for name in HF_SIZES] == [MODELS[f"d{n}"] for n in (12, 24, 36, 48)]
    for name in short:
        assert MODELS[name] == MODELS[f"gpt2:{name}"]


@pytest.mark.parametrize("name", MODELS)
def test_decayed_parameters_are_the_matrices_and_come_first(name: str) -> None:
    specs = parameters(MODELS[name])
    matrices = [spec.init in ("normal", "residual") for spec in specs]
    assert matrices == sorted(matrices, reverse=True)
    assert decayed_count(MODELS[name]) == sum(s.size for s in specs[: sum(matrices)])


@pytest.mark.parametrize("name", OPTIONS["device"].choices)
def test_defaults_of_a_device_are_a_valid_run(name: str) -> None:
    config = train_config(**defaults_for(name), device=name)
    assert config.seq_len <= MODELS[config.model].n_positions
    assert config.total_batch_tokens % (config.batch_size * config.seq_len) == 0
    assert TrainConfig.from_dict(asdict(config)) == config


def test_every_device_has_defaults_for_the_same_settings() -> None:
    """A setting has one default for all devices, in its declaration, or one in each preset."""
    devices = OPTIONS["device"].choices
    assert sorted(path.name for path in (PRESETS_DIR / "devices").iterdir()) == sorted(
        f"{device}.toml" for device in devices
    )
    for device in devices:
        assert device_defaults(device).keys() == {
            name
            for name, option in OPTIONS.items()
            if option.default is None and name not in ("device", "dtype", "run_dir")
        }


def test_choices_are_those_of_the_code() -> None:
    assert (*OPTIONS["device"].choices, AUTO) == (*DEVICES[1:], DEVICES[0])
    assert OPTIONS["dtype"].choices == DTYPES


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_every_option_has_a_group_and_a_help_that_is_a_sentence(option: Option) -> None:
    assert option.flag == "--" + option.name.replace("_", "-")
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    assert option.group
    assert option.metavar or option.choices or option.kind is bool


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_value_is_refused_by_the_name_of_its_option(option: Option) -> None:
    wrong: list[object] = [None, [], b"x"]
    wrong += {
        str: [5, *(["other"] if option.choices else [])],
        int: [1.5, "1", True],
        float: ["x", math.nan, math.inf, -math.inf, True],
        bool: [0, "no"],
    }[option.kind]
    wrong += [bound - 1 for bound in (option.minimum, option.above) if bound is not None]
    wrong += [bound + 1 for bound in (option.maximum, option.below) if bound is not None]
    wrong += [bound for bound in (option.above, option.below) if bound is not None]
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{option.flag} must be .*, not ") as error:
            train_config(**{option.name: value})
        assert str(error.value).endswith(f", not {value!r}")
    for bound in (option.minimum, option.maximum):
        if bound is not None:
            option.check(bound)


def test_the_documentation_of_the_options_is_up_to_date() -> None:
    path = Path(__file__).parent.parent / "docs" / "training-options.md"
    text = path.read_text()
    expected = replace_block(text, "options", option_tables())
    assert text == expected, f"rewrite {path} with: gpu-gpt2 bench tables"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_positions": 1 << 31}, "n_positions must be at most 2,147,483,647, not 2147483648"),
        ({"n_layer": 0}, "n_layer must be a whole number >= 1, not 0"),
        ({"n_embd": 770}, "does not divide into n_head 12"),
        ({"n_embd": 768.0}, "n_embd must be a whole number"),
        ({"n_head": 1}, "head size 768"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2Config(**sizes)


@pytest.mark.parametrize("name", ["gpt5", "d13", "", "gpt3:c5120", "gpt2:12", "D12"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_config(name, 257)
    assert str(error.value) == (
        f"unknown model {name!r}; choose one of dN or gpt2:dN with N = 6, 12, 24, 36, 48, 60, 72, "
        f"84; gpt3:cN with N = 384, 768, 1024, 1536, 2048, 2560, 4096, 12288; gpt2, "
        f"gpt2-medium, gpt2-large, gpt2-xl; mini; nano; "
        f"llama:260k, llama:15m, llama:42m, llama:110m, smollm-135m, llama:mini, llama:nano"
    )


def test_the_size_that_no_head_divides() -> None:
    with pytest.raises(ConfigError, match=r"gpt3:c5140 cannot be built: 5140 .* heads of 128"):
        model_config("gpt3:c5140")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be a whole number >= 1, not 0"),
        ({"lr": float("nan")}, "--lr must be a finite number > 0, not nan"),
        ({"lr": 0.0}, "--lr must be a finite number > 0, not 0.0"),
        ({"weight_decay": float("inf")}, "--weight-decay must be a finite number >= 0, not inf"),
        ({"data": 5}, "--data must be text, not 5"),
        ({"batch_size": 8.5}, "--batch-size must be a whole number >= 1, not 8.5"),
        ({"beta1": 1.0}, "--beta1 must be a finite number > 0 and < 1, not 1.0"),
        ({"tf32": 1}, "--tf32 must be true or false, not 1"),
        ({"seed": 1 << 32}, "--seed must be a whole number from 0 to 4294967295, not 4294967296"),
        ({"dtype": "fp8"}, "--dtype must be one of fp32, bf16, fp16, not 'fp8'"),
        ({"tf32": True}, "--tf32 is for fp32 on a GPU, not fp32 on cpu; leave it out"),
        ({"batch_size": 2**40}, "--batch-size x --seq-len = 70,368,744,177,664 is too large"),
        (
            {"batch_size": 3, "seq_len": 5, "total_batch_tokens": 31},
            "--total-batch-tokens 31 is not a multiple of --batch-size x --seq-len = 15; use 45",
        ),
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
