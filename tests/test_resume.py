"""A run in parts ends with the bits of a run without a pause, and contradictions are refused."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from devices import every_device
from models import quiet, train_settings

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.data.dataset import of_run
from gpu_gpt2.formats.tokens import write_tokens
from gpu_gpt2.parts import batch_loader
from gpu_gpt2.settings import resumed_config
from gpu_gpt2.train import Outcome, train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.metrics import RunLog
from gpu_gpt2.training.schedule import learning_rate

Run = Callable[..., tuple[int, str, str]]
TEXT = "".join(f"{i} squared is {i * i}, and the cube of {i} is {i**3}.\n" for i in range(300))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own cache, its own place for runs, a text and token files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("numbers.txt").write_text(TEXT)
    rng = np.random.default_rng(0)
    Path("shards").mkdir()
    for number, size in enumerate((400, 300)):
        write_tokens(Path(f"shards/x_train_{number:06d}.bin"), rng.integers(0, 256, size))
    write_tokens(Path("shards/x_val_000000.bin"), rng.integers(0, 256, 100))


def settings(**changes: object) -> TrainConfig:
    values = {"data": "numbers.txt", "save_every": 0, "sample_tokens": 0}
    return train_settings(**{**values, **changes})


def resume(run_dir: str, **changes: object) -> Outcome:
    state = checkpoint.load(checkpoint.latest(Path(run_dir)))
    return train(replace(state.train, **changes), quiet(), state)


def sums(folder: Path) -> list[str]:
    names = ("model.safetensors", "optimizer.safetensors")
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def records(run_dir: str, key: str) -> list[tuple[int, float]]:
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r[key]) for r in map(json.loads, lines) if key in r]


# Two micro-batches a step; the shards hold 10 micro-batches, so that 9 steps are two epochs: the
# parts end in the middle of an epoch, and of a shard.
ACCUMULATED = {
    "data": "shards", "batch_size": 2, "seq_len": 32, "total_batch_tokens": 128, "steps": 9,
    "eval_every": 3, "max_loss_zscore": 3.0, "max_grad_zscore": 3.0,
}  # fmt: skip


@every_device
@pytest.mark.parametrize(
    ("model", "recompute", "optimizer"),
    [
        *(("nano", 0, "adamw"), ("nano", 3, "adamw"), ("llama:nano", 3, "adamw")),
        *(("nano", 0, "muon"), ("llama:nano", 0, "muon")),
    ],
)
def test_two_resumes_change_no_bit(
    model: str, dtype: str, device: str, recompute: int, optimizer: str
) -> None:
    more = {**ACCUMULATED, "dtype": dtype, "device": device, "recompute": recompute}
    more |= {"model": model, "optimizer": optimizer}
    if device == "emulator":
        more |= {"seq_len": 8, "total_batch_tokens": 32, "steps": 5, "eval_every": 0}
    more["lr_schedule"] = "constant"  # the parts are cut by --steps, on which the others depend
    whole = train(settings(run_dir="whole", **more), quiet())
    train(settings(run_dir="parts", **{**more, "steps": 2}), quiet())
    resume("parts", steps=3)
    last = resume("parts", steps=more["steps"])
    assert sums(whole.checkpoint) == sums(last.checkpoint)
    assert records("whole", "loss") == records("parts", "loss")
    a, b = (checkpoint.load(outcome.checkpoint) for outcome in (whole, last))
    assert a.update == b.update
    assert a.loader == b.loader


@pytest.mark.emulator
def test_a_resumed_run_keeps_a_loss_scale_that_has_changed() -> None:
    """At a loss scale of 2**16 the first gradients of this model overflow a float16."""
    more = {
        "device": "emulator", "dtype": "fp16", "batch_size": 1, "seq_len": 8, "steps": 6,
        "total_batch_tokens": 8, "lr": 0.3, "warmup_steps": 0, "eval_every": 0,
        "lr_schedule": "constant",
    }  # fmt: skip
    whole = checkpoint.load(train(settings(run_dir="whole", **more), quiet()).checkpoint)
    train(settings(run_dir="parts", **{**more, "steps": 3}), quiet())
    half = checkpoint.load(checkpoint.latest(Path("parts")))
    parts = checkpoint.load(resume("parts", steps=6).checkpoint)
    assert half.update.loss_scale != 2.0**16
    assert whole.update == parts.update
    np.testing.assert_array_equal(whole.weights, parts.weights)


@pytest.mark.parametrize("step", [4, 8])
def test_a_validation_that_a_crash_prevented_is_made_up_for(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = RunLog.validation

    def dies(self: RunLog, at: int, **values: float) -> None:
        if at == step:
            raise RuntimeError("the machine is gone")
        validation(self, at, **values)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "validation", dies)
        with pytest.raises(RuntimeError):
            train(settings(save_every=4, eval_every=4), quiet())
    assert checkpoint.latest(Path("run")).name == f"step_{step:08d}"
    assert [at for at, _ in records("run", "val_loss")] == list(range(0, step, 4))
    resume("run")
    assert [at for at, _ in records("run", "val_loss")] == [0, 4, 8]


def test_resuming_from_an_older_checkpoint_sets_the_newer_ones_aside(run: Run) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(save_every=2, keep_last=0, run_dir="run"), quiet())
    names = [path.name for path in checkpoint.checkpoints(Path("run"))]
    assert names == [f"step_{step:08d}" for step in (2, 4, 6, 8)]
    code, out, err = run(
        "train", "--resume", "--run-dir", "run/step_00000002", "--steps", "3",
    )  # fmt: skip
    assert code == 0, err
    assert "moved later checkpoints to run/set_aside: 3" in out
    assert checkpoint.latest(Path("run")).name == "step_00000003"
    aside = sorted(path.name for path in Path("run/set_aside").iterdir())
    assert aside == [f"step_{step:08d}" for step in (4, 6, 8)]
    assert [step for step, _ in records("run", "loss")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("--lr", "0.5", "--lr is 0.003 in the run, 0.5 was given; leave out --lr"),
        ("--model", "d12", "--model is 'nano' in the run, 'd12' was given; leave out --model"),
        ("--init-from", "run", "--init-from is '' in the run, 'run' was given; leave out --init"),
        (
            "--optimizer",
            "muon",
            "--optimizer is 'adamw' in the run, 'muon' was given",
        ),
        ("--n-layer", "5", "--n-layer is 0 in the run, 5 was given; leave out --n-layer"),
    ],
)
def test_contradicting_settings_are_refused_with_the_difference(
    option: str, value: str, difference: str, run: Run
) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(run_dir="run"), quiet())
    code, _, err = run("train", "--resume", "--run-dir", "run", option, value)
    assert code == 1
    assert difference in err
    assert len(err.splitlines()) == 1


def test_stretching_a_cosine_says_that_the_rate_jumps(run: Run) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(run_dir="run"), quiet())
    code, out, err = run("train", "--resume", "--run-dir", "run", "--steps", "12")
    assert code == 0, err
    config = settings()
    before, after = learning_rate(8, config), learning_rate(8, replace(config, steps=12))
    assert f"the learning rate jumps from {before:.3g} to {after:.3g} at step 8" in out


def test_a_wsd_run_is_prolonged_without_a_jump(run: Run) -> None:
    """From a checkpoint before its decay, it ends like a run that was longer from the start."""
    shutil.copy("../numbers.txt", "numbers.txt")
    wsd = {"lr_schedule": "wsd", "final_lr_fraction": 0.0, "decay_fraction": 0.25}
    train(settings(run_dir="run", steps=8, save_every=2, keep_last=0, **wsd), quiet())
    longer = train(settings(run_dir="longer", steps=12, **wsd), quiet())
    code, out, err = run("train", "--resume", "--run-dir", "run/step_00000006", "--steps", "12")
    assert code == 0, err
    assert "jump" not in out
    assert sums(checkpoint.latest(Path("run"))) == sums(longer.checkpoint)
    # From a checkpoint inside of the decay, which began at step 9, the rate jumps up.
    code, out, err = run("train", "--resume", "--run-dir", "longer", "--steps", "20")
    assert code == 0, err
    assert "the learning rate jumps from 0 to 0.003 at step 12" in out
    assert "resume from a checkpoint before step 9 to avoid the jump" in out


def test_a_finished_run_is_not_resumed(run: Run) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(run_dir="run"), quiet())
    code, _, err = run("train", "--resume", "--run-dir", "run")
    assert code == 1
    assert "run/step_00000008 is at step 8 already; give a higher --steps" in err


def test_overfitting_one_batch_learns_it_by_heart_and_is_resumed_bit_for_bit() -> None:
    more = {
        "overfit_batch": True, "lr": 0.02, "lr_schedule": "constant", "batch_size": 2,
        "total_batch_tokens": 128, "eval_every": 0,
    }  # fmt: skip
    whole = train(settings(run_dir="whole", steps=80, **more), quiet())
    losses = [loss for _, loss in records("whole", "loss")]
    assert losses[-1] < 0.5 < 5 < losses[0]
    train(settings(run_dir="parts", steps=40, **more), quiet())
    assert sums(resume("parts", steps=80).checkpoint) == sums(whole.checkpoint)


def test_an_overfitted_batch_is_the_first_one_again_and_again() -> None:
    config = settings(overfit_batch=True, batch_size=2, total_batch_tokens=128)
    data = of_run(config)
    sizes = checkpoint.load(train(replace(config, steps=1), quiet()).checkpoint).model
    repeated, usual = (
        batch_loader(c, data, sizes) for c in (config, replace(config, overfit_batch=False))
    )
    first = [usual.next_batch().tokens for _ in range(2)]
    for _ in range(3):
        for tokens in first:
            np.testing.assert_array_equal(repeated.next_batch().tokens, tokens)


def test_settings_are_saved_for_another_run(run: Run) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    config = settings(run_dir="run", data=str(Path("numbers.txt").absolute()))
    first = train(config, quiet())
    code, out, err = run("train", "--config", "run/settings.toml", "--run-dir", "again")
    assert code == 0, err
    assert 'lr_schedule = "cosine"\n' in out
    again = checkpoint.load(checkpoint.latest(Path("again")))
    assert replace(again.train, run_dir="run") == config
    assert sums(first.checkpoint) == sums(checkpoint.latest(Path("again")))
    assert re.search(
        r"^# Use these settings again: gpu-gpt2 train --config run/settings.toml\n",
        Path("run/settings.toml").read_text(),
    )


def test_a_run_is_resumed_from_inside_of_its_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(run_dir="run", data=str(Path("numbers.txt").absolute())), quiet())
    folder = Path("run/step_00000008").absolute()
    files = sorted(path.name for path in folder.iterdir())
    monkeypatch.chdir(folder)
    code, _, err = run("train", "--resume", "--run-dir", ".", "--steps", "9")
    assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == files
    assert checkpoint.latest(folder.parent).name == "step_00000009"


def test_a_checkpoint_that_was_set_aside_is_resumed_in_a_folder_of_its_own(run: Run) -> None:
    """Its old checkpoints would be removed by the retention of the run that continues there."""
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(run_dir="run", save_every=2, keep_last=0), quiet())
    resume("run/step_00000002", steps=3)
    aside = Path("run/set_aside/step_00000006")
    code, _, err = run("train", "--resume", "--run-dir", str(aside))
    assert code == 1
    assert f"{aside} was set aside when its run was resumed from an older checkpoint; copy" in err
    shutil.copytree(aside, "new/step_00000006")
    code, _, err = run("train", "--resume", "--run-dir", "new")
    assert code == 0, err
    assert checkpoint.latest(Path("new")).name == "step_00000008"


def test_a_hellaswag_file_given_to_resume_is_found_from_any_folder() -> None:
    outcome = train(settings(run_dir="run"), quiet())
    state = checkpoint.load(outcome.checkpoint)
    resumed = resumed_config(state, outcome.checkpoint, {"hellaswag": "questions.bin"})
    assert resumed.hellaswag == str(Path("questions.bin").absolute())


def test_data_that_has_moved_is_named_and_other_data_is_refused(run: Run) -> None:
    shutil.copy("../numbers.txt", "numbers.txt")
    train(settings(run_dir="run", data=str(Path("numbers.txt").absolute())), quiet())
    shutil.move("numbers.txt", "moved.txt")
    resumed = ("train", "--resume", "--run-dir", "run", "--steps", "9")
    code, _, err = run(*resumed)
    assert code == 1
    assert "no file " in err
    Path("other.txt").write_text(TEXT[::-1])
    code, _, err = run(
        "train", "--resume", "--run-dir", "run", "--steps", "9", "--data", "other.txt"
    )
    assert code == 1
    assert "not those of the saved run" in err
    code, _, err = run(
        "train", "--resume", "--run-dir", "run", "--steps", "9", "--data", "moved.txt"
    )
    assert code == 0, err
    saved = checkpoint.load(checkpoint.latest(Path("run"))).train.data
    assert saved == str(Path("moved.txt").absolute())
