"""`gpu-gpt2 train`: from options to a run."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gpu_gpt2.cli.common import INTERRUPTED, console, say, shared_option
from gpu_gpt2.cli.help import GroupedOptions
from gpu_gpt2.config import (
    AUTO,
    DEFAULTS,
    MODELS,
    OPTIONS,
    TrainConfig,
    defaults_for,
    model_config,
    preset,
)
from gpu_gpt2.data.corpus import BUILT_IN
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.tokenizer import is_path, vocab_size_of
from gpu_gpt2.train import train as run_training
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.memory import best_fit

RUNS: Final = Path("runs")
HEADROOM: Final = 0.05  # share of the free memory that --batch-size auto leaves for other programs


class TrainCommand(GroupedOptions):
    """`gpu-gpt2 train`, whose help shows the defaults of this machine."""

    def default_texts(self) -> Mapping[str, str]:
        try:
            device = open_device(AUTO)
            dtype = choose_dtype(AUTO, device)
        except Exception:  # a broken CUDA installation must not take the help away
            device, dtype = CpuDevice(), "fp32"
        return {
            **{name: f"default: {value}" for name, value in DEFAULTS.items() if value is not False},
            **{
                name: f"default on {device.name}: {value}"
                for name, value in preset(device.name).items()
            },
            "device": f"default: {AUTO}, here {device.name}",
            "dtype": f"default: {AUTO}, here {dtype}",
        }


def train(*, resume: bool, **options: Any) -> None:
    """Train a GPT-2. Without options: 124M parameters on a GPU, a small model on a CPU."""
    given = {name: value for name, value in options.items() if value is not None}
    run_dir = Path(given.pop("run_dir")) if "run_dir" in given else None
    state = None
    if resume:
        folder = checkpoint.latest(run_dir or _newest_run())
        state = checkpoint.load(folder)
        config = replace(_resumed_config(state.train, given), run_dir=str(folder.parent))
        if state.step >= config.steps:
            raise ConfigError(f"{folder} is at step {state.step} already; give a higher --steps")
        say(f"resuming from {folder}")
    else:
        config = _new_config(given, run_dir)
    outcome = run_training(config, console, state)
    run = shlex.quote(config.run_dir)
    if outcome.interrupted:
        say(f"stopped at step {outcome.step}; resume with: gpu-gpt2 train --resume --run-dir {run}")
        raise typer.Exit(INTERRUPTED)
    say(f"saved {outcome.checkpoint}")
    say(f'try it: gpu-gpt2 generate {run} --prompt "The "')


def _signature() -> inspect.Signature:
    """The parameters of `train` for Typer: one for each field of TrainConfig, and --resume."""

    def parameter(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
        annotation = Annotated[kind, option]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )

    may_change = ", ".join(option.flag for option in OPTIONS.values() if option.resumable)
    resume = typer.Option(
        "--resume",
        help=f"Resume the run in --run-dir from its newest checkpoint, with the settings it was "
        f"started with; only these may change: {may_change}.",
        rich_help_panel=OPTIONS["run_dir"].group,
    )
    fields = [
        parameter(
            option.name,
            (str if option.auto else option.kind) | None,  # as text it may be "auto"
            shared_option(option.name, auto=option.auto),
            None,
        )
        for option in OPTIONS.values()
    ]
    return inspect.Signature([*fields, parameter("resume", bool, resume, False)])


train.__signature__ = _signature()  # type: ignore[attr-defined]


def _new_config(given: Mapping[str, Any], run_dir: Path | None) -> TrainConfig:
    """The settings of a new run: those given, and this device's defaults for the others."""
    device = open_device(given.get("device", AUTO))
    dtype = choose_dtype(given.get("dtype", AUTO), device)
    values = {**defaults_for(device.name), **given, "device": device.name, "dtype": dtype}
    if "seq_len" not in given and values["model"] in MODELS:
        values["seq_len"] = min(values["seq_len"], MODELS[values["model"]].n_positions)
    if values["data"] not in BUILT_IN:
        values["data"] = os.path.abspath(values["data"])  # --resume may come from elsewhere
    if is_path(values["tokenizer"]):
        values["tokenizer"] = os.path.abspath(values["tokenizer"])
    if values["batch_size"] == AUTO:
        values |= _fitting(values, given.get("recompute"), device.free_memory)
    micro = values["batch_size"] * values["seq_len"]
    if "total_batch_tokens" not in given and values["total_batch_tokens"] % micro:
        values["total_batch_tokens"] = micro
    if run_dir is None:
        run_dir = _next_run()
    elif checkpoint.checkpoints(run_dir):
        raise ConfigError(
            f"{run_dir} already holds a run; resume it with --resume, or choose another --run-dir"
        )
    return TrainConfig(**values, run_dir=str(run_dir))


def _fitting(values: Mapping[str, Any], recompute: int | None, free_memory: int) -> dict[str, int]:
    """The batch size and recompute level of best_fit; `recompute` fixes the level."""
    T, total = values["seq_len"], values["total_batch_tokens"]
    if total % T:
        raise ConfigError(
            f"--total-batch-tokens {total} is not a multiple of --seq-len {T}; choose one that is"
        )
    fit = best_fit(
        model_config(values["model"], vocab_size_of(values["tokenizer"])),
        values["dtype"],
        T,
        free_memory,
        headroom=int(HEADROOM * free_memory),
        recompute=recompute,
        sequences=total // T,
    )
    return {"batch_size": fit.batch_size, "recompute": fit.recompute}


def _resumed_config(saved: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The settings of a resumed run: those saved, changed by the options that may change them."""
    given = dict(options)
    for name in ("device", "dtype"):
        if given.get(name) == AUTO:
            del given[name]
    for name in ("data", "tokenizer"):
        if name in given and getattr(saved, name) == os.path.abspath(given[name]):
            given[name] = os.path.abspath(given[name])
    changed = {name for name, value in given.items() if getattr(saved, name) != value}
    if fixed := sorted(OPTIONS[name].flag for name in changed if not OPTIONS[name].resumable):
        raise ConfigError(
            f"a resumed run keeps the settings that it was started with; leave out "
            f"{', '.join(fixed)}"
        )
    if "device" in changed:
        given = {"dtype": "fp32", **given}  # the one dtype of every device
    if changed & {"device", "dtype"}:
        given = {"tf32": False, **given}
    config = replace(saved, **given)
    choose_dtype(config.dtype, open_device(config.device))
    return config


def _next_run() -> Path:
    """The first unused runs/NNN."""
    taken = {int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()}
    return RUNS / f"{max(taken, default=0) + 1:03d}"


def _newest_run() -> Path:
    runs = [path for path in RUNS.glob("*") if path.name.isdecimal()]
    if not runs:
        raise ConfigError("there is no run in runs/ to resume; name one with --run-dir")
    return max(runs, key=lambda path: int(path.name))
