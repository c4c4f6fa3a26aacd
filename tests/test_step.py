"""A whole training step by kernels against the same step in NumPy: every op in its place."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from devices import every_device, kernel_devices
from models import new_model, noisy_weights, random_batch, training_step

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import flat_views
from gpu_gpt2.models.families import parameters
from gpu_gpt2.models.model import Model
from gpu_gpt2.ops.table import WINDOW
from gpu_gpt2.training.optimizer import AdamW, StepResult, UpdateState

CONFIG = GPT2Config(vocab_size=131, n_positions=19, n_embd=48, n_layer=2, n_head=3)
B, T = 2, 17
MICRO_STEPS = 2
# Each limit is about four times the error seen in the emulator (a loss happened to be exact). Of a
# gradient: worst element, as part of the tensor's largest. Of the weights: root mean square, for
# where a gradient is almost zero, Adam's first step depends on its sign alone, so that single
# weights may differ by twice the learning rate.
LOSS_LIMITS = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 2e-5}
GRAD_LIMITS = {"fp32": 1.5e-6, "bf16": 2e-2, "fp16": 3e-3}
WEIGHT_LIMITS = {"fp32": 1e-7, "bf16": 4e-4, "fp16": 1e-4}


def two_micro_steps(model: Model, optimizer: AdamW, updates: int) -> list[float]:
    rng = np.random.default_rng(1)
    return [
        training_step(
            model, optimizer, [random_batch(CONFIG, rng, B, T) for _ in range(MICRO_STEPS)], 1e-3
        ).loss
        for _ in range(updates)
    ]


def weights() -> np.ndarray:
    """Noisy weights that bfloat16 holds exactly, so that all dtypes start from the same numbers."""
    return noisy_weights(CONFIG, noise_seed=5).astype("bfloat16").astype(np.float32)


def built(
    device: str, dtype: str, weight_decay: float = 0.1, **settings: float
) -> tuple[Model, AdamW]:
    model = new_model(CONFIG, device, dtype, B=B, T=T)
    optimizer = AdamW(model, weight_decay=weight_decay, **settings)
    optimizer.load(weights())
    return model, optimizer


@kernel_devices
def test_a_training_step_equals_the_numpy_step(dtype: str, device: str) -> None:
    reference, reference_optimizer = built("cpu", "fp32")
    ours, optimizer = built(device, dtype)
    expected = two_micro_steps(reference, reference_optimizer, updates=1)
    actual = two_micro_steps(ours, optimizer, updates=1)
    np.testing.assert_allclose(actual, expected, rtol=LOSS_LIMITS[dtype])
    download = ours.ops.device.download
    gradient = download(ours.grad_arena) / download(optimizer.loss_scale)
    grads = flat_views(parameters(CONFIG), gradient)
    for spec in parameters(CONFIG):
        grad, right = getattr(grads, spec.name), getattr(reference.grads, spec.name)
        worst = np.abs(grad - right).max() / np.abs(right).max()
        assert worst < GRAD_LIMITS[dtype], f"gradient of {spec.name}: {worst:.2e} of its largest"
    assert not grads.wte[CONFIG.vocab_size :].any()
    drift = download(optimizer.master) - reference_optimizer.master
    assert np.sqrt(np.mean(drift**2)) < WEIGHT_LIMITS[dtype]
    if dtype != "fp32":
        rounded = download(optimizer.master).astype(ours.x_dtype)
        np.testing.assert_array_equal(download(ours.param_arena), rounded)


@kernel_devices
def test_two_runs_give_the_same_bits(dtype: str, device: str) -> None:
    bits = set()
    for _ in range(2):
        model, optimizer = built(device, dtype)
        two_micro_steps(model, optimizer, updates=2)
        bits.add(model.ops.device.download(optimizer.master).tobytes())
    assert len(bits) == 1


@kernel_devices
def test_overfits_one_batch(dtype: str, device: str) -> None:
    model, optimizer = built(device, dtype, weight_decay=0.0)
    batch = random_batch(CONFIG, np.random.default_rng(2), B, T)
    losses = [training_step(model, optimizer, [batch], 1e-2).loss for _ in range(25)]
    assert losses[0] > 4.5  # ln 131 = 4.88
    assert losses[-1] < 0.3


def state_of(optimizer: AdamW) -> list[bytes]:
    """Every bit that updates change."""
    arrays = (optimizer.master, optimizer.m, optimizer.v, optimizer.model.param_arena)
    return [optimizer.model.ops.device.download(array).tobytes() for array in arrays]


def spoil(model: Model, value: float) -> None:
    """Sets one weight of the model, but not its master weight."""
    weight = np.array([value]).astype(model.x_dtype)
    model.ops.device.upload(model.params.lnfb[:1], weight)


@every_device
def test_after_a_step_that_diverged_nothing_changes_until_a_state_is_loaded(
    dtype: str, device: str
) -> None:
    model, optimizer = built(device, dtype)
    two_micro_steps(model, optimizer, updates=1)
    healthy = model.ops.device.download(model.param_arena)
    spoil(model, np.nan)
    before, state = state_of(optimizer), optimizer.state()
    batch = random_batch(CONFIG, np.random.default_rng(2), B, T)
    with np.errstate(all="ignore"):
        bad = training_step(model, optimizer, [batch], 1e-3)
    assert (bad.skipped, bad.diverged) == ("not finite", True)
    assert state_of(optimizer) == before
    assert optimizer.state() == state

    model.ops.device.upload(model.param_arena, healthy)  # a healthy step that is enqueued already
    if dtype == "fp32":
        model.ops.device.upload(optimizer.master, healthy)
    before = state_of(optimizer)
    late = training_step(model, optimizer, [batch], 1e-3)
    assert (late.skipped, late.updated, late.diverged) == ("halted", False, False)
    assert np.isfinite(late.loss)
    assert state_of(optimizer) == before
    assert optimizer.state() == state

    optimizer.load_state(state)
    again = training_step(model, optimizer, [batch], 1e-3)
    assert again.updated
    assert (again.loss, again.grad_norm) == (late.loss, late.grad_norm)
    assert state_of(optimizer) != before


@every_device
def test_without_halt_training_continues_after_a_step_that_diverged(
    dtype: str, device: str
) -> None:
    model, optimizer = built(device, dtype, halt=False)
    healthy = model.ops.device.download(model.param_arena)
    spoil(model, np.inf)
    batch = random_batch(CONFIG, np.random.default_rng(2), B, T)
    with np.errstate(all="ignore"):
        assert training_step(model, optimizer, [batch], 1e-3).diverged
    model.ops.device.upload(model.param_arena, healthy)
    assert training_step(model, optimizer, [batch], 1e-3).updated
    assert optimizer.state().updates == 1


def test_a_loss_that_is_not_finite_prevents_an_update_even_with_a_finite_gradient() -> None:
    model, optimizer = built("cpu", "fp32")
    batch = random_batch(CONFIG, np.random.default_rng(2), B, T)
    losses = model.forward_backward(batch)
    losses[0] = np.inf
    before = state_of(optimizer)
    result = optimizer.step(1e-3, losses).result()
    assert np.isfinite(result.grad_norm)
    assert (result.skipped, result.diverged) == ("not finite", True)
    assert state_of(optimizer) == before


def steps(optimizer: AdamW, first: int, count: int) -> list[StepResult]:
    """Some steps on batches so small that losses vary; batch i depends on i alone."""
    return [
        training_step(
            optimizer.model,
            optimizer,
            [random_batch(CONFIG, np.random.default_rng(i), 1, 4)],
            1e-3,
        )
        for i in range(first, first + count)
    ]


@pytest.mark.parametrize("first", [5, WINDOW, WINDOW + 9])
def test_a_resumed_run_skips_the_same_steps(first: int) -> None:
    """With a window that is half full, just full, and full for long."""
    limits = {"max_loss_zscore": 0.7, "max_grad_zscore": 0.7}
    _, whole = built("cpu", "fp32", **limits)
    steps(whole, 0, first)
    saved = json.loads(json.dumps(asdict(whole.state())))
    assert len(saved["losses"]) == len(saved["grad_norms"]) == min(first, WINDOW)
    _, parts = built("cpu", "fp32", **limits)
    parts.load(whole.master, whole.m, whole.v)
    parts.load_state(UpdateState(**saved))
    more = WINDOW + 20 - first if first < WINDOW else 20
    expected = steps(whole, first, more)
    assert repr(steps(parts, first, more)) == repr(expected)  # a NaN does not equal itself
    assert state_of(parts) == state_of(whole)
    assert parts.state() == whole.state()
    assert {result.skipped for result in expected} == {"", "loss spike", "gradient spike"}


def test_without_limits_windows_change_nothing() -> None:
    """Both limits are 0 unless they are given."""
    ends = []
    for values in ((), (0.0,) * WINDOW):
        _, optimizer = built("cpu", "fp32")
        state = replace(optimizer.state(), losses=values, grad_norms=values)
        optimizer.load_state(state)
        results = steps(optimizer, 0, 3)
        assert all(result.updated for result in results)
        assert all(np.isnan(result.loss_zscore) != bool(values) for result in results)
        ends.append(state_of(optimizer))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "values", [3.0, "12", None, [1.0, "2"], [True], [float("nan")], [1e39], [1.0] * (WINDOW + 1)]
)
@pytest.mark.parametrize("name", ["losses", "grad_norms"])
def test_a_window_that_no_run_has_is_refused(name: str, values: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be a list of at most 128 finite numbers"):
        UpdateState(**{"updates": 0, "good_steps": 0, "loss_scale": 1.0, name: values})


def test_a_state_without_windows_is_that_of_an_older_checkpoint() -> None:
    state = UpdateState(updates=1, good_steps=1, loss_scale=1.0)
    assert (state.losses, state.grad_norms) == ((), ())
    assert replace(state, losses=[1, 2.5]).losses == (1.0, 2.5)
