"""`gpu-gpt2 train`: from options to a run."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gpu_gpt2.cli.common import INTERRUPTED, Device, Dtype, console, say
from gpu_gpt2.config import (
    MAX_RECOMPUTE,
    MODEL_NAMES,
    MODELS,
    TRAIN_DEFAULTS,
    TrainConfig,
    model_config,
)
from gpu_gpt2.data.corpus import BUILT_IN
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.tokenizer import is_path, vocab_size_of
from gpu_gpt2.train import train as run_training
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.memory import best_fit

RUNS: Final = Path("runs")
AUTO: Final = "auto"
SPARE_MEMORY: Final = 0.05  # of what is free, left alone by --batch-size auto
# What may change when a run goes on.
RESUMABLE: Final = {"device", "dtype", "steps", "eval_every", "sample_every", "recompute", "tf32"}


def train(
    data: Annotated[
        str | None, typer.Option(help="python-docs, a text file, or token files.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL_NAMES)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2 | bytes | bpe:N | a tokenizer's file or folder")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tf32: Annotated[
        bool, typer.Option("--tf32", help="With fp32 on a GPU: faster, less exact products.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Sequences at a time; auto: as many as fit into memory.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    total_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in one update, over several batches if need be.")
    ] = None,
    recompute: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_RECOMPUTE, help="Less memory for more work: 1 and 2 a little, 3 a third."
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps to reach it.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the matrices.")] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoint and validation; 0 = at the end.")
    ] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between samples; 0 = at the end.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data order.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run goes; else runs/001, runs/002 ...")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run (the newest).")] = False,
) -> None:
    """Train a model. Without options: GPT-2 124M on a GPU, a small one on a CPU."""
    given = {
        name: value
        for name, value in (
            ("data", data), ("model", model), ("tokenizer", tokenizer), ("steps", steps),
            ("batch_size", _batch_size(batch_size)), ("seq_len", seq_len), ("lr", lr),
            ("total_batch_tokens", total_batch_tokens), ("warmup_steps", warmup_steps),
            ("recompute", recompute),
            ("weight_decay", weight_decay), ("eval_every", eval_every),
            ("sample_every", sample_every), ("seed", seed), ("tf32", tf32 or None),
        )
        if value is not None
    }  # fmt: skip
    state = None
    if resume:
        folder = checkpoint.latest(run_dir or _newest_run())
        state = checkpoint.load(folder)
        config = _resumed_config(state.train, given, device, dtype)
        config = replace(config, run_dir=str(folder.parent))
        if state.step >= config.steps:
            raise ConfigError(f"{folder} is at step {state.step} already; give a higher --steps")
        say(f"going on from {folder}")
    else:
        config = _new_config(given, device, dtype, run_dir)
    outcome = run_training(config, console, state)
    run = shlex.quote(config.run_dir)
    if outcome.interrupted:
        say(f"stopped at step {outcome.step}; go on with: gpu-gpt2 train --resume --run-dir {run}")
        raise typer.Exit(INTERRUPTED)
    say(f"saved {outcome.checkpoint}")
    say(f'try it: gpu-gpt2 generate {run} --prompt "The "')


def _new_config(
    given: dict[str, Any], device: str, dtype: str, run_dir: Path | None
) -> TrainConfig:
    place = open_device(device)
    defaults = TRAIN_DEFAULTS[place.name]
    values = {"data": "python-docs", "seed": 42, **defaults, **given}
    if "seq_len" not in given and values["model"] in MODELS:
        values["seq_len"] = min(values["seq_len"], MODELS[values["model"]].n_positions)
    if values["data"] not in BUILT_IN:
        values["data"] = os.path.abspath(values["data"])  # --resume may come from elsewhere
    if is_path(values["tokenizer"]):
        values["tokenizer"] = os.path.abspath(values["tokenizer"])
    dtype = choose_dtype(dtype, place)
    if values["batch_size"] == AUTO:
        values |= _fitting(values, dtype, place.free_memory)
    micro = values["batch_size"] * values["seq_len"]
    if "total_batch_tokens" not in given and values["total_batch_tokens"] % max(1, micro):
        values["total_batch_tokens"] = micro
    if run_dir is None:
        run_dir = _next_run()
    elif checkpoint.checkpoints(run_dir):
        raise ConfigError(
            f"{run_dir} already holds a run; go on with it by --resume, or choose another --run-dir"
        )
    return TrainConfig(**values, device=place.name, dtype=dtype, run_dir=str(run_dir))


def _batch_size(text: str | None) -> int | str | None:
    if text is None or text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--batch-size is {text!r}; give a number, or auto") from None


def _fitting(values: dict[str, Any], dtype: str, free_memory: int) -> dict[str, int]:
    """The batch size and recompute level of best_fit for this much memory."""
    T, total = values["seq_len"], values["total_batch_tokens"]
    if T < 1:
        raise ConfigError(f"--seq-len is {T}; it must be at least 1")
    if total < T or total % T:
        raise ConfigError(
            f"--total-batch-tokens {total} is not a multiple of --seq-len {T}; choose one that is"
        )
    fit = best_fit(
        model_config(values["model"], vocab_size_of(values["tokenizer"])),
        dtype,
        T,
        free_memory,
        reserved=int(SPARE_MEMORY * free_memory),
        recompute=values.get("recompute"),
        sequences=total // T,
    )
    return {"batch_size": fit.batch_size, "recompute": fit.recompute}


def _resumed_config(
    saved: TrainConfig, given: dict[str, Any], device: str, dtype: str
) -> TrainConfig:
    for name in ("data", "tokenizer"):
        if name in given and getattr(saved, name) == os.path.abspath(given[name]):
            given[name] = os.path.abspath(given[name])
    if device != "auto":
        given["device"] = device
    if dtype != "auto":
        given["dtype"] = dtype
    changed = {name for name, value in given.items() if getattr(saved, name) != value}
    if fixed := sorted(changed - RESUMABLE):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise ConfigError(f"a run goes on with the settings it began with; leave out {names}")
    if given.get("device", saved.device) != saved.device:
        given = {"dtype": "fp32", **given}  # what every device has
    if not {"device", "dtype"}.isdisjoint(changed):
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
        raise ConfigError("there is no run in runs/ to go on with; name one with --run-dir")
    return max(runs, key=lambda path: int(path.name))
