"""Checkpoints of a run: written whole or not at all, the newest two kept.

A checkpoint is the folder RUN/step_00000500: a Hugging Face GPT-2 folder with its tokenizer, plus
optimizer.safetensors (m.* and v.* of every parameter) and training.json. It is written under a
hidden name and renamed when every byte is on the disk, so what bears the final name is complete.
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
from typing import Any, Final, Protocol

import numpy as np

from gpu_gpt2.config import ModelConfig, TrainConfig
from gpu_gpt2.errors import CheckpointError, ConfigError
from gpu_gpt2.formats import hf
from gpu_gpt2.formats.files import sync
from gpu_gpt2.formats.hf import CONFIG_FILE, MODEL_FILE, read_json
from gpu_gpt2.formats.safetensors import TensorFile, TensorWriter
from gpu_gpt2.models.gpt2 import parameter_count
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named
from gpu_gpt2.training.optimizer import UpdateCounts

OPTIMIZER_FILE: Final = "optimizer.safetensors"
TRAINING_FILE: Final = "training.json"
FORMAT_VERSION: Final = 1
KEPT: Final = 2  # the newest, and one to fall back on

_STEP_FOLDER: Final = re.compile(r"step_(\d{8,})")
_REPLACED_FOLDER: Final = re.compile(r"\.(step_\d{8,})\.old")  # while a step is saved again
_SMALL_FILES: Final = 4 << 20  # bytes: JSON and headers; GPT-2's tokenizer.json is most of it
_ADVICE: Final[Mapping[int | None, str]] = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f unlimited)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """All that survives a restart; arrays are parameter arenas (n,) float32 on the host."""

    model: ModelConfig
    train: TrainConfig
    step: int  # optimizer steps taken
    tokens: int  # trained on so far
    loader: Mapping[str, Any]  # where the data loader stands, as JSON can hold it
    weights: FloatArray  # the masters; the padding rows of wte come back as zeros
    m: FloatArray
    v: FloatArray
    counts: UpdateCounts


class Tokenizer(Protocol):
    """What a checkpoint asks of the tokenizer it carries."""

    @property
    def eot(self) -> int: ...

    def save(self, folder: Path) -> None: ...


def save(run_dir: Path, state: TrainingState, tokenizer: Tokenizer) -> Path:
    """Writes the state as a new checkpoint of the run, drops the oldest, returns its folder.

    A checkpoint of the same step is replaced. On any failure earlier checkpoints stay and nothing
    half-written is left. Raises CheckpointError when the disk does not take it.
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
    """The state saved in a checkpoint folder, all of it checked.

    Raises CheckpointError, or DataError where a file is damaged.
    """
    training = read_json(folder / TRAINING_FILE)
    where = folder / TRAINING_FILE
    if training.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {training.get('format_version')!r}, expected "
            f"{FORMAT_VERSION}; this checkpoint needs another version of gpu-gpt2"
        )
    kinds = {"step": int, "tokens": int, "loader": dict, "train": dict, "counts": dict}
    for name, kind in kinds.items():
        if type(training.get(name)) is not kind:
            raise CheckpointError(f"{where}: {name} is missing or not of type {kind.__name__}")
    if training["step"] < 0 or training["tokens"] < 0:
        raise CheckpointError(f"{where}: step and tokens must not be negative")
    try:
        train = TrainConfig.from_dict(training["train"])
        counts = UpdateCounts(**training["counts"])
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except TypeError as error:
        raise CheckpointError(
            f"{where}: counts must be updates, in_a_row and loss_scale, not "
            f"{', '.join(training['counts']) or 'nothing'}"
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
        counts=counts,
    )


def latest(path: Path) -> Path:
    """The newest complete checkpoint of a run folder, or `path` itself if it holds a model.

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


def trained_seq_len(folder: Path | None, model: ModelConfig) -> int:
    """The longest text the model has seen: beyond it, its position embeddings are untrained.

    Where there is no checkpoint of ours to tell, it is the model's whole context.
    """
    if folder is None or not os.path.isfile(folder / TRAINING_FILE):
        return model.n_positions
    train = read_json(folder / TRAINING_FILE).get("train")
    seq_len = train.get("seq_len") if isinstance(train, dict) else None
    if type(seq_len) is not int or not 1 <= seq_len <= model.n_positions:
        raise CheckpointError(f"{folder / TRAINING_FILE}: seq_len is {seq_len!r}")
    return seq_len


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    found: dict[int, Path] = {}
    try:
        # Hidden names sort first: a replaced checkpoint counts only where its successor is missing.
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
    """An upper bound of the bytes of one checkpoint; while one is saved, three exist."""
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
        "counts": asdict(state.counts),
        "train": state.train.to_dict(),
    }
    (folder / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def _publish(temporary: Path, folder: Path) -> None:
    """Gives a complete folder its final name; at every moment one complete checkpoint has one."""
    replaced = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_leftovers(run_dir: Path) -> None:
    """Removes what a crash left behind, after bringing back a checkpoint it had put aside."""
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
    """Removes all but the newest checkpoints, never the one just written."""
    older = [folder for folder in checkpoints(run_dir) if folder != written]
    for folder in older[: len(older) - (KEPT - 1)]:
        # Hidden first: a folder that is half removed must not pass for a checkpoint.
        hidden = folder.with_name(f".{folder.name}.tmp")
        with contextlib.suppress(OSError):  # a checkpoint too many is no reason to stop training
            folder.rename(hidden)
            shutil.rmtree(hidden)


def _moments(model: ModelConfig, m: FloatArray, v: FloatArray) -> dict[str, FloatArray]:
    """Views of both arenas by the names they have on disk: m.wte, v.wte and so on."""
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


def _is_complete(folder: Path) -> bool:
    files = (MODEL_FILE, CONFIG_FILE, OPTIMIZER_FILE, TRAINING_FILE)
    return all(os.path.isfile(folder / name) for name in files)


def _not_written(folder: Path, error: OSError, model: ModelConfig) -> str:
    """What the user reads when a checkpoint could not be written."""
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
