"""The command line: parses options, calls the library, prints errors as one line."""

from __future__ import annotations

import io
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpu_gpt2 import bench, check, checkpoint, info, layout
from gpu_gpt2.config import MODELS, TRAIN_DEFAULTS, TrainConfig
from gpu_gpt2.data.corpus import BUILT_IN
from gpu_gpt2.device.select import DEVICES, choose_dtype, open_device
from gpu_gpt2.errors import CheckpointError, ConfigError, UserError
from gpu_gpt2.formats.hf import load_model
from gpu_gpt2.generate import generate as generate_tokens
from gpu_gpt2.model import GPT2
from gpu_gpt2.ops.select import ops_for
from gpu_gpt2.tokenizer import Tokenizer
from gpu_gpt2.train import train as run_training

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train GPT-2 with CUDA C kernels you can read.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench_app, name="bench")

console = Console()

RUNS: Final = Path("runs")
INTERRUPTED: Final = 130  # exit status after Ctrl-C, by convention
RESUMABLE: Final = {"device", "dtype", "steps", "eval_every", "sample_every"}  # may change

Device = Annotated[str, typer.Option(help=f"{' | '.join(DEVICES)}")]
Dtype = Annotated[str, typer.Option(help="auto | fp32 | bf16")]


def main() -> None:
    """Entry point of the command `gpu-gpt2`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal has no letters for
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"out of memory ({error}); lower --batch-size, --seq-len or --model")


def _fail(message: str) -> NoReturn:
    text = f"gpu-gpt2: {message}"
    Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)
    sys.exit(1)


@app.command()
def train(
    data: Annotated[
        str | None, typer.Option(help="python-docs, a text file, or a token file (.bin)")
    ] = None,
    model: Annotated[str | None, typer.Option(help=" | ".join(MODELS))] = None,
    tokenizer: Annotated[str | None, typer.Option(help="gpt2 | bytes | bpe:N")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences at a time.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    total_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in one update, over several batches if need be.")
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
            ("batch_size", batch_size), ("seq_len", seq_len), ("lr", lr),
            ("total_batch_tokens", total_batch_tokens), ("warmup_steps", warmup_steps),
            ("weight_decay", weight_decay), ("eval_every", eval_every),
            ("sample_every", sample_every), ("seed", seed),
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
        _say(f"going on from {folder}")
    else:
        config = _new_config(given, device, dtype, run_dir)
    outcome = run_training(config, console, state)
    run = shlex.quote(config.run_dir)
    if outcome.interrupted:
        _say(f"stopped at step {outcome.step}; go on with: gpu-gpt2 train --resume --run-dir {run}")
        raise typer.Exit(INTERRUPTED)
    _say(f"saved {outcome.checkpoint}")
    _say(f'try it: gpu-gpt2 generate {run} --prompt "The "')


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run, a checkpoint or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Length of what follows.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest; 0 = all.")] = 40,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a prompt with a trained model."""
    folder = checkpoint.latest(run)
    config, weights = load_model(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json "
            f"{config.vocab_size}; they belong to different models"
        )
    tokens = tokenizer.encode(prompt)
    tokens = np.concatenate([np.array([tokenizer.eot], np.int32), tokens.astype(np.int32)])
    place = open_device(device)
    dtype = choose_dtype(dtype, place)
    model = GPT2(
        config,
        ops_for(place, dtype, layout.widest(config)),
        dtype=dtype,
        max_batch=1,
        max_seq_len=checkpoint.trained_seq_len(folder, config),
        training=False,
    )
    model.load(weights)
    pieces = [tokenizer.decode_bytes(tokens[1:])]
    for token in generate_tokens(
        model, tokens, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    ):
        if token == tokenizer.eot:
            break
        pieces.append(tokenizer.decode_bytes([token]))
    typer.echo(b"".join(pieces).decode(errors="replace"))


@app.command("info")
def show_info() -> None:
    """Say what is on this machine and what would be used."""
    rows, advice = info.report()
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in advice:
        _say(f"! {line}")


@app.command("check")
def check_ops(device: Device = "auto", dtype: Dtype = "auto") -> None:
    """Run every op against the NumPy reference in float64; exit 1 if one is off."""
    place = open_device(device)
    dtypes = ["fp32"] if place.name == "cpu" else ["fp32", "bf16"]
    if dtype != "auto":
        dtypes = [choose_dtype(dtype, place)]
    cases = (*check.CASES, *check.LARGE_CASES) if place.name == "cuda" else check.CASES
    widest = check.widest_column_sum(cases)
    results = []
    for result in track(
        check.run_checks(lambda x: ops_for(place, x, widest), dtypes, cases),
        description=f"checking on {place.name}",
        total=None,
        console=console,
        transient=True,
    ):
        results.append(result)
    console.print(check.table(results))
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} checks passed on {place.name}")
    if failed:
        raise typer.Exit(1)


@bench_app.command("step")
def bench_step(
    device: Device = "auto",
    dtype: Dtype = "auto",
    model: Annotated[str, typer.Option(help=" | ".join(MODELS))] = "d12",
    batch_size: Annotated[int, typer.Option(help="Sequences.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps to take the median of, at least 5.")] = 5,
) -> None:
    """Time a whole training step, and the same in PyTorch if it is installed."""
    result = bench.training_step(device, dtype, model, batch_size, seq_len, steps)
    console.print(bench.render(result))


def _new_config(
    given: dict[str, Any], device: str, dtype: str, run_dir: Path | None
) -> TrainConfig:
    place = open_device(device)
    defaults = TRAIN_DEFAULTS[place.name]
    values = {"data": "python-docs", "seed": 1337, **defaults, **given}
    if "seq_len" not in given and values["model"] in MODELS:
        values["seq_len"] = min(values["seq_len"], MODELS[values["model"]].n_positions)
    if values["data"] not in BUILT_IN:
        values["data"] = os.path.abspath(values["data"])  # --resume may come from elsewhere
    micro = values["batch_size"] * values["seq_len"]
    if "total_batch_tokens" not in given and values["total_batch_tokens"] % max(1, micro):
        values["total_batch_tokens"] = micro
    if run_dir is None:
        run_dir = _next_run()
    elif checkpoint.checkpoints(run_dir):
        raise ConfigError(
            f"{run_dir} already holds a run; go on with it by --resume, or choose another --run-dir"
        )
    return TrainConfig(
        **values, device=place.name, dtype=choose_dtype(dtype, place), run_dir=str(run_dir)
    )


def _resumed_config(
    saved: TrainConfig, given: dict[str, Any], device: str, dtype: str
) -> TrainConfig:
    if device != "auto":
        given["device"] = device
    if dtype != "auto":
        given["dtype"] = dtype
    changed = {name for name, value in given.items() if getattr(saved, name) != value}
    if fixed := sorted(changed - RESUMABLE):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise ConfigError(f"a run goes on with the settings it began with; leave out {names}")
    config = replace(saved, **given)
    if config.device != saved.device and dtype == "auto":
        config = replace(config, dtype="fp32")  # what every device has
    choose_dtype(config.dtype, open_device(config.device))
    return config


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _next_run() -> Path:
    """The first unused runs/NNN."""
    taken = {int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()}
    return RUNS / f"{max(taken, default=0) + 1:03d}"


def _newest_run() -> Path:
    runs = [path for path in RUNS.glob("*") if path.name.isdecimal()]
    if not runs:
        raise ConfigError("there is no run in runs/ to go on with; name one with --run-dir")
    return max(runs, key=lambda path: int(path.name))
