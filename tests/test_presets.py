"""Settings in TOML files: the named presets, and files of users."""

from pathlib import Path

import pytest

from gpu_gpt2.config import (
    MODELS,
    OPTIONS,
    TrainConfig,
    defaults_for,
    named_presets,
    read_preset,
    read_settings,
    settings_text,
)
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.settings import merged, new_config
from gpu_gpt2.training.schedule import check_lengths

# Tokens in a step, learning rate, its final fraction and steps, in llm.c's scripts.
LLMC = {
    "gpt2-124m-10b": (524_288, 6e-4, 0.0, "1epoch"),
    "gpt2-350m": (524_288, 3e-4, 0.0, 60_000),
    "gpt2-774m": (524_288, 2.5e-4, 0.0, 286_102),
    "gpt2-1558m": (1_048_576, 6e-4, 0.1, 32_000),
    "gpt3-125m": (524_288, 6e-4, 0.1, 572_204),
}
NAMES = [*LLMC, "laptop-8gb", "shakespeare", "shakespeare-finetune", "t4", "tiny-cpu"]


def test_the_presets_are_known_by_name_and_purpose() -> None:
    presets = named_presets()
    assert sorted(presets) == sorted(NAMES)
    for purpose in presets.values():
        assert purpose.endswith((".", "--init-from."))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", OPTIONS["device"].choices)
def test_a_preset_is_a_valid_run_on_every_device(name: str, place: str) -> None:
    values = {
        **defaults_for(place), "dtype": "fp32", "device": place, "run_dir": "run",
        **{k: v for k, v in read_preset(name).items() if k not in ("device", "dtype")},
    }  # fmt: skip
    if values["batch_size"] == "auto":
        values["batch_size"] = 1
    if isinstance(values["steps"], str):
        values["steps"] = 10_000
    config = TrainConfig(**values)
    check_lengths(config)
    model = MODELS[config.model]
    assert config.seq_len <= max(config.context, model.n_positions) or name.endswith("finetune")


@pytest.mark.parametrize("name", LLMC)
def test_llmc_s_recipes(name: str) -> None:
    values = read_preset(name)
    found = tuple(values[key] for key in ("total_batch_tokens", "lr", "final_lr_fraction", "steps"))
    assert found == LLMC[name]
    assert (values["warmup_steps"], values["weight_decay"], values["eval_every"]) == (700, 0.1, 250)


def test_settings_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    values = {**defaults_for("cpu"), "sample_prompt": 'a "b" \\ é 😀\n', "lr": 1e-5, "wandb": True}
    path = tmp_path / "settings.toml"
    path.write_text(settings_text(values), encoding="utf-8")
    assert read_settings(path) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr_shedule = 'wsd'", "unknown setting 'lr_shedule' .did you mean 'lr_schedule'"),
        ("learning-rate = 1", "unknown setting 'learning-rate'"),
        ("run_dir = 'x'", "unknown setting 'run_dir'.*; the folder of a run is named with --run-d"),
        ("lr = 'fast'", "--lr must be a finite number > 0, not 'fast'"),
        ("steps = '3 lightyears'", "--steps must be a whole number >= 1, or epochs as in 3epochs"),
        ("batch_size = 0", "--batch-size must be a whole number >= 1, or auto, not 0"),
        ("tokens_per_param = 0", "tokens_per_param must be a number > 0, not 0"),
        ("lr = ", "is not TOML: "),
    ],
)
def test_a_wrong_line_is_refused_by_the_name_of_the_file(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"my.toml.*{message}"):
        read_settings(path)


def test_a_missing_file_and_an_unknown_preset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        read_settings(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"unknown preset 'shakespear' .*'shakespeare'.*; choose"):
        read_preset("shakespear")


def test_the_last_length_that_is_given_counts() -> None:
    steps, ratio = {"steps": 3, "lr": 1.0}, {"tokens_per_param": 2.0}
    assert merged(steps, ratio) == {"lr": 1.0, "tokens_per_param": 2.0}
    assert merged(ratio, steps) == steps
    assert merged(steps, ratio, {"steps": 4}) == {"lr": 1.0, "steps": 4}
    with pytest.raises(ConfigError, match="both set the length"):
        merged({**steps, **ratio})


def test_a_preset_that_starts_from_weights_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf download openai-community/gpt2 --local-dir gpt2"):
        new_config({"device": "cpu"}, read_preset("shakespeare-finetune"), tmp_path / "run")
