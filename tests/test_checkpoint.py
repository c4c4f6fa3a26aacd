"""Checkpoints are complete or absent, kept as long as asked, and refused if a bit is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import seal
from models import train_settings
from safetensors.numpy import load_file, save_file

from gpu_gpt2.config import DEFAULTS, GPT2Config
from gpu_gpt2.errors import CheckpointError, DataError, UserError
from gpu_gpt2.formats import hf
from gpu_gpt2.models.arena import element_count
from gpu_gpt2.models.families import parameter_count, parameters
from gpu_gpt2.models.weights import Arena, load_arena, named
from gpu_gpt2.training import checkpoint, manifest
from gpu_gpt2.training.checkpoint import (
    OPTIMIZER_FILE,
    TRAINING_FILE,
    Retention,
    TrainingState,
)
from gpu_gpt2.training.manifest import MANIFEST_FILE, Digests
from gpu_gpt2.training.muon import Muon
from gpu_gpt2.training.optimizer import UpdateState

MODEL = GPT2Config(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
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


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [10, 12]),
        (Retention(last=1), [12]),
        (Retention(last=3), [8, 10, 12]),
        (Retention(last=0), [2, 4, 6, 8, 10, 12]),
        (Retention(every=4), [4, 8, 10, 12]),
        (Retention(last=1, every=6), [6, 12]),
        (Retention(best=6), [6, 10, 12]),
        (Retention(last=1, every=4, best=2), [2, 4, 8, 12]),
        (Retention(best=12), [10, 12]),
        (Retention(best=7), [10, 12]),
    ],
)
def test_what_is_not_kept_is_removed(retention: Retention, kept: list[int], tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        folder = checkpoint.save(tmp_path, state_at(step), Tokenizer(), retention)
        assert folder == checkpoint.folder_of(tmp_path, step)
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]


def test_the_step_just_written_is_kept_by_any_retention(run_dir: Path) -> None:
    checkpoint.save(run_dir, state_at(20), Tokenizer())
    checkpoint.save(run_dir, state_at(5), Tokenizer(), Retention(last=1, best=20))
    assert names(run_dir) == ["metrics.jsonl", "step_00000005", "step_00000020"]


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
    last = [(folder / MANIFEST_FILE).stat().st_ino, folder.stat().st_ino]
    assert events[named - 2 : named] == last
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


SET_ASIDE_STEPS = (20, 30, 40)


@pytest.fixture
def branched(run_dir: Path) -> Path:
    """A run with checkpoints of the steps 10, 20, 30 and 40."""
    for step in SET_ASIDE_STEPS:
        checkpoint.save(run_dir, state_at(step), Tokenizer(), Retention(last=0))
    return run_dir


def test_checkpoints_after_a_step_are_moved_out_of_the_run(branched: Path) -> None:
    aside = branched / "set_aside"
    moved = checkpoint.set_aside(branched, 20)
    assert moved == [aside / "step_00000040", aside / "step_00000030"]
    assert names(branched) == ["metrics.jsonl", "set_aside", "step_00000010", "step_00000020"]
    assert checkpoint.latest(branched) == branched / "step_00000020"
    for folder, step in zip(moved, (40, 30), strict=True):
        assert_loads_as(folder, state_at(step))
    assert checkpoint.set_aside(branched, 20) == []


def test_a_run_without_later_checkpoints_gets_no_folder_for_them(branched: Path) -> None:
    assert checkpoint.set_aside(branched, 40) == []
    assert checkpoint.set_aside(branched / "no such run", 0) == []
    assert "set_aside" not in names(branched)


def test_what_was_set_aside_before_is_not_overwritten(branched: Path) -> None:
    aside = branched / "set_aside"
    for number in ("", ".1", ".2"):
        new = replace(state_at(50 + len(number)), step=40)
        checkpoint.save(branched, new, Tokenizer(), Retention(last=0))
        assert checkpoint.set_aside(branched, 30) == [aside / f"step_00000040{number}"]
        assert_loads_as(aside / f"step_00000040{number}", new)
    assert names(aside) == ["step_00000040", "step_00000040.1", "step_00000040.2"]
    # An empty folder would be replaced by a rename.
    (aside / "step_00000030").mkdir()
    assert checkpoint.set_aside(branched, 20) == [aside / "step_00000030.1"]


def test_the_newest_is_set_aside_first_and_on_the_disk_before_the_next(
    branched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []
    rename = Path.rename

    def note_rename(self: Path, target: Path) -> Path:
        events.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", note_rename)
    checkpoint.set_aside(branched, 10)
    folders = [(branched / "set_aside").stat().st_ino, branched.stat().st_ino]
    expected: list[int | str] = []
    for step in reversed(SET_ASIDE_STEPS):
        expected += [f"step_{step:08d}", *folders]
    assert events == expected


def test_a_crash_while_checkpoints_are_set_aside_leaves_a_run(
    branched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "step_00000030":
            no_space()
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match=r"cannot move .*_00000030, .*: No space left"):
            checkpoint.set_aside(branched, 10)
    assert [f.name[-2:] for f in checkpoint.checkpoints(branched)] == ["10", "20", "30"]
    assert [f.name[-2:] for f in checkpoint.set_aside(branched, 10)] == ["30", "20"]


def test_a_replaced_checkpoint_does_not_come_back_after_it_was_set_aside(branched: Path) -> None:
    for step, left in ((40, "step_00000040"), (30, "")):  # with and without its successor
        old = branched / f".step_{step:08d}.old"
        (branched / f"step_{step:08d}").rename(old)
        if left:
            checkpoint.save(branched / "other", state_at(step), Tokenizer())
            (branched / "other" / left).rename(branched / left)
            (branched / "other").rmdir()
    assert len(checkpoint.set_aside(branched, 20)) == 2
    assert checkpoint.latest(branched) == branched / "step_00000020"
    assert names(branched) == ["metrics.jsonl", "set_aside", "step_00000010", "step_00000020"]


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


def age(folder: Path, version: int) -> None:
    """Makes a checkpoint of version 1 or 2 from one of today.

    Version 1 has "counts" instead of "update", and in it "in_a_row" instead of "good_steps".
    """
    path = folder / TRAINING_FILE
    training = json.loads(path.read_text())
    if version == 1:
        training["counts"] = update = training.pop("update")
        update["in_a_row"] = update.pop("good_steps")
    path.write_text(json.dumps(training | {"format_version": version}))
    (folder / MANIFEST_FILE).unlink()


@pytest.mark.parametrize("version", [1, 2])
def test_versions_without_a_manifest_are_still_read(version: int, run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    age(folder, version)
    assert_loads_as(folder, state_at(10))
    assert checkpoint.saved_settings(folder) == TRAIN
    assert not checkpoint.verify(folder)


@pytest.mark.parametrize("version", [1, 2])
def test_settings_that_old_versions_lack_keep_the_run_as_it_was(
    version: int, run_dir: Path
) -> None:
    folder = checkpoint.latest(run_dir)
    train = TRAIN.to_dict() | {"eval_every": 77}
    del train["beta2"]  # a constant default is filled in
    del train["save_every"]  # a checkpoint was written at every evaluation
    edit_training(train=train)(folder)
    age(folder, version)
    assert checkpoint.load(folder).train.beta2 == DEFAULTS["beta2"]
    assert checkpoint.saved_settings(folder) == checkpoint.load(folder).train
    assert checkpoint.load(folder).train.save_every == 77


def test_the_newest_version_must_have_every_setting(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    train = TRAIN.to_dict()
    del train["beta2"]
    edit_training(train=train)(folder)
    seal(folder)
    with pytest.raises(CheckpointError, match="missing training settings: beta2"):
        checkpoint.load(folder)


def test_the_optimizer_of_version_3_is_adamw(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    train = TRAIN.to_dict()
    del train["optimizer"]
    edit_training(train=train, format_version=3)(folder)
    seal(folder)
    assert_loads_as(folder, state_at(10))
    assert checkpoint.saved_settings(folder) == TRAIN


def test_a_checkpoint_of_muon_has_no_second_moments_of_its_matrices(tmp_path: Path) -> None:
    whole, config = state_at(10), replace(TRAIN, optimizer="muon")
    without = element_count(Muon.second_moments(MODEL))
    state = replace(whole, train=config, v=whole.v[:without])
    folder = checkpoint.save(tmp_path, state, Tokenizer())
    assert_loads_as(folder, state)
    names = load_file(folder / OPTIMIZER_FILE).keys()
    tensors = {spec.name for spec in parameters(MODEL)}
    matrices = {"qkvw", "attprojw", "fcw", "fcprojw"}
    assert names == {f"m.{n}" for n in tensors} | {f"v.{n}" for n in tensors - matrices}


def truncate_optimizer(folder: Path) -> None:
    os.truncate(folder / OPTIMIZER_FILE, 100_000)


def other_model(folder: Path) -> None:
    model = replace(MODEL, n_positions=18)
    weights = np.zeros(parameter_count(model), np.float32)
    hf.write_model(folder, Arena(model, weights, 256))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_training(format_version=5), "training.json: format_version is 5, expected 4;"),
        (edit_training(step="10"), "training.json: step is missing or not of type int"),
        (edit_training(step=-1), "training.json: step and tokens must not be negative"),
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
    seal(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    assert str(caught.value).startswith(f"{folder}/{message}")
    assert "\n" not in str(caught.value)


def test_the_manifest_has_the_size_and_the_sha_256_of_every_other_file(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = json.loads(contents.pop(MANIFEST_FILE))["files"]
    assert files == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    assert checkpoint.verify(folder)


def flip_bit(path: Path, number: int) -> None:
    content = bytearray(path.read_bytes())
    content[number // 8] ^= 1 << number % 8
    path.write_bytes(content)


FILES = (
    "model.safetensors", "optimizer.safetensors", "training.json", "config.json", "tokenizer.json",
    "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_refused(name: str, run_dir: Path) -> None:
    path = checkpoint.latest(run_dir) / name
    whole = path.read_bytes()
    bits = 8 * len(whole)
    # Bits of the header, of the data and of the last byte.
    for bit in {0, 70, *range(1, bits, bits // 7), bits - 1}:
        if bit < bits:
            flip_bit(path, bit)
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load(path.parent)
            assert str(caught.value).startswith(f"{path}: "), bit
            with pytest.raises(CheckpointError):
                checkpoint.verify(path.parent)
            path.write_bytes(whole)
    assert_loads_as(path.parent, state_at(10))


def test_a_flipped_bit_anywhere_in_a_manifest_is_refused(run_dir: Path) -> None:
    path = checkpoint.latest(run_dir) / MANIFEST_FILE
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):  # one or two bits of every byte
        path.write_bytes(whole)
        flip_bit(path, bit)
        with pytest.raises(
            CheckpointError, match=r"manifest\.json: the file is damaged or was edi"
        ):
            manifest.read(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 11}, {"format_version": 2}, {"train": TRAIN.to_dict() | {"lr": 0.5}},
        {"train": TRAIN.to_dict() | {"beta1": 0.8}},
    ],
)  # fmt: skip
def test_an_edited_value_is_refused_by_all_that_read_it(
    change: dict[str, Any], run_dir: Path
) -> None:
    folder = checkpoint.latest(run_dir)
    edit_training(**change)(folder)
    readers = (
        checkpoint.load,
        checkpoint.verify,
        checkpoint.saved_settings,
        lambda folder: checkpoint.trained_seq_len(folder, MODEL),
    )
    for reader in readers:
        with pytest.raises(CheckpointError) as caught:
            reader(folder)
        assert str(caught.value).startswith(f"{folder}/training.json: ")


@pytest.mark.parametrize("name", [*FILES[2:5], "optimizer.safetensors"])
def test_a_file_that_grew_or_is_missing_is_refused(name: str, run_dir: Path) -> None:
    path = checkpoint.latest(run_dir) / name
    with path.open("ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match=rf"{name}: the file has \d+ bytes, \d+ in manifest"):
        checkpoint.load(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: No such file"):
        checkpoint.load(path.parent)


def test_a_checkpoint_that_lost_its_manifest_is_refused(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    (folder / MANIFEST_FILE).unlink()
    for reader in (checkpoint.load, checkpoint.verify, checkpoint.saved_settings):
        with pytest.raises(CheckpointError, match=r"manifest\.json: no such file, and without"):
            reader(folder)


def test_a_manifest_must_list_every_file_that_is_read(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    listed = [path for path in folder.iterdir() if path.name not in (MANIFEST_FILE, "config.json")]
    with Digests(listed) as digests:
        manifest.write(folder, digests)
    for reader in (checkpoint.load, checkpoint.verify):
        with pytest.raises(CheckpointError, match=r"config\.json: manifest\.json does not list"):
            reader(folder)


def test_the_files_of_the_model_alone_can_be_verified(run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    flip_bit(folder / OPTIMIZER_FILE, 99_999)
    flip_bit(folder / TRAINING_FILE, 99)
    assert checkpoint.verify(folder, model_only=True)
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        flip_bit(folder / name, 7)
        with pytest.raises(CheckpointError, match=rf"{name}: the file is damaged"):
            checkpoint.verify(folder, model_only=True)
        flip_bit(folder / name, 7)
    (folder / TRAINING_FILE).unlink()
    (folder / MANIFEST_FILE).unlink()
    assert not checkpoint.verify(folder)  # a plain Hugging Face folder


def command_in(error: BaseException) -> list[str]:
    """The words of the command with which a message ends."""
    return shlex.split(str(error).split("resume from it with: ")[1])


def test_a_damaged_checkpoint_names_the_newest_intact_one_before_it(run_dir: Path) -> None:
    for step in (5, 10, 20, 30, 40):
        checkpoint.save(run_dir, state_at(step), Tokenizer(), Retention(last=0))
    folders = {step: run_dir / f"step_{step:08d}" for step in (5, 10, 20, 30)}
    age(folders[5], 2)
    flip_bit(folders[30] / "model.safetensors", 99_999)
    for damaged, intact in ((20, 10), (10, 5)):
        flip_bit(folders[damaged] / OPTIMIZER_FILE, 99_999)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(folders[30])
        assert str(caught.value).startswith(f"{folders[30]}/model.safetensors: the file is damag")
        *command, named = command_in(caught.value)
        assert command == ["gpu-gpt2", "train", "--resume", "--run-dir"]
        assert checkpoint.load(checkpoint.latest(Path(named))).step == intact
    os.truncate(folders[5] / OPTIMIZER_FILE, 100)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folders[30])
    assert "resume from it" not in str(caught.value)


def test_threads_that_compute_checksums_end_with_their_reader() -> None:
    def read_without_end() -> None:
        with Digests([Path("/dev/zero")]):
            pass

    reader = threading.Thread(target=read_without_end, daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()


def test_a_plain_hugging_face_folder_cannot_be_resumed(tmp_path: Path) -> None:
    hf.write_model(tmp_path, Arena(MODEL, state_at(1).weights, 256))
    with pytest.raises(DataError) as caught:
        checkpoint.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}/training.json: no such file"


@pytest.mark.parametrize("seq_len", [0, MODEL.n_positions + 1, "16"])
def test_a_trained_length_beyond_the_context_is_refused(seq_len: object, run_dir: Path) -> None:
    folder = checkpoint.latest(run_dir)
    assert checkpoint.trained_seq_len(folder, MODEL) == 16
    edit_training(train=TRAIN.to_dict() | {"seq_len": seq_len})(folder)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"training\.json: seq_len is "):
        checkpoint.trained_seq_len(folder, MODEL)


def test_bytes_needed_is_an_upper_bound_close_to_the_bytes_written(run_dir: Path) -> None:
    written = sum(path.stat().st_size for path in checkpoint.latest(run_dir).iterdir())
    assert written <= checkpoint.bytes_needed(MODEL) < written + 5_000_000
    assert checkpoint.bytes_needed(GPT2Config()) == pytest.approx(12 * 124.5e6, rel=0.01)
