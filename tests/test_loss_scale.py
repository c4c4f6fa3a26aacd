"""float16's narrow range: what overflows is left out, what would vanish is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from devices import KERNELS
from models import TINY, new_model, quiet, random_batch, train_settings, training_step

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.errors import TrainingError
from gpu_gpt2.models.batch import Batch
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.models.model import Model
from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.optimizer import (
    INITIAL_LOSS_SCALE,
    MAX_LOSS_SCALE,
    AdamW,
    StepResult,
    UpdateState,
)

B, T = 2, 11
FP16 = [param for param in KERNELS if param.values[0] == "fp16"]


def built(device: str, dtype: str) -> tuple[Model, AdamW]:
    model = new_model(TINY, device, dtype, B=B, T=T)
    optimizer = AdamW(model)
    optimizer.load(initial_weights(TINY, 0))
    return model, optimizer


def batch() -> Batch:
    return random_batch(TINY, np.random.default_rng(1), B, T)


@pytest.mark.parametrize(("dtype", "device"), FP16)
def test_an_overflow_is_left_out_and_training_goes_on(dtype: str, device: str) -> None:
    model, optimizer = built(device, dtype)
    download = model.ops.device.download
    optimizer.load_state(UpdateState(updates=0, good_steps=7, loss_scale=MAX_LOSS_SCALE))

    def state() -> list[bytes]:
        arrays = (optimizer.master, optimizer.m, optimizer.v, model.param_arena)
        return [download(array).tobytes() for array in arrays]

    def step() -> StepResult:
        with np.errstate(invalid="ignore"):  # the emulator's matmuls are NumPy's
            return training_step(model, optimizer, [batch()], 1e-2)

    before = state()
    result = step()
    assert not math.isfinite(result.grad_norm)
    assert math.isfinite(result.loss)
    assert (result.skipped, result.diverged) == ("not finite", False)
    assert (result.scaled_by, result.loss_scale) == (MAX_LOSS_SCALE, MAX_LOSS_SCALE / 2)
    assert state() == before
    expected = UpdateState(
        updates=0, good_steps=0, loss_scale=MAX_LOSS_SCALE / 2, losses=(result.loss,)
    )
    assert optimizer.state() == expected

    losses, skipped = [result.loss], 1
    for _ in range(25):
        result = step()
        losses.append(result.loss)
        skipped += not result.updated
    assert 1 < skipped < 12
    assert losses[:skipped] == [losses[0]] * skipped
    assert losses[-1] < 0.3 * losses[0]
    end = optimizer.state()
    assert end.updates == 26 - skipped
    assert end.loss_scale == MAX_LOSS_SCALE / 2**skipped
    assert end.losses == tuple(losses)
    assert len(end.grad_norms) == 26 - skipped


@pytest.mark.parametrize(("dtype", "device"), FP16)
def test_small_gradients_survive_in_a_scale(dtype: str, device: str) -> None:
    """A logit's gradient in one of 20000 micro-batches is about 1e-8: below any float16 but 0."""
    reference, _ = built("cpu", "fp32")
    reference.forward_backward(batch(), micro_steps=20000)
    right = reference.grad_arena
    errors = {}
    for scale in (1.0, INITIAL_LOSS_SCALE):
        model, optimizer = built(device, dtype)
        optimizer.load_state(UpdateState(updates=0, good_steps=0, loss_scale=scale))
        scale_on_device = optimizer.loss_scale
        model.forward_backward(batch(), micro_steps=20000, loss_scale=scale_on_device)
        ours = model.ops.device.download(model.grad_arena) / scale
        errors[scale] = np.linalg.norm(ours - right) / np.linalg.norm(right)
    assert errors[1.0] > 0.1
    assert errors[INITIAL_LOSS_SCALE] < 2e-3


@pytest.mark.parametrize(("dtype", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 2.0**16)])
def test_only_float16_begins_with_a_scale(dtype: str, scale: float) -> None:
    _, optimizer = built("emulator", dtype)
    assert optimizer.state() == UpdateState(updates=0, good_steps=0, loss_scale=scale)
    optimizer.load_state(UpdateState(updates=9, good_steps=8, loss_scale=4.0))
    expected = UpdateState(updates=9, good_steps=8, loss_scale=min(scale, 4.0))
    assert optimizer.state() == expected


@pytest.mark.parametrize(
    ("result", "updated", "diverged"),
    [
        (StepResult(2.0, 1.0, 1.0), True, False),
        (StepResult(2.0, 1.0, 1.0, skipped="loss spike"), False, False),
        (StepResult(2.0, math.inf, 1.0, skipped="not finite"), False, True),
        (StepResult(2.0, math.nan, 1.0, skipped="not finite"), False, True),
        (StepResult(2.0, math.inf, 1.0, scaled_by=2.0, skipped="not finite"), False, False),
        (StepResult(math.nan, math.inf, 2.0, scaled_by=2.0, skipped="not finite"), False, True),
        (StepResult(math.inf, 1.0, 2.0, scaled_by=2.0, skipped="not finite"), False, True),
    ],
)
def test_when_a_run_has_diverged(result: StepResult, updated: bool, diverged: bool) -> None:
    assert (result.updated, result.diverged) == (updated, diverged)


@pytest.mark.parametrize(("dtype", "device"), FP16)
def test_a_spike_leaves_the_scale_and_its_growth(dtype: str, device: str) -> None:
    model, _ = built(device, dtype)
    optimizer = AdamW(model, max_loss_zscore=1.0)
    optimizer.load(initial_weights(TINY, 0))
    before = UpdateState(
        updates=3, good_steps=7, loss_scale=8.0, losses=(1.0, 1.125) * 64, grad_norms=(1.0,)
    )
    optimizer.load_state(before)
    result = training_step(model, optimizer, [batch()], 1e-2)
    assert (result.skipped, result.loss_scale) == ("loss spike", 8.0)
    assert optimizer.state() == replace(
        before,
        losses=(*before.losses[1:], result.loss),
        grad_norms=(1.0, result.grad_norm),
    )


def settings(**changes: object) -> TrainConfig:
    values = {
        "data": "text.txt", "device": "emulator", "dtype": "fp16", "steps": 4, "batch_size": 1,
        "seq_len": 8, "total_batch_tokens": 8, "warmup_steps": 0, "eval_every": 2,
        "save_every": 2, "sample_tokens": 1,
    }  # fmt: skip
    return train_settings(**{**values, **changes})


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_gpt2.data.dataset.cache_dir", lambda _: None)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} is {i * i}.\n" for i in range(40)))


@pytest.mark.usefixtures("text")
def test_a_run_warns_of_skipped_updates_and_saves_the_scale(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gpu_gpt2.training.optimizer.INITIAL_LOSS_SCALE", 2.0**20)
    folder = train(settings(), quiet()).checkpoint
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    norms = [record["grad_norm"] for record in records if "loss" in record]
    skipped = norms.count(None)
    assert norms[:skipped] == [None] * skipped
    assert 0 < skipped < 4
    assert all(0 < norm < 100 for norm in norms[skipped:])  # the scale is not in it
    assert "step 1: gradient out of range; no update, loss scale now 524288" in caplog.messages
    end = checkpoint.load(folder)
    scale = 2.0 ** (20 - skipped)
    assert (end.update.updates, end.update.good_steps) == (4 - skipped, 4 - skipped)
    assert end.update.loss_scale == scale

    middle = checkpoint.load(checkpoint.checkpoints(Path("run"))[0])
    assert middle.step == 2
    again = checkpoint.load(train(settings(run_dir="again"), quiet(), middle).checkpoint)
    for name in ("weights", "m", "v"):
        np.testing.assert_array_equal(getattr(again, name), getattr(end, name), err_msg=name)
    assert again.update == end.update


@pytest.mark.usefixtures("text")
def test_a_run_in_another_dtype_begins_its_scale_anew() -> None:
    first = train(settings(dtype="bf16", steps=1), quiet()).checkpoint
    state = checkpoint.load(first)
    assert (state.update.updates, state.update.loss_scale) == (1, 1.0)
    config = settings(steps=2)
    end = checkpoint.load(train(config, quiet(), state).checkpoint)
    assert end.update.updates in (1, 2)
    assert end.update.loss_scale in (INITIAL_LOSS_SCALE, INITIAL_LOSS_SCALE / 2)


@pytest.mark.usefixtures("text")
def test_a_gradient_out_of_range_at_the_lowest_scale_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_gpt2.training.optimizer.INITIAL_LOSS_SCALE", 2.0)
    result = StepResult(loss=3.0, grad_norm=math.inf, loss_scale=1.0, skipped="not finite")
    monkeypatch.setattr("gpu_gpt2.training.optimizer.PendingStep.result", lambda _: result)
    with pytest.raises(TrainingError, match=r"step 1: loss 3\.0, gradient norm inf: training div"):
        train(settings(), quiet())
