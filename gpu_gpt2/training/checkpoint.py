"""Checkpoints of a run. Each is written whole or not at all, and the newest two are kept.

A checkpoint is the folder RUN/step_00000500: a Hugging Face GPT-2 folder with its tokenizer, plus
optimizer.safetensors (m.* and v.* of every parameter) and training.json. It is written under a
hidden name and renamed when every byte is on the disk, so a folder with the final name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeGuard

import numpy as np

from gpu_gpt2.config import ModelConfig, TrainConfig
from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.formats import hf
from gpu_gpt2.formats.files import sync
from gpu_gpt2.formats.hf import CONFIG_FILE, MODEL_FILE, read_json
from gpu_gpt2.formats.safetensors import TensorFile, TensorWriter
from gpu_gpt2.models.gpt2 import parameter_count
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named
from gpu_gpt2.training.optimizer import UpdateState

OPTIMIZER_FILE: Final = "optimizer.safetensors"
TRAINING_FILE: Final = "training.json"
FORMAT_VERSION: Final = 2
KEPT: Final = 2  # checkpoints of a run: the newest, and one to fall back on

_STEP_FOLDER: Final = re.compile(r"step_(\d{8,})")
# The old checkpoint of a step, under a hidden name while the step is saved again.
_REPLACED_FOLDER: Final = re.compile(r"\.(step_\d{8,})\.old")
_SMALL_FILES: Final = 4 << 20  # bytes for JSON and headers; GPT-2's tokenizer.json takes most
_ADVICE: Final[Mapping[int | None, str]] = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f unlimited)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Everything that survives a restart; arrays are parameter arenas (n,) float32 on the host."""

    model: ModelConfig
    train: TrainConfig
    step: int  # optimizer steps taken
    tokens: int  # tokens trained on so far
    loader: Mapping[str, Any]  # the state of the data loader, as JSON can hold it
    weights: FloatArray  # master weights; the padding rows of wte are loaded as zeros
    m: FloatArray
    v: FloatArray
    update: UpdateState


class Tokenizer(Protocol):
    """The part of a tokenizer that a checkpoint needs: one that can be saved beside the model."""

    @property
    def eot(self) -> int: ...

    def save(self, folder: Path) -> None: ...


def save(run_dir: Path, state: TrainingState, tokenizer: Tokenizer) -> Path:
    """Writes the state as a new checkpoint of the run, removes the oldest, returns its folder.

    A checkpoint of the same step is replaced. After any failure earlier checkpoints are intact, and
    nothing half-written is left. Raises CheckpointError if the disk refuses it.
    """
    folder = run_dir / f"step_{state.step:08d}"
    temporary = run_dir / f".{folder.name}.tmp"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(run_dir)
        _write(temporary, state, tokenizer)
        _publish(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(_not_written(folder, error, state.model)) from error
        raise
    _prune(run_dir, written=folder)
    return folder


def load(folder: Path) -> TrainingState:
    """Returns the state saved in a checkpoint folder, all of it checked.

    Raises CheckpointError, or DataError where a file is damaged.
    """
    training = read_json(folder / TRAINING_FILE)
    where = folder / TRAINING_FILE
    if training.get("format_version") == 1:
        training = _from_version_1(training)
    if training.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {training.get('format_version')!r}, expected "
            f"{FORMAT_VERSION}; this checkpoint needs another version of gpu-gpt2"
        )
    kinds = {"step": int, "tokens": int, "loader": dict, "train": dict, "update": dict}
    for name, kind in kinds.items():
        if type(training.get(name)) is not kind:
            raise CheckpointError(f"{where}: {name} is missing or not of type {kind.__name__}")
    if training["step"] < 0 or training["tokens"] < 0:
        raise CheckpointError(f"{where}: step and tokens must not be negative")
    try:
        train = TrainConfig.from_dict(training["train"])
        update = UpdateState(**training["update"])
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except TypeError as error:
        raise CheckpointError(
            f"{where}: update must be updates, good_steps and loss_scale, not "
            f"{', '.join(training['update']) or 'nothing'}"
        ) from error
    source = hf.open_folder(folder)
    m, v = _load_moments(folder / OPTIMIZER_FILE, source.config)
    return TrainingState(
        model=source.config,
        train=train,
        step=training["step"],
        tokens=training["tokens"],
        loader=training["loader"],
        weights=load_arena(source),
        m=m,
        v=v,
        update=update,
    )


def _from_version_1(training: dict[str, Any]) -> dict[str, Any]:
    """Returns a training.json of version 1 as version 2 names things."""
    update = training.pop("counts", None)
    if isinstance(update, dict) and "in_a_row" in update:
        update["good_steps"] = update.pop("in_a_row")
    return training | {"format_version": 2, "update": update}


def latest(path: Path) -> Path:
    """Returns the newest complete checkpoint of a run, or `path` itself if it holds a model.

    Raises CheckpointError.
    """
    if hf.holds_model(path):
        return path
    if found := checkpoints(path):
        return found[-1]
    raise CheckpointError(
        f"{path}: no checkpoint here; make one with: gpu-gpt2 train --run-dir "
        f"{shlex.quote(str(path))}"
    )


def saved_settings(folder: Path | None) -> TrainConfig | None:
    """Returns the settings of the run that wrote a checkpoint, or None for any other folder.

    Raises CheckpointError.
    """
    if not _is_ours(folder):
        return None
    values = read_json(folder / TRAINING_FILE).get("train")
    try:
        return TrainConfig.from_dict(values if isinstance(values, dict) else {})
    except ConfigError as error:
        raise CheckpointError(f"{folder / TRAINING_FILE}: {error}") from error


def trained_seq_len(folder: Path | None, model: ModelConfig) -> int:
    """Returns the length of the sequences that a model was trained on.

    Position embeddings beyond it are untrained. Where there is no checkpoint of ours, it is the
    whole context of the model.
    """
    if not _is_ours(folder):
        return model.n_positions
    train = read_json(folder / TRAINING_FILE).get("train")
    seq_len = train.get("seq_len") if isinstance(train, dict) else None
    if type(seq_len) is not int or not 1 <= seq_len <= model.n_positions:
        raise CheckpointError(f"{folder / TRAINING_FILE}: seq_len is {seq_len!r}")
    return seq_len


def checkpoints(run_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest step first."""
    found: dict[int, Path] = {}
    try:
        # Hidden names sort first, so a replaced checkpoint counts only if its successor is missing.
        for entry in sorted(run_dir.iterdir()):
            name = _REPLACED_FOLDER.sub(r"\1", entry.name)
            if (match := _STEP_FOLDER.fullmatch(name)) and _is_complete(entry):
                found[int(match.group(1))] = entry
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot be listed: {error.strerror}") from error
    return [found[step] for step in sorted(found)]


def bytes_needed(model: ModelConfig) -> int:
    """Returns an upper bound of the bytes of one checkpoint; during a save there are three."""
    return 3 * np.dtype(np.float32).itemsize * parameter_count(model) + _SMALL_FILES


def _write(folder: Path, state: TrainingState, tokenizer: Tokenizer) -> None:
    """Writes all files of a checkpoint and waits until they are on the disk."""
    hf.write_model(folder, Arena(state.model, state.weights, tokenizer.eot))
    tokenizer.save(folder)
    moments = _moments(state.model, state.m, state.v)
    with (folder / OPTIMIZER_FILE).open("wb") as file:
        shapes = {name: tensor.shape for name, tensor in moments.items()}
        writer = TensorWriter(file, shapes, np.dtype(np.float32))
        for name, tensor in moments.items():
            writer.write(name, tensor)
    training = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "tokens": state.tokens,
        "loader": state.loader,
        "update": asdict(state.update),
        "train": state.train.to_dict(),
    }
    (folder / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def _publish(temporary: Path, folder: Path) -> None:
    """Renames a complete folder to its final name; at all times one checkpoint is complete."""
    replaced = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_leftovers(run_dir: Path) -> None:
    """Removes incomplete folders that a crash left, and restores a checkpoint put aside."""
    for entry in list(run_dir.iterdir()):
        if match := _REPLACED_FOLDER.fullmatch(entry.name):
            folder = run_dir / match.group(1)
            if folder.exists():
                shutil.rmtree(entry)
            else:
                entry.rename(folder)
        elif entry.name.endswith(".tmp") and _STEP_FOLDER.fullmatch(entry.name[1:-4]):
            shutil.rmtree(entry)


def _prune(run_dir: Path, written: Path) -> None:
    """Removes all but the newest KEPT checkpoints, but never the one just written."""
    older = [folder for folder in checkpoints(run_dir) if folder != written]
    for folder in older[: len(older) - (KEPT - 1)]:
        # Renamed first, because a folder that is half removed must not look like a checkpoint.
        hidden = folder.with_name(f".{folder.name}.tmp")
        with contextlib.suppress(OSError):  # one checkpoint too many must not stop training
            folder.rename(hidden)
            shutil.rmtree(hidden)


def _moments(model: ModelConfig, m: FloatArray, v: FloatArray) -> dict[str, FloatArray]:
    """Returns views of both arenas by their names on disk: m.wte, v.wte and so on."""
    arenas = {"m": m, "v": v}
    return {
        f"{kind}.{name}": tensor
        for kind, arena in arenas.items()
        for name, tensor in named(model, arena).items()
    }


def _load_moments(path: Path, model: ModelConfig) -> tuple[FloatArray, FloatArray]:
    file = TensorFile(path)
    m, v = (np.zeros(parameter_count(model), np.float32) for _ in range(2))
    tensors = _moments(model, m, v)
    for name, tensor in tensors.items():
        file.check(name, tensor.shape)
        tensor[...] = file.read(name)
    if others := sorted(file.names - tensors.keys()):
        raise CheckpointError(
            f"{path}: {others[0]!r} ({len(others)} such) is not a moment of this model's weights"
        )
    return m, v


def _is_ours(folder: Path | None) -> TypeGuard[Path]:
    """Returns True if the folder has a training.json, which only our checkpoints have."""
    return folder is not None and os.path.isfile(folder / TRAINING_FILE)


def _is_complete(folder: Path) -> bool:
    files = (MODEL_FILE, CONFIG_FILE, OPTIMIZER_FILE, TRAINING_FILE)
    return all(os.path.isfile(folder / name) for name in files)


def _not_written(folder: Path, error: OSError, model: ModelConfig) -> str:
    """Returns the error message for a checkpoint that could not be written."""
    run_dir = folder.parent
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = checkpoints(run_dir)
    earlier = f"{found[-1].name} is intact" if found else "there is no earlier checkpoint"
    advice = _ADVICE.get(error.errno, "make the folder writable")
    again = f"gpu-gpt2 train --run-dir {shlex.quote(str(run_dir))}{' --resume' if found else ''}"
    sizes = f"up to {bytes_needed(model) / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
    return (
        f"cannot write checkpoint {folder}: {error.strerror or error} ({sizes}); {earlier}; "
        f"{advice}, then: {again}"
    )
