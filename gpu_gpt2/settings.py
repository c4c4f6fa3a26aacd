"""Turns the options that a user gives into all settings of a run, new or resumed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gpu_gpt2.config import (
    AUTO,
    EPOCHS,
    MODELS,
    OPTIONS,
    TOKENS_PER_PARAM,
    ModelConfig,
    TrainConfig,
    defaults_for,
    model_config,
)
from gpu_gpt2.data.corpus import BUILT_IN
from gpu_gpt2.data.dataset import prepare
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.device.base import Device
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import WeightSource
from gpu_gpt2.open_model import open_model, tokenizer_of
from gpu_gpt2.tokenizer import is_path, vocab_size_of
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.memory import best_fit
from gpu_gpt2.training.schedule import check_lengths, decay_start, learning_rate

HEADROOM: Final = 0.05  # share of the free memory that --batch-size auto leaves for other programs
# Default learning rate of --init-from, as a fraction of the default for random weights. The full
# rate would destroy what the weights have learned: nanoGPT and llm.c fine-tune at 1/20 to 1/3.
FINE_TUNING_LR_FRACTION: Final = 0.1
SIZES: Final = ("model", "n_layer", "n_head", "n_embd", "context")
PATHS: Final = ("data", "val_data", "init_from", "hellaswag")
MAX_STEPS: Final = 1 << 53  # largest count that the float64 of the schedule holds exactly


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of all layers; those of a later layer win.

    `steps` and `tokens_per_param` both set the length, so that a later one replaces the other one
    too. Raises ConfigError if one layer has both.
    """
    lengths = {"steps", TOKENS_PER_PARAM}
    values: dict[str, Any] = {}
    for layer in layers:
        if lengths <= layer.keys():
            raise ConfigError("--steps and --tokens-per-param both set the length; leave out one")
        if lengths & layer.keys():
            values = {name: value for name, value in values.items() if name not in lengths}
        values.update(layer)
    return values


def new_config(given: Mapping[str, Any], preset: Mapping[str, Any], run_dir: Path) -> TrainConfig:
    """Returns the settings of a new run.

    Settings `given` on the command line win over those of a `preset` or file, and these win over
    the defaults of the device. Raises UserError for settings that contradict each other.
    """
    chosen = merged(preset, given)
    if given.get("init_from"):  # the model's own sizes and tokenizer replace those of the preset
        own = {*SIZES, "tokenizer"} - given.keys()
        chosen = {name: value for name, value in chosen.items() if name not in own}
    device = open_device(chosen.get("device", AUTO))
    dtype = choose_dtype(chosen.get("dtype", AUTO), device)
    values = {**defaults_for(device.name), **chosen, "device": device.name, "dtype": dtype}
    for name in PATHS:  # absolute, because --resume may run in another folder
        if values[name] and values[name] not in BUILT_IN:
            values[name] = os.path.abspath(values[name])
    if values["init_from"]:
        model, longest = _start_from(values, chosen)
    else:
        if is_path(values["tokenizer"]) and os.path.exists(values["tokenizer"]):
            values["tokenizer"] = os.path.abspath(values["tokenizer"])
        model = _model(values)
        longest = model.n_positions
    if "seq_len" not in given:
        values["seq_len"] = min(values["seq_len"], longest)
    if values["batch_size"] == AUTO:
        values |= _fitting(values, model, chosen.get("recompute"), device)
    micro = values["batch_size"] * values["seq_len"]
    if "total_batch_tokens" not in chosen and values["total_batch_tokens"] % micro:
        values["total_batch_tokens"] = micro
    if values["lr_schedule"] == "wsd" and "final_lr_fraction" not in chosen:
        values["final_lr_fraction"] = 0.0
    values["steps"] = _step_count(values, model)
    values.pop(TOKENS_PER_PARAM, None)
    config = TrainConfig(**values, run_dir=str(run_dir))
    if "warmup_steps" not in given:  # a short run has a short warm-up
        longest_warmup = decay_start(config) if config.lr_schedule == "wsd" else config.steps
        config = replace(config, warmup_steps=min(config.warmup_steps, longest_warmup))
    check_lengths(config)
    return config


def resumed_config(
    state: checkpoint.TrainingState, folder: Path, options: Mapping[str, Any]
) -> TrainConfig:
    """Returns the settings of a run resumed from `folder`: those saved, changed by `options`.

    Raises ConfigError, which shows the difference, for an option that contradicts the run.
    """
    saved, given = state.train, merged(options)
    for name in ("device", "dtype"):
        if given.get(name) == AUTO:
            del given[name]
    for name in (*PATHS, "tokenizer"):
        if not given.get(name) or given[name] in BUILT_IN:
            continue
        path = os.path.abspath(given[name])  # new_config has saved absolute paths
        if OPTIONS[name].resumable or getattr(saved, name) == path:
            given[name] = path
    if "steps" in given or TOKENS_PER_PARAM in given:
        given["steps"] = _step_count({**saved.to_dict(), **given}, state.model)
        given.pop(TOKENS_PER_PARAM, None)
    changed = {name for name, value in given.items() if getattr(saved, name) != value}
    if fixed := [name for name in OPTIONS if name in changed and not OPTIONS[name].resumable]:
        differences = "; ".join(
            f"{OPTIONS[name].flag} is {getattr(saved, name)!r} in the run, "
            f"{given[name]!r} was given"
            for name in fixed
        )
        raise ConfigError(
            f"a resumed run keeps the settings that it was started with: {differences}; leave out "
            f"{', '.join(OPTIONS[name].flag for name in fixed)}"
        )
    if "device" in changed:
        given = {"dtype": "fp32", **given}  # the only dtype that every device has
    if changed & {"device", "dtype"}:
        given = {"tf32": False, **given}
    config = with_own_tokenizer(replace(saved, **given, run_dir=str(folder.parent)), folder)
    choose_dtype(config.dtype, open_device(config.device))
    return config


def with_own_tokenizer(config: TrainConfig, folder: Path) -> TrainConfig:
    """Returns the settings, with the checkpoint's tokenizer if the file they name is gone."""
    if is_path(config.tokenizer) and not os.path.exists(config.tokenizer):
        return replace(config, tokenizer=os.path.abspath(folder))
    return config


def rate_jump(saved: TrainConfig, config: TrainConfig, step: int) -> str:
    """Returns a warning if the options of a resumed run change the learning rate of its next step.

    Returns "" if the rate stays as it was.
    """
    before, after = learning_rate(step, saved), learning_rate(step, config)
    if step >= config.steps or math.isclose(before, after, rel_tol=1e-9):
        return ""
    advice = "a run with --lr-schedule wsd can be prolonged without a jump"
    if config.lr_schedule == "wsd":
        advice = f"resume from a checkpoint before step {decay_start(saved)} to avoid the jump"
    return (
        f"the learning rate jumps from {before:.3g} to {after:.3g} at step {step}, because the "
        f"schedule {config.lr_schedule} depends on --steps and --decay-fraction; {advice}"
    )


def _model(values: Mapping[str, Any]) -> ModelConfig:
    sizes = {name: values[name] for name in ("n_layer", "n_head", "n_embd", "context")}
    return model_config(values["model"], vocab_size_of(values["tokenizer"]), **sizes)


def _start_from(values: dict[str, Any], chosen: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Sets the values that follow from --init-from; returns sizes and longest seq_len."""
    name = chosen["init_from"]
    if contradicting := [OPTIONS[size].flag for size in SIZES if chosen.get(size)]:
        raise ConfigError(
            f"--init-from {name} has sizes of its own; leave out {', '.join(contradicting)} "
            f"(--seq-len cuts the sequences shorter)"
        )
    if not os.path.exists(values["init_from"]) and name in MODELS:
        raise ConfigError(
            f"--init-from {name}: there is no such file or folder, and {name} is the name of a "
            f"size; use --model {name} for random weights, or download weights first, as in: hf "
            f"download openai-community/gpt2 --local-dir gpt2, then --init-from ./gpt2"
        )
    source = open_model(values["init_from"])
    values["model"] = ""
    values["tokenizer"] = _tokenizer_spec(source, chosen.get("tokenizer"), name)
    if "lr" not in chosen:
        values["lr"] *= FINE_TUNING_LR_FRACTION
    return source.config, checkpoint.trained_seq_len(source.folder, source.config)


def _tokenizer_spec(source: WeightSource, given: str | None, name: str) -> str:
    """Returns the tokenizer that belongs to a model, or the one `given` if it has its size."""
    if given is not None:
        if (size := vocab_size_of(given)) != source.config.vocab_size:
            raise ConfigError(
                f"--tokenizer {given} has {size} tokens, --init-from {name} "
                f"{source.config.vocab_size}; leave out --tokenizer to use the model's own"
            )
        return os.path.abspath(given) if is_path(given) else given
    own = tokenizer_of(source)  # raises DataError if there is none that fits
    return own.name if source.tokenizer_path is None else os.path.abspath(source.tokenizer_path)


def _step_count(values: Mapping[str, Any], model: ModelConfig) -> int:
    """Returns the number of optimizer steps, given as steps, epochs or `tokens_per_param`.

    Raises ConfigError if it is 0 or above MAX_STEPS.
    """
    total: int = values["total_batch_tokens"]
    ratio: float | None = values.get(TOKENS_PER_PARAM)
    if ratio:
        given = f"--tokens-per-param {ratio:g}"
        return math.ceil(_not_too_many(ratio * parameter_count(model) / total, given))
    steps: int | str = OPTIONS["steps"].check_given(values["steps"])
    if isinstance(steps, int):
        _not_too_many(steps, "--steps")
        return steps
    match = EPOCHS.fullmatch(steps)
    assert match
    data = prepare(values["data"], values["tokenizer"], values["val_data"])
    count = int(_not_too_many(float(match[1]) * sum(map(len, data.train)) / total, "--steps"))
    if count == 0:
        raise ConfigError(f"--steps {steps} of {data.name} are less than one optimizer step")
    return count


def _not_too_many(steps: float, given: str) -> float:
    """Returns a number of steps; raises ConfigError, which names `given`, if it is too large."""
    if steps > MAX_STEPS:
        raise ConfigError(f"{given} means more than {MAX_STEPS:,} steps; choose a shorter run")
    return steps


def _fitting(
    values: Mapping[str, Any], model: ModelConfig, recompute: int | None, device: Device
) -> dict[str, int]:
    """Returns the batch size and recompute level that best_fit chooses; `recompute` fixes it."""
    T, total = values["seq_len"], values["total_batch_tokens"]
    if total % T:
        raise ConfigError(
            f"--total-batch-tokens {total} is not a multiple of --seq-len {T}; choose one that is"
        )
    fit = best_fit(
        model,
        values["dtype"],
        T,
        device.free_memory,
        headroom=int(HEADROOM * device.free_memory),
        recompute=recompute,
        optimizer=values["optimizer"],
        host_copies=not device.is_gpu,
        sequences=total // T,
    )
    return {"batch_size": fit.batch_size, "recompute": fit.recompute}
