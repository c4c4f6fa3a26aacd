"""`gpu-gpt2 train`: reads the options, and starts or resumes a run."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gpu_gpt2.cli.common import INTERRUPTED, console, say, shared_option
from gpu_gpt2.cli.help import GroupedOptions
from gpu_gpt2.config import (
    AUTO,
    DEFAULTS,
    OPTIONS,
    TOKENS_PER_PARAM,
    device_defaults,
    named_presets,
    read_preset,
    read_settings,
    settings_text,
)
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.settings import merged, new_config, rate_jump, resumed_config
from gpu_gpt2.train import train as run_training
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.metrics import has_final_records

RUNS: Final = Path("runs")


class TrainCommand(GroupedOptions):
    """`gpu-gpt2 train`, whose help shows the defaults of this machine."""

    def default_texts(self) -> Mapping[str, str]:
        try:
            device = open_device(AUTO)
            dtype = choose_dtype(AUTO, device)
        except Exception:  # the help must work with a broken CUDA installation too
            device, dtype = CpuDevice(), "fp32"
        return {
            **{
                name: f"default: {value}"
                for name, value in DEFAULTS.items()
                if value is not False and value != ""
            },
            **{
                name: f"default on {device.name}: {value}"
                for name, value in device_defaults(device.name).items()
            },
            "device": f"default: {AUTO}, here {device.name}",
            "dtype": f"default: {AUTO}, here {dtype}",
        }


def train(
    *,
    resume: bool,
    preset: str | None,
    config: Path | None,
    tokens_per_param: float | None,
    **options: Any,
) -> None:
    """Train a GPT-2 or a Llama. Without options: GPT-2 124M on a GPU, a small GPT-2 on a CPU."""
    given = {name: value for name, value in options.items() if value is not None}
    run_dir = Path(given.pop("run_dir")) if "run_dir" in given else None
    if tokens_per_param is not None:
        given[TOKENS_PER_PARAM] = tokens_per_param
    state = None
    if resume:
        if preset or config:
            raise ConfigError(
                "--resume keeps the settings of its run; leave out --preset, --config"
            )
        folder = checkpoint.latest(run_dir or _newest_run())
        if folder.resolve().parent.name == checkpoint.SET_ASIDE_FOLDER:
            raise ConfigError(
                f"{folder} was set aside when its run was resumed from an older checkpoint; copy "
                f"it into a folder of its own, for example NEW, then: gpu-gpt2 train --resume "
                f"--run-dir NEW"
            )
        state = checkpoint.load(folder)
        settings = resumed_config(state, folder, given)
        if state.step >= settings.steps and has_final_records(
            folder.parent, state.step, hellaswag=bool(settings.hellaswag)
        ):
            raise ConfigError(f"{folder} is at step {state.step} already; give a higher --steps")
        say(f"resuming from {folder}")
        if jump := rate_jump(state.train, settings, state.step):
            say(jump)
    else:
        chosen = _preset_settings(preset, config)
        if run_dir is not None and checkpoint.checkpoints(run_dir):
            raise ConfigError(
                f"{run_dir} already holds a run; resume it with --resume, or choose another "
                f"--run-dir"
            )
        settings = new_config(given, chosen, run_dir or _next_run())
        if chosen:
            say(settings_text(settings.to_dict()).rstrip())
    outcome = run_training(settings, console, state)
    run = shlex.quote(settings.run_dir)
    if outcome.interrupted:
        say(f"stopped at step {outcome.step}; resume with: gpu-gpt2 train --resume --run-dir {run}")
        raise typer.Exit(INTERRUPTED)
    say(f"saved {outcome.checkpoint}")
    say(f'try it: gpu-gpt2 generate {run} --prompt "The "')


def _signature() -> inspect.Signature:
    """Returns the parameters of `train` for Typer: every field of TrainConfig, and a few more."""
    fields = {
        # Some numbers may also be the word "auto" or a number of epochs, which are strings.
        option.name: (str if option.auto or option.in_epochs else option.kind) | None
        for option in OPTIONS.values()
    }
    options = {
        **{
            name: Annotated[kind, shared_option(name, auto=OPTIONS[name].auto)]
            for name, kind in fields.items()
        },
        **_other_options(),
    }
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name == "resume" else None,
                annotation=annotation,
            )
            for name, annotation in options.items()
        ]
    )


def _other_options() -> dict[str, Any]:
    """Returns the options that are no settings, because they choose settings: type and help."""
    may_change = ", ".join(option.flag for option in OPTIONS.values() if option.resumable)
    model, length, run = (OPTIONS[name].group for name in ("model", "steps", "run_dir"))
    preset = typer.Option(
        "--preset",
        help=f"Take the settings of a well-known run, except those that other options set: "
        f"{', '.join(named_presets())}.",
        metavar="NAME",
        rich_help_panel=model,
    )
    config = typer.Option(
        "--config",
        help="Take settings from a TOML file, such as the settings.toml of a run. They win over "
        "--preset, and options on the command line win over them.",
        metavar="FILE",
        rich_help_panel=model,
    )
    tokens_per_param = typer.Option(
        "--tokens-per-param",
        help="Length of the run, instead of --steps: tokens to train on for each parameter of the "
        "model. About 20 gives the lowest loss for a given number of flops (Hoffmann et al. 2022).",
        metavar="TOKENS",
        rich_help_panel=length,
        callback=_positive,
    )
    resume = typer.Option(
        "--resume",
        help=f"Resume the run in --run-dir from its newest checkpoint, or from the checkpoint that "
        f"--run-dir names. Default: the newest run in runs/. The run keeps its settings, of which "
        f"only these may change: {may_change}.",
        rich_help_panel=run,
    )
    return {
        "preset": Annotated[str | None, preset],
        "config": Annotated[Path | None, config],
        TOKENS_PER_PARAM: Annotated[float | None, tokens_per_param],
        "resume": Annotated[bool, resume],
    }


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"--tokens-per-param must be a number > 0, not {value}")
    return value


train.__signature__ = _signature()  # type: ignore[attr-defined]


def _preset_settings(preset: str | None, config: Path | None) -> dict[str, Any]:
    """Returns the settings of --preset and --config; those of the file win."""
    return merged(read_preset(preset) if preset else {}, read_settings(config) if config else {})


def _next_run() -> Path:
    """Returns the folder runs/NNN with the first unused number."""
    taken = {int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()}
    return RUNS / f"{max(taken, default=0) + 1:03d}"


def _newest_run() -> Path:
    runs = [path for path in RUNS.glob("*") if path.name.isdecimal()]
    if not runs:
        raise ConfigError("there is no run in runs/ to resume; name one with --run-dir")
    return max(runs, key=lambda path: int(path.name))
