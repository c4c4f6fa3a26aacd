"""float16's narrow range: what overflows is left out, what would vanish is kept."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from devices import KERNELS
from rich.console import Console

from gpu_gpt2.config import ModelConfig, TrainConfig
from gpu_gpt2.device import open_device
from gpu_gpt2.errors import TrainingError
from gpu_gpt2.models.gpt2 import GPT2
from gpu_gpt2.models.init import initial_weights
from gpu_gpt2.ops import ops_for
from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.optimizer import (
    FIRST_LOSS_SCALE,
    MAX_LOSS_SCALE,
    AdamW,
    StepReport,
    UpdateCounts,
)

CONFIG = ModelConfig(vocab_size=67, n_positions=11, n_embd=32, n_layer=2, n_head=2)
B, T = 2, 11
FP16 = [param for param in KERNELS if param.values[0] == "fp16"]


def built(device: str, dtype: str) -> tuple[GPT2, AdamW]:
    ops = ops_for(open_device(device), dtype)
    model = GPT2(CONFIG, ops, dtype=dtype, max_batch=B, max_seq_len=T)
    optimizer = AdamW(model)
    optimizer.load(initial_weights(CONFIG, 0))
    return model, optimizer


def forward_backward(model: GPT2, micro_steps: int = 1) -> None:
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)
    order = np.argsort(tokens, axis=None, kind="stable").astype(np.int32)
    model.forward_backward(tokens, targets, order, micro_step=0, micro_steps=micro_steps)


@pytest.mark.parametrize(("dtype", "device"), FP16)
def test_an_overflow_is_left_out_and_training_goes_on(dtype: str, device: str) -> None:
    model, optimizer = built(device, dtype)
    download = model.ops.device.download
    optimizer.load_counts(UpdateCounts(updates=0, in_a_row=7, loss_scale=MAX_LOSS_SCALE))

    def state() -> list[bytes]:
        arrays = (optimizer.master, optimizer.m, optimizer.v, model.param_arena)
        return [download(array).tobytes() for array in arrays]

    def step() -> StepReport:
        with np.errstate(invalid="ignore"):  # the emulator's products are NumPy's
            forward_backward(model)
        optimizer.step(1e-2)
        return optimizer.report()()

    before = state()
    report = step()
    assert not math.isfinite(report.grad_norm)
    assert math.isfinite(report.loss)
    assert (report.updated, report.diverged) == (False, False)
    assert state() == before
    expected = UpdateCounts(updates=0, in_a_row=0, loss_scale=MAX_LOSS_SCALE / 2)
    assert optimizer.counts() == expected

    losses, skipped = [report.loss], 1
    for _ in range(25):
        report = step()
        losses.append(report.loss)
        skipped += not report.updated
    assert 1 < skipped < 12
    assert losses[:skipped] == [losses[0]] * skipped
    assert losses[-1] < 0.3 * losses[0]
    counts = optimizer.counts()
    assert counts.updates == 26 - skipped
    assert counts.loss_scale == MAX_LOSS_SCALE / 2**skipped


@pytest.mark.parametrize(("dtype", "device"), FP16)
def test_small_gradients_survive_in_a_scale(dtype: str, device: str) -> None:
    """A logit's gradient in one of 20000 micro-batches is about 1e-8: below any float16 but 0."""
    reference, _ = built("cpu", "fp32")
    forward_backward(reference, micro_steps=20000)
    right = reference.grad_arena
    errors = {}
    for scale in (1.0, FIRST_LOSS_SCALE):
        model, optimizer = built(device, dtype)
        optimizer.load_counts(UpdateCounts(updates=0, in_a_row=0, loss_scale=scale))
        forward_backward(model, micro_steps=20000)
        ours = model.ops.device.download(model.grad_arena) / scale
        errors[scale] = np.linalg.norm(ours - right) / np.linalg.norm(right)
    assert errors[1.0] > 0.1
    assert errors[FIRST_LOSS_SCALE] < 2e-3


@pytest.mark.parametrize(("dtype", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 2.0**16)])
def test_only_float16_begins_with_a_scale(dtype: str, scale: float) -> None:
    _, optimizer = built("emulator", dtype)
    assert optimizer.counts() == UpdateCounts(updates=0, in_a_row=0, loss_scale=scale)
    optimizer.load_counts(UpdateCounts(updates=9, in_a_row=8, loss_scale=4.0))
    expected = UpdateCounts(updates=9, in_a_row=8, loss_scale=min(scale, 4.0))
    assert optimizer.counts() == expected


@pytest.mark.parametrize(
    ("report", "updated", "diverged"),
    [
        (StepReport(2.0, 1.0, 1.0), True, False),
        (StepReport(2.0, math.inf, 1.0), False, True),
        (StepReport(2.0, math.nan, 1.0), False, True),
        (StepReport(2.0, math.inf, 2.0), False, False),
        (StepReport(math.nan, math.inf, 2.0), False, True),
        (StepReport(math.inf, 1.0, 2.0), True, True),
    ],
)
def test_when_a_run_has_diverged(report: StepReport, updated: bool, diverged: bool) -> None:
    assert (report.updated, report.diverged) == (updated, diverged)


def settings(**changes: object) -> TrainConfig:
    values = {
        "data": "text.txt", "model": "nano", "device": "emulator", "dtype": "fp16",
        "tokenizer": "bytes", "steps": 4, "batch_size": 1, "seq_len": 8,
        "total_batch_tokens": 8, "lr": 3e-3, "warmup_steps": 0, "weight_decay": 0.1,
        "eval_every": 2, "sample_every": 0, "seed": 3, "run_dir": "run",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_gpt2.data.dataset.cache_dir", lambda _: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpu_gpt2.train.SAMPLE_TOKENS", 1)
    Path("text.txt").write_text("".join(f"{i} is {i * i}.\n" for i in range(40)))


@pytest.mark.usefixtures("text")
def test_a_run_says_what_it_left_out_and_saves_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_gpt2.training.optimizer.FIRST_LOSS_SCALE", 2.0**20)
    out = io.StringIO()
    folder = train(settings(), Console(file=out, width=200)).checkpoint
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    norms = [record["grad_norm"] for record in records if "loss" in record]
    skipped = norms.count(None)
    assert norms[:skipped] == [None] * skipped
    assert 0 < skipped < 4
    assert all(0 < norm < 100 for norm in norms[skipped:])  # the scale is not in it
    assert "step 1: gradient out of range; no update, loss scale now 524288\n" in out.getvalue()
    end = checkpoint.load(folder)
    scale = 2.0 ** (20 - skipped)
    assert end.counts == UpdateCounts(updates=4 - skipped, in_a_row=4 - skipped, loss_scale=scale)

    middle = checkpoint.load(checkpoint.checkpoints(Path("run"))[0])
    assert middle.step == 2
    again = checkpoint.load(train(settings(run_dir="again"), Console(file=out), middle).checkpoint)
    for name in ("weights", "m", "v"):
        np.testing.assert_array_equal(getattr(again, name), getattr(end, name), err_msg=name)
    assert again.counts == end.counts


@pytest.mark.usefixtures("text")
def test_a_run_in_another_dtype_begins_its_scale_anew() -> None:
    first = train(settings(dtype="bf16", steps=1), Console(file=io.StringIO())).checkpoint
    state = checkpoint.load(first)
    assert state.counts == UpdateCounts(updates=1, in_a_row=1, loss_scale=1.0)
    config = settings(steps=2)
    end = checkpoint.load(train(config, Console(file=io.StringIO()), state).checkpoint)
    assert end.counts.updates in (1, 2)
    assert end.counts.loss_scale in (FIRST_LOSS_SCALE, FIRST_LOSS_SCALE / 2)


@pytest.mark.usefixtures("text")
def test_a_gradient_out_of_range_at_the_lowest_scale_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_gpt2.training.optimizer.FIRST_LOSS_SCALE", 2.0)
    report = StepReport(loss=3.0, grad_norm=math.inf, loss_scale=1.0)
    monkeypatch.setattr("gpu_gpt2.training.optimizer.AdamW.report", lambda _: lambda: report)
    with pytest.raises(TrainingError, match=r"step 1: loss 3\.0, gradient norm inf: training div"):
        train(settings(), Console(file=io.StringIO()))
