"""A run whose loss is not finite stops, skips the update or rolls back, as --on-nan says."""

import json
import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import quiet, train_settings

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import TrainingError
from gpu_gpt2.models.model import Model
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.run import MAX_ROLLBACKS, MAX_SKIPS
from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.metrics import RunLog

BELL = 7  # a byte that stands in the text once


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lines = [f"{i} squared is {i * i}.\n" for i in range(60)]
    lines[30] += "\a"
    Path("text.txt").write_text("".join(lines))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding of the byte BELL is NaN, whatever the weights are."""
    embedding_fwd = ReferenceOps.embedding_fwd

    def poisoned(self: ReferenceOps, x: Any, tokens: Any, *more: Any) -> None:
        embedding_fwd(self, x, tokens, *more)
        x[tokens == BELL] = np.nan

    monkeypatch.setattr(ReferenceOps, "embedding_fwd", poisoned)


def settings(**changes: object) -> TrainConfig:
    """Of a run whose eight steps see every token of the text at least once."""
    values = {
        "data": "text.txt", "val_data": "val.txt", "steps": 16, "batch_size": 2,
        "total_batch_tokens": 128, "eval_every": 0, "save_every": 2, "sample_tokens": 0,
        "lr_schedule": "constant", "keep_last": 0,
    }  # fmt: skip
    Path("val.txt").write_text("0 squared is 0.\n" * 20)
    return train_settings(**{**values, **changes})


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("is_async", [False, True])
def test_stop_names_the_first_bad_tensor(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "is_async", is_async)
    with pytest.raises(TrainingError) as caught:
        train(settings(), quiet())
    message = str(caught.value)
    assert re.search(r"^step \d+: loss nan, gradient norm nan; embedding_fwd wrote 32 ", message)
    assert "embedded" in message
    assert f"token {BELL}" in message
    assert "the newest checkpoint is run/step_" in message
    assert "\n" not in message
    for folder in checkpoint.checkpoints(Path("run")):
        assert np.isfinite(checkpoint.load(folder).weights).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("is_async", [False, True])
def test_skip_leaves_the_update_out_and_goes_on(
    is_async: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CpuDevice, "is_async", is_async)
    with caplog.at_level(logging.WARNING):
        outcome = train(settings(on_nan="skip"), quiet())
    assert outcome.step == 16
    steps = [r for r in records() if "loss" in r]
    skipped = [r for r in steps if r.get("skipped")]
    assert [r["step"] for r in steps] == list(range(1, 17))
    assert 1 <= len(skipped) <= 4
    assert all(r["skipped"] == "not finite" and r["grad_norm"] is None for r in skipped)
    assert len(caplog.records) == len(skipped)
    assert "embedding_fwd wrote 32 " in caplog.text
    state = checkpoint.load(outcome.checkpoint)
    assert state.update.updates == 16 - len(skipped)
    assert np.isfinite(state.weights).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("is_async", [False, True])
def test_rollback_returns_to_a_checkpoint_and_reads_other_data(
    is_async: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CpuDevice, "is_async", is_async)
    with caplog.at_level(logging.WARNING):
        outcome = train(settings(on_nan="rollback"), quiet())
    rollbacks = caplog.text.count("rolled back to step_")
    assert rollbacks >= 1
    assert outcome.step == 16
    steps = [r["step"] for r in records() if "loss" in r]
    assert steps == list(range(1, 17))
    assert not any(r.get("skipped") for r in records())
    state = checkpoint.load(outcome.checkpoint)
    assert state.update.updates == 16
    # The loader is further than after 16 steps without a rollback.
    epochs, position = state.loader["epoch"], state.loader["position"]
    usual = checkpoint.load(
        train(settings(run_dir="usual", steps=16, on_nan="skip"), quiet()).checkpoint
    ).loader
    assert (epochs, position) > (usual["epoch"], usual["position"])


def test_rollback_gives_up_when_it_does_not_help(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    embedding_fwd, calls = ReferenceOps.embedding_fwd, []

    def broken_after_six(self: ReferenceOps, x: Any, *more: Any) -> None:
        embedding_fwd(self, x, *more)
        calls.append(0)
        if len(calls) > 6:
            x[0, 0, 0] = np.inf

    monkeypatch.setattr(ReferenceOps, "embedding_fwd", broken_after_six)
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="training diverged"):
        train(settings(on_nan="rollback"), quiet())
    assert caplog.text.count("rolled back to step_00000002") == MAX_ROLLBACKS


def test_skipping_gives_up_when_no_step_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding_fwd = ReferenceOps.embedding_fwd

    def broken(self: ReferenceOps, x: Any, *more: Any) -> None:
        embedding_fwd(self, x, *more)
        x[0, 0, 0] = np.inf

    monkeypatch.setattr(ReferenceOps, "embedding_fwd", broken)
    with pytest.raises(TrainingError, match=rf"^step {MAX_SKIPS + 1}: loss nan"):
        train(settings(on_nan="skip", steps=100, save_every=0), quiet())


@pytest.mark.usefixtures("poison")
def test_a_run_that_rolled_back_is_resumed_with_the_same_bits() -> None:
    whole = train(settings(on_nan="rollback", run_dir="whole"), quiet())
    train(settings(on_nan="rollback", steps=9), quiet())
    state = checkpoint.load(checkpoint.latest(Path("run")))
    parts = train(replace(state.train, steps=16), quiet(), state)
    a, b = (checkpoint.load(outcome.checkpoint) for outcome in (whole, parts))
    np.testing.assert_array_equal(a.weights, b.weights)
    assert a.loader == b.loader


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The micro-batches, counted from 1, whose losses are NaN."""
    forward_backward = Model.forward_backward
    numbers: set[int] = set()
    done = 0

    def damaging(self: Model, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        losses = forward_backward(self, *args, **kwargs)
        done += 1
        if done in numbers:
            losses[...] = np.nan
        return losses

    monkeypatch.setattr(Model, "forward_backward", damaging)
    return numbers


ONE_BATCH = {"total_batch_tokens": 64, "steps": 8}  # a micro-batch is a step


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("step", [3, 4, 8])
def test_a_rollback_continues_with_the_data_that_comes_next(
    step: int, is_async: bool, damaged: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "is_async", is_async)
    damaged.add(step)
    outcome = train(settings(on_nan="rollback", **ONE_BATCH), quiet())
    assert outcome.step == 8
    losses = [(r["step"], r["loss"]) for r in records() if "loss" in r]
    assert [at for at, _ in losses] == list(range(1, 9))
    assert np.isfinite([loss for _, loss in losses]).all()
    # All steps read on since the checkpoint are lost, those in flight among them.
    saved = (step - 1) // 2 * 2
    in_flight = 1 if is_async and step % 2 else 0
    drawn = 8 + (step - saved) + in_flight
    usual = train(settings(run_dir="usual", **{**ONE_BATCH, "steps": drawn}), quiet())
    after = [checkpoint.load(path).loader for path in (outcome.checkpoint, usual.checkpoint)]
    assert after[0] == after[1]


@pytest.mark.parametrize("on_nan", ["stop", "rollback"])
def test_without_a_checkpoint_the_first_bad_step_ends_the_run(
    on_nan: str, damaged: set[int]
) -> None:
    damaged.add(1)
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*no checkpoint was saved"):
        train(settings(on_nan=on_nan, **ONE_BATCH), quiet())


def test_a_run_that_diverges_after_every_rollback_ends(damaged: set[int]) -> None:
    damaged.update(range(3, 100))
    with pytest.raises(TrainingError, match=r"step 3: loss nan.*newest checkpoint is .*_00000002"):
        train(settings(on_nan="rollback", **ONE_BATCH), quiet())
    assert [r["step"] for r in records() if "loss" in r] == [1, 2]


def test_samples_that_a_rollback_takes_back_are_shown_again(
    damaged: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = []
    monkeypatch.setattr(RunLog, "sample", lambda self, step, text: samples.append(step))
    damaged.add(4)
    more = {**ONE_BATCH, "sample_every": 3, "sample_tokens": 1, "steps": 6}
    train(settings(on_nan="rollback", **more), quiet())
    assert samples == [3, 3, 6]


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_the_search_for_the_cause_is_not_part_of_step_ms(
    on_nan: str, damaged: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_gpt2.run.first_bad_tensor", lambda *_, **__: time.sleep(0.5))
    damaged.add(3)
    train(settings(on_nan=on_nan, **ONE_BATCH), quiet())
    assert max(r["step_ms"] for r in records() if "loss" in r) < 500
    assert [r["step"] for r in records() if "skipped" in r] == ([3] if on_nan == "skip" else [])
