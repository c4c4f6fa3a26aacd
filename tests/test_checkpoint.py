"""Checkpoints are complete or absent, the newest two are kept, and damaged ones are refused."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import train_settings
from safetensors.numpy import load_file, save_file

from gpu_gpt2.config import ModelConfig
from gpu_gpt2.errors import CheckpointError, DataError, UserError
from gpu_gpt2.formats import hf
from gpu_gpt2.models.gpt2 import parameter_count
from gpu_gpt2.models.weights import Arena, load_arena, named
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.checkpoint import OPTIMIZER_FILE, TRAINING_FILE, TrainingState
from gpu_gpt2.training.optimizer import UpdateState

MODEL = ModelConfig(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
TRAIN = train_settings(data="python-docs", seq_len=16, run_dir="runs/a")


class Tokenizer:
    """Saves one file, then calls the function that a test wants to run in the middle of a save."""

    eot = 256

    def __init__(self, during_save: Callable[[Path], None] | None = None) -> None:
        self._during_save = during_save

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        if self._during_save:
            self._during_save(folder)


def state_at(step: int) -> TrainingState:
    rng = np.random.default_rng(step)
    arenas = rng.standard_normal((3, parameter_count(MODEL)), np.float32)
    named(MODEL, arenas[0])["wte"][MODEL.vocab_size :] = 0
    return TrainingState(
        model=MODEL,
        train=TRAIN,
        step=step,
        tokens=step * TRAIN.total_batch_tokens,
        loader={"epoch": 1, "position": step, "order": [3, 1, 2]},
        weights=arenas[0],
        m=arenas[1],
        v=arenas[2],
        update=UpdateState(updates=step, good_steps=3, loss_scale=2.0**17),
    )


def assert_loads_as(folder: Path, state: TrainingState) -> None:
    loaded = checkpoint.load(folder)
    assert replace(loaded, weights=0, m=0, v=0) == replace(state, weights=0, m=0, v=0)
    for name in ("weights", "m", "v"):
        assert getattr(loaded, name).dtype == np.float32
        assert getattr(loaded, name).tobytes() == getattr(state, name).tobytes(), name


def names(run_dir: Path) -> list[str]:
    """The names of all entries of a run folder, hidden ones too."""
    return sorted(entry.name for entry in run_dir.iterdir())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a metrics file and one checkpoint, of step 10."""
    run_dir = tmp_path / "a run"
    checkpoint.save(run_dir, state_at(10), Tokenizer())
    (run_dir / "metrics.jsonl").write_text("{}\n")
    return run_dir


def test_a_checkpoint_loads_with_the_bits_that_were_saved(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    assert folder == run_dir / "step_00000010"
    assert (folder / "tokenizer.json").exists()
    assert_loads_as(folder, state_at(10))


def test_a_checkpoint_is_a_hugging_face_folder(run_dir: Path) -> None:
    model = hf.open_folder(checkpoint.latest(run_dir))
    assert (model.config, model.eot) == (MODEL, 256)
    assert load_arena(model).tobytes() == state_at(10).weights.tobytes()
    assert json.loads((run_dir / "step_00000010/config.json").read_text())["eos_token_id"] == 256


def test_the_newest_two_checkpoints_are_kept(run_dir: Path) -> None:
    for step in (20, 9, 30):
        checkpoint.save(run_dir, state_at(step), Tokenizer())
        assert checkpoint.latest(run_dir).name == f"step_{max(step, 20):08d}"
    assert names(run_dir) == ["metrics.jsonl", "step_00000020", "step_00000030"]


def test_the_checkpoint_just_written_is_kept_even_if_later_steps_exist(run_dir: Path) -> None:
    checkpoint.save(run_dir, state_at(20), Tokenizer())
    assert checkpoint.save(run_dir, state_at(5), Tokenizer()).name == "step_00000005"
    assert names(run_dir) == ["metrics.jsonl", "step_00000005", "step_00000020"]


def test_steps_are_ordered_as_numbers(run_dir: Path) -> None:
    checkpoint.save(run_dir, state_at(200_000_000), Tokenizer())
    checkpoint.save(run_dir, state_at(99_999_999), Tokenizer())
    assert [f.name for f in checkpoint.checkpoints(run_dir)] == ["step_99999999", "step_200000000"]


def test_saving_a_step_again_replaces_it(run_dir: Path) -> None:
    other = replace(state_at(11), step=10)
    checkpoint.save(run_dir, other, Tokenizer())
    assert names(run_dir) == ["metrics.jsonl", "step_00000010"]
    assert_loads_as(run_dir / "step_00000010", other)


def test_latest_accepts_a_run_a_checkpoint_or_any_hugging_face_folder(
    run_dir: Path, tmp_path: Path
) -> None:
    folder = run_dir / "step_00000010"
    hf.write_model(tmp_path / "plain", Arena(MODEL, state_at(1).weights, 256))
    assert checkpoint.latest(run_dir) == folder
    assert checkpoint.latest(folder) == folder
    assert checkpoint.latest(tmp_path / "plain") == tmp_path / "plain"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "optimizer.safetensors", "training.json"]
)
def test_a_folder_that_lacks_a_file_is_no_checkpoint(name: str, run_dir: Path) -> None:
    checkpoint.save(run_dir, state_at(20), Tokenizer())
    (run_dir / "step_00000020" / name).unlink()
    assert checkpoint.latest(run_dir).name == "step_00000010"


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_run_without_checkpoints_names_the_command_that_makes_one(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "my run"
    if kind == "empty":
        path.mkdir()
    if kind == "file":
        path.write_text("")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(path)
    assert str(caught.value) == (
        f"{path}: no checkpoint here; make one with: gpu-gpt2 train --run-dir '{path}'"
    )


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Makes writes past `limit` bytes of a file fail, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_unharmed(run_dir: Path) -> None:
    assert names(run_dir) == ["metrics.jsonl", "step_00000010"]
    assert_loads_as(checkpoint.latest(run_dir), state_at(10))


# model.safetensors has 300 kB here, optimizer.safetensors 652 kB: 400,000 stops in the second.
@pytest.mark.parametrize("limit", [0, 1, 100_000, 400_000])
@pytest.mark.parametrize("step", [10, 20])
def test_a_file_that_cannot_grow_leaves_the_earlier_checkpoint(
    limit: int, step: int, run_dir: Path
) -> None:
    assert os.path.getsize(run_dir / "step_00000010" / hf.MODEL_FILE) < 400_000
    with file_size_limit(limit), pytest.raises(CheckpointError) as caught:
        checkpoint.save(run_dir, state_at(step), Tokenizer())
    message = str(caught.value)
    assert message.startswith(
        f"cannot write checkpoint {run_dir}/step_000000{step}: File too large"
    )
    assert "step_00000010 is intact; raise the limit on file sizes (ulimit -f" in message
    assert_unharmed(run_dir)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_error_for_a_full_disk_says_how_much_is_needed_and_what_to_do(run_dir: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(run_dir, state_at(20), Tokenizer(no_space))
    before, after = str(caught.value).split(" MB needed, ")
    assert before == (
        f"cannot write checkpoint {run_dir}/step_00000020: No space left on device "
        f"(up to {checkpoint.bytes_needed(MODEL) / 1e6:.1f}"
    )
    assert after.split(" MB free); ")[1] == (
        f"step_00000010 is intact; free some space, then: gpu-gpt2 train --run-dir '{run_dir}' "
        f"--resume"
    )
    assert_unharmed(run_dir)


def test_a_full_disk_before_the_first_checkpoint_leaves_an_empty_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path / "new", state_at(1), Tokenizer(no_space))
    assert str(caught.value).endswith(
        f"there is no earlier checkpoint; free some space, then: gpu-gpt2 train --run-dir "
        f"{tmp_path}/new"
    )
    assert names(tmp_path / "new") == []


def test_a_disk_that_fills_up_while_syncing_leaves_the_earlier_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(run_dir, state_at(20), Tokenizer())
    assert_unharmed(run_dir)


def test_files_are_synced_before_the_rename_and_the_folder_after_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []
    rename = Path.rename

    def note_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", note_rename)
    folder = checkpoint.save(run_dir, state_at(20), Tokenizer())
    named = events.index("rename")
    assert set(events[:named]) == {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert events[named + 1 :] == [run_dir.stat().st_ino]


@pytest.mark.parametrize(
    ("run", "message"), [("run", "File exists"), ("run/below", "Not a directory")]
)
def test_a_run_folder_that_cannot_be_made_is_refused(
    run: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("precious")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / run, state_at(1), Tokenizer())
    assert (tmp_path / "run").read_text() == "precious"


def test_a_run_folder_that_cannot_be_listed_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_permitted(_: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", not_permitted)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.latest(run_dir)
    assert str(caught.value) == f"{run_dir}: cannot be listed: Permission denied"


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_save_leaves_nothing_behind(run_dir: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(run_dir, state_at(20), Tokenizer(interrupt))
    assert_unharmed(run_dir)


SAVE_AND_DIE = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from gpu_gpt2.training import checkpoint

class Tokenizer:
    eot = 256
    def save(self, folder):
        os.kill(os.getpid(), signal.SIGKILL)

run_dir = Path(sys.argv[1])
state = checkpoint.load(checkpoint.latest(run_dir))
checkpoint.save(run_dir, replace(state, step=20), Tokenizer())
"""


def test_after_a_kill_the_earlier_checkpoint_is_the_latest(run_dir: Path) -> None:
    died = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(run_dir)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert names(run_dir) == [".step_00000020.tmp", "metrics.jsonl", "step_00000010"]
    assert_loads_as(checkpoint.latest(run_dir), state_at(10))
    checkpoint.save(run_dir, state_at(30), Tokenizer())
    assert names(run_dir) == ["metrics.jsonl", "step_00000010", "step_00000030"]


def test_a_crash_while_a_step_is_replaced_keeps_one_of_the_two(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_to_publish(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            no_space()
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail_to_publish)
        with pytest.raises(CheckpointError, match=r"\.step_00000010\.old is intact"):
            checkpoint.save(run_dir, state_at(10), Tokenizer())
    assert names(run_dir) == [".step_00000010.old", "metrics.jsonl"]
    assert_loads_as(checkpoint.latest(run_dir), state_at(10))
    checkpoint.save(run_dir, state_at(20), Tokenizer())
    assert names(run_dir) == ["metrics.jsonl", "step_00000010", "step_00000020"]


def test_a_crash_after_a_step_was_replaced_leaves_the_new_one(run_dir: Path) -> None:
    new = replace(state_at(11), step=10)
    (run_dir / "step_00000010").rename(run_dir / "aside")
    checkpoint.save(run_dir, new, Tokenizer())
    (run_dir / "aside").rename(run_dir / ".step_00000010.old")
    assert_loads_as(checkpoint.latest(run_dir), new)
    checkpoint.save(run_dir, state_at(20), Tokenizer())
    assert names(run_dir) == ["metrics.jsonl", "step_00000010", "step_00000020"]


def test_a_checkpoint_disappears_from_the_list_before_its_files_do(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(run_dir, state_at(20), Tokenizer())
    removed = []
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **_: removed.append(Path(path).name)
    )
    checkpoint.save(run_dir, state_at(30), Tokenizer())
    assert ".step_00000010.tmp" in removed
    assert [f.name for f in checkpoint.checkpoints(run_dir)] == ["step_00000020", "step_00000030"]


def edit_training(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / TRAINING_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def edit_optimizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / OPTIMIZER_FILE)
        change(tensors)
        save_file(tensors, folder / OPTIMIZER_FILE)

    return edit


def test_training_files_of_version_1_are_still_read(run_dir: Path) -> None:
    """Version 1 has "counts" instead of "update", and in it "in_a_row" instead of "good_steps"."""
    path = checkpoint.latest(run_dir) / TRAINING_FILE
    training = json.loads(path.read_text())
    update = training.pop("update")
    update["in_a_row"] = update.pop("good_steps")
    path.write_text(json.dumps(training | {"format_version": 1, "counts": update}))
    assert_loads_as(path.parent, state_at(10))


def truncate_optimizer(folder: Path) -> None:
    os.truncate(folder / OPTIMIZER_FILE, 100_000)


def other_model(folder: Path) -> None:
    model = replace(MODEL, n_positions=18)
    weights = np.zeros(parameter_count(model), np.float32)
    hf.write_model(folder, Arena(model, weights, 256))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_training(format_version=3), "training.json: format_version is 3, expected 2;"),
        (edit_training(step="10"), "training.json: step is missing or not of type int"),
        (edit_training(tokens=True), "training.json: tokens is missing or not of type int"),
        (edit_training(loader=[]), "training.json: loader is missing or not of type dict"),
        (edit_training(train={}), "training.json: missing training settings: batch_size, "),
        (edit_training(update=None), "training.json: update is missing or not of type dict"),
        (edit_training(update={"updates": 1}), "training.json: update must be updates, goo"),
        (
            edit_training(update={"updates": 1, "good_steps": 2.5, "loss_scale": 1.0}),
            "training.json: updates, good_steps and loss_scale must be two counts and 1 to ",
        ),
        (
            edit_training(update={"updates": 1, "good_steps": 1, "loss_scale": float("nan")}),
            "training.json: updates, good_steps and loss_scale must be two counts and 1 to ",
        ),
        (
            edit_training(train=TRAIN.to_dict() | {"momentum": 1}),
            "training.json: unknown training settings: momentum",
        ),
        (
            edit_training(train=TRAIN.to_dict() | {"steps": "ten"}),
            "training.json: --steps must be a whole number >= 1, not 'ten'",
        ),
        (
            edit_training(train=TRAIN.to_dict() | {"total_batch_tokens": float("nan")}),
            "training.json: --total-batch-tokens must be a whole number >= 1, not nan",
        ),
        (
            edit_training(train=TRAIN.to_dict() | {"total_batch_tokens": float("inf")}),
            "training.json: --total-batch-tokens must be a whole number >= 1, not inf",
        ),
        (truncate_optimizer, "optimizer.safetensors: not a whole safetensors file"),
        (
            edit_optimizer(lambda tensors: tensors.pop("v.fcw")),
            "optimizer.safetensors: tensor v.fcw of shape (2, 192, 48) is missing",
        ),
        (
            edit_optimizer(lambda tensors: tensors.update(u=np.zeros(1))),
            "optimizer.safetensors: 'u' (1 such) is not a moment",
        ),
        (other_model, "optimizer.safetensors: m.wpe: expected shape (18, 48), found (17, 48)"),
    ],
)
def test_a_damaged_or_contradictory_checkpoint_is_refused(
    damage: Callable[[Path], None], message: str, run_dir: Path
) -> None:
    folder = checkpoint.latest(run_dir)
    damage(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    assert str(caught.value).startswith(f"{folder}/{message}")
    assert "\n" not in str(caught.value)


def test_a_plain_hugging_face_folder_cannot_be_resumed(tmp_path: Path) -> None:
    hf.write_model(tmp_path, Arena(MODEL, state_at(1).weights, 256))
    with pytest.raises(DataError) as caught:
        checkpoint.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}/training.json: no such file"


def test_bytes_needed_is_an_upper_bound_close_to_the_bytes_written(run_dir: Path) -> None:
    written = sum(path.stat().st_size for path in checkpoint.latest(run_dir).iterdir())
    assert written <= checkpoint.bytes_needed(MODEL) < written + 5_000_000
    assert checkpoint.bytes_needed(ModelConfig()) == pytest.approx(12 * 124.5e6, rel=0.01)
