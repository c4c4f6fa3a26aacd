"""Settings in TOML files: the defaults of each device, the named presets, and files of users."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gpu_gpt2.config.train import DEFAULTS, OPTIONS
from gpu_gpt2.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS_DIR: Final = Path(__file__).parents[1] / "presets"
TOKENS_PER_PARAM: Final = "tokens_per_param"  # a length of training, given instead of `steps`


@functools.cache
def device_defaults(device: str) -> Mapping[str, Any]:
    """Returns the defaults of `gpu-gpt2 train` that differ between devices.

    They are in the file presets/devices/`device`.toml.
    """
    path = PRESETS_DIR / "devices" / f"{device}.toml"
    values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    return values


def defaults_for(device: str) -> dict[str, Any]:
    """Returns every default of `gpu-gpt2 train` on "cuda", "cpu" or "emulator"."""
    return {**DEFAULTS, **device_defaults(device)}


def named_presets() -> dict[str, str]:
    """Returns a description of every preset by its name: the first line of its file."""
    return {
        path.stem: path.read_text("utf-8").splitlines()[0].removeprefix("# ")
        for path in sorted(PRESETS_DIR.glob("*.toml"), key=lambda path: path.stem)
    }


def read_preset(name: str) -> dict[str, Any]:
    """Returns the settings of a named preset. Raises ConfigError for an unknown name."""
    known = named_presets()
    if name not in known:
        raise ConfigError(
            f"unknown preset {name!r}{_nearest(name, known)}; choose one of {', '.join(known)}, or "
            f"name a file of your own with --config"
        )
    return read_settings(PRESETS_DIR / f"{name}.toml")


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings of a TOML file, each checked against its range.

    Keys are the fields of TrainConfig except `run_dir`. `steps` may be a text such as "2 epochs",
    and `tokens_per_param` may stand in its place. Raises ConfigError.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    known = [*(name for name in OPTIONS if name != "run_dir"), TOKENS_PER_PARAM]
    for name, value in values.items():
        if name not in known:
            where = "; the folder of a run is named with --run-dir" if name == "run_dir" else ""
            raise ConfigError(f"{path}: unknown setting {name!r}{_nearest(name, known)}{where}")
        if name in OPTIONS:
            try:
                OPTIONS[name].check_given(value)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error
        elif type(value) not in (int, float) or not value > 0:
            raise ConfigError(f"{path}: {name} must be a number > 0, not {value!r}")
    return values


def settings_text(values: Mapping[str, Any]) -> str:
    """Returns settings as TOML, one line each, which `read_settings` reads back."""
    # For strings, numbers and booleans, JSON and TOML have the same notation.
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items()
    )


def _nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    found = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
