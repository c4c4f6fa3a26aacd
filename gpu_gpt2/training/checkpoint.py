"""Checkpoints of a run. Each is written whole or not at all, and read only if no bit is wrong.

A checkpoint is the folder RUN/step_00000500: a Hugging Face folder with its tokenizer, plus
optimizer.safetensors (m.* of every parameter, v.* of those that have a second moment),
training.json, and manifest.json with the SHA-256 of every other file. It is written under a hidden
name and renamed when every byte is on the disk, so a folder with the final name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
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

from gpu_gpt2.config import DEFAULTS, ModelConfig, TrainConfig
from gpu_gpt2.errors import CheckpointError, ConfigError, UserError
from gpu_gpt2.formats import hf
from gpu_gpt2.formats.files import sync
from gpu_gpt2.formats.hf import CONFIG_FILE, MODEL_FILE, read_json
from gpu_gpt2.formats.safetensors import TensorFile, TensorWriter
from gpu_gpt2.models.arena import element_count, flat_views
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import Arena, FloatArray, load_arena, named
from gpu_gpt2.training import manifest
from gpu_gpt2.training.manifest import MANIFEST_FILE, Digests
from gpu_gpt2.training.muon import OPTIMIZERS
from gpu_gpt2.training.optimizer import UpdateState

OPTIMIZER_FILE: Final = "optimizer.safetensors"
TRAINING_FILE: Final = "training.json"
FORMAT_VERSION: Final = 4
SET_ASIDE_FOLDER: Final = "set_aside"  # in a run: checkpoints that it no longer continues

_WITHOUT_MANIFEST: Final = (1, 2)  # versions of training.json beside which there is no manifest
# Files that every checkpoint has beside its manifest and its tokenizer.
_FILES: Final = (MODEL_FILE, CONFIG_FILE, OPTIMIZER_FILE, TRAINING_FILE)
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
    """Everything that survives a restart; arrays are parameter arenas float32 on the host.

    `weights` and `m` are (n,); `v` holds only the tensors of which the optimizer of `train` keeps a
    second moment.
    """

    model: ModelConfig
    train: TrainConfig
    step: int  # optimizer steps taken
    tokens: int  # tokens trained on so far
    loader: Mapping[str, Any]  # the state of the data loader, as JSON can hold it
    weights: FloatArray  # master weights; the padding rows of wte are loaded as zeros
    m: FloatArray
    v: FloatArray
    update: UpdateState


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The checkpoints of a run that `save` keeps beside the one that it writes."""

    last: int = 2  # number of newest checkpoints to keep, with the one just written; 0 keeps all
    every: int = 0  # the checkpoints of all steps divisible by it, as llm.c's "major" ones; 0: none
    best: int | None = None  # the checkpoint of this step

    def keeps(self, step: int) -> bool:
        """Returns True if the checkpoint of a step is kept however old it is."""
        return self.last == 0 or step == self.best or (self.every > 0 and step % self.every == 0)


NEWEST_TWO: Final = Retention()  # the newest checkpoint, and one to fall back on


class Tokenizer(Protocol):
    """The part of a tokenizer that a checkpoint needs: one that can be saved beside the model."""

    @property
    def eot(self) -> int: ...

    def save(self, folder: Path) -> None: ...


def save(
    run_dir: Path, state: TrainingState, tokenizer: Tokenizer, retention: Retention = NEWEST_TWO
) -> Path:
    """Writes the state as a new checkpoint of the run, and returns its folder.

    A checkpoint of the same step is replaced, and then those are removed that `retention` does not
    keep. After any failure earlier checkpoints are intact, and nothing half-written is left. Raises
    CheckpointError if the disk refuses it.
    """
    folder = folder_of(run_dir, state.step)
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
    _prune(run_dir, folder, retention)
    return folder


def load(folder: Path) -> TrainingState:
    """Returns the state saved in a checkpoint folder, of which every bit has been checked.

    Raises CheckpointError, or DataError where a file is missing or damaged in a checkpoint of
    version 1 or 2, which has no manifest. If an older checkpoint of the run is intact, the message
    ends with the command that resumes from it.
    """
    try:
        return _load(folder)
    except UserError as error:
        if older := _intact_before(folder):
            raise CheckpointError(
                f"{error}; {older.name} is intact, resume from it with: gpu-gpt2 train --resume "
                f"--run-dir {shlex.quote(str(older))}"
            ) from error
        raise


def verify(folder: Path, *, model_only: bool = False) -> bool:
    """Compares the files of a checkpoint with its manifest; returns False if it has no manifest.

    Hugging Face folders and checkpoints of versions 1 and 2 have none. With `model_only` the
    optimizer state and training.json are left out: the other files are the model and its tokenizer.
    Raises CheckpointError, which names the first file that differs.
    """
    expected = manifest.read(folder)
    if expected is None:
        if _is_ours(folder):
            _read_training(folder)  # refuses a checkpoint that has lost its manifest
        return False
    left_out = {OPTIMIZER_FILE, TRAINING_FILE} if model_only else set()
    with Digests(folder / name for name in {*expected, *_FILES} - left_out) as digests:
        manifest.check(folder, expected, digests)
    return True


def _load(folder: Path) -> TrainingState:
    """Reads a checkpoint while other threads compute the SHA-256 of its files; UserError."""
    expected = manifest.read(folder)
    names = () if expected is None else {*expected, *_FILES}
    with Digests(folder / name for name in names) as digests:
        try:
            state = _read(folder)
        except UserError:
            # A wrong byte may be the reason: then the error is that of the file that has it.
            manifest.check(folder, expected or {}, digests)
            raise
        manifest.check(folder, expected or {}, digests)
    return state


def _read(folder: Path) -> TrainingState:
    """Reads a checkpoint; compares only training.json with the manifest. Raises UserError."""
    training, train, update = _checked_training(folder)
    source = hf.open_folder(folder)
    m, v = _load_moments(folder / OPTIMIZER_FILE, source.config, train.optimizer)
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


def _checked_training(folder: Path) -> tuple[dict[str, Any], TrainConfig, UpdateState]:
    """Returns training.json with its parts `train` and `update`, all values checked; UserError."""
    where = folder / TRAINING_FILE
    training = _read_training(folder)
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
    return training, train, update


def _read_training(folder: Path) -> dict[str, Any]:
    """Returns training.json as the current version names things, compared with the manifest.

    Raises CheckpointError if a bit is wrong, or if a checkpoint that needs a manifest has none;
    DataError if there is no training.json.
    """
    path = folder / TRAINING_FILE
    expected = manifest.read(folder)
    if expected is not None:
        with Digests([path]) as digests:
            manifest.check(folder, expected, digests)
    training = read_json(path)
    version = training.get("format_version")
    if expected is None and version not in _WITHOUT_MANIFEST:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: no such file, and without it nobody can tell whether this "
            f"checkpoint of format_version {version!r} is intact; restore it from a copy, or use "
            f"another checkpoint"
        )
    return _from_version_3(_from_version_2(_from_version_1(training)))


def _from_version_1(training: dict[str, Any]) -> dict[str, Any]:
    """Returns a training.json of version 1 as version 2 names things, and any other as it is."""
    if training.get("format_version") != 1:
        return training
    update = training.pop("counts", None)
    if isinstance(update, dict) and "in_a_row" in update:
        update["good_steps"] = update.pop("in_a_row")
    return training | {"format_version": 2, "update": update}


def _from_version_2(training: dict[str, Any]) -> dict[str, Any]:
    """Returns a training.json of version 2 as one of version 3, and any other as it is.

    Settings that version 2 did not have get the value with which the run continues as it was: their
    default, and a checkpoint at every evaluation.
    """
    if training.get("format_version") != 2:
        return training
    train = training.get("train")
    if isinstance(train, dict):
        new: dict[str, Any] = dict(DEFAULTS)
        if "eval_every" in train:
            new["save_every"] = train["eval_every"]
        train = new | train
    return training | {"format_version": 3, "train": train}


def _from_version_3(training: dict[str, Any]) -> dict[str, Any]:
    """Returns a training.json of version 3, whose only optimizer was AdamW, as one of version 4."""
    if training.get("format_version") != 3:
        return training
    train = training.get("train")
    if isinstance(train, dict):
        train = {"optimizer": "adamw"} | train
    return training | {"format_version": 4, "train": train}


def _intact_before(folder: Path) -> Path | None:
    """Returns the newest intact checkpoint of the same run and an earlier step, if there is one."""
    if _STEP_FOLDER.fullmatch(folder.name) is None:
        return None
    with contextlib.suppress(CheckpointError):  # a run that cannot be listed
        for older in reversed(checkpoints(folder.parent)):
            if _step_of(older) < _step_of(folder) and _is_intact(older):
                return older
    return None


def _is_intact(folder: Path) -> bool:
    """Returns True if `load` can read a checkpoint."""
    try:
        _checked_training(folder)
        if not verify(folder):
            _load(folder)
    except UserError:
        return False
    return True


def latest(path: Path) -> Path:
    """Returns the newest complete checkpoint of a run, or `path` itself if it holds a model.

    Its parent is the run even if `path` is "." in the folder of a checkpoint. Raises
    CheckpointError.
    """
    if hf.holds_model(path):
        return path if path.name not in ("", os.pardir) else path.resolve()
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
    values = _read_training(folder).get("train")
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
    train = _read_training(folder).get("train")
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
            if _STEP_FOLDER.fullmatch(name) and _is_complete(entry):
                found[_step_of(entry)] = entry
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot be listed: {error.strerror}") from error
    return [found[step] for step in sorted(found)]


def set_aside(run_dir: Path, step: int) -> list[Path]:
    """Moves the checkpoints after a step into RUN/set_aside; returns their new folders.

    A run that is resumed from an earlier checkpoint then cannot be taken for its former self, and
    nothing is lost. The newest is moved first: after a crash in between, the rest is a run as
    before. Nothing in RUN/set_aside is overwritten: a number is added to the name. Only one process
    may change a run at a time. Raises CheckpointError.
    """
    moved: list[Path] = []
    later = [folder for folder in checkpoints(run_dir) if _step_of(folder) > step]
    if not later:
        return moved
    folder = later[-1]
    try:
        _clear_leftovers(run_dir)  # else the replaced checkpoint of a step could come back
        target_dir = run_dir / SET_ASIDE_FOLDER
        target_dir.mkdir(exist_ok=True)
        for number in reversed([_step_of(folder) for folder in later]):
            folder = folder_of(run_dir, number)
            target = _unused(target_dir / folder.name)
            folder.rename(target)
            sync(target_dir)
            sync(run_dir)
            moved.append(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot move the checkpoint {folder}, which is later than step {step}, to "
            f"{run_dir / SET_ASIDE_FOLDER}: {error.strerror or error}; move it elsewhere yourself"
        ) from error
    return moved


def folder_of(run_dir: Path, step: int) -> Path:
    """Returns the folder that `save` gives the checkpoint of a step."""
    return run_dir / f"step_{step:08d}"


def bytes_needed(model: ModelConfig) -> int:
    """Returns an upper bound of the bytes of one checkpoint.

    A save needs that much free space, because it removes old checkpoints at its end.
    """
    return 3 * np.dtype(np.float32).itemsize * parameter_count(model) + _SMALL_FILES


def _write(folder: Path, state: TrainingState, tokenizer: Tokenizer) -> None:
    """Writes all files of a checkpoint, the manifest last, and waits until they are on the disk."""
    with Digests() as digests:  # files are read back from memory while others go to the disk
        hf.write_model(folder, Arena(state.model, state.weights, tokenizer.eot))
        tokenizer.save(folder)
        digests.start(folder.iterdir())
        moments = _moments(state.model, state.train.optimizer, state.m, state.v)
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
        text = json.dumps(training, indent=2) + "\n"
        (folder / TRAINING_FILE).write_text(text, encoding="utf-8")
        digests.start([folder / OPTIMIZER_FILE, folder / TRAINING_FILE])
        for path in folder.iterdir():
            sync(path)
        manifest.write(folder, digests)
    for path in (folder / MANIFEST_FILE, folder):
        sync(path)


def _unused(path: Path) -> Path:
    """Returns the path, or the first of path.1, path.2 and so on if it is taken."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


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


def _prune(run_dir: Path, written: Path, retention: Retention) -> None:
    """Removes the checkpoints that are not kept; the one just written always is."""
    older = [folder for folder in checkpoints(run_dir) if folder != written]
    for folder in older[: max(0, len(older) - (retention.last - 1))]:
        if retention.keeps(_step_of(folder)):
            continue
        # Renamed first, because a folder that is half removed must not look like a checkpoint.
        hidden = folder.with_name(f".{folder.name}.tmp")
        with contextlib.suppress(OSError):  # one checkpoint too many must not stop training
            folder.rename(hidden)
            shutil.rmtree(hidden)


def _moments(
    model: ModelConfig, optimizer: str, m: FloatArray, v: FloatArray
) -> dict[str, FloatArray]:
    """Returns views of both arenas by their names on disk: m.wte, v.wte and so on."""
    second = flat_views(OPTIMIZERS[optimizer].second_moments(model), v)
    tensors = {"m": named(model, m), "v": vars(second)}
    return {
        f"{kind}.{name}": tensor
        for kind, moments in tensors.items()
        for name, tensor in moments.items()
    }


def _load_moments(path: Path, model: ModelConfig, optimizer: str) -> tuple[FloatArray, FloatArray]:
    file = TensorFile(path)
    m = np.zeros(parameter_count(model), np.float32)
    v = np.zeros(element_count(OPTIMIZERS[optimizer].second_moments(model)), np.float32)
    tensors = _moments(model, optimizer, m, v)
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
    """Returns True if a folder has all files but the manifest, which versions 1 and 2 lack."""
    return all(os.path.isfile(folder / name) for name in _FILES)


def _step_of(folder: Path) -> int:
    """Returns the step of a checkpoint, from the name of its folder."""
    return int(folder.name.removeprefix(".").removeprefix("step_").removesuffix(".old"))


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
