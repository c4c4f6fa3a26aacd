"""kernels/adamw.cu and the NumPy op, on every device."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.device.source import kernels_dir
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.table import (
    GROWTH_INTERVAL,
    MIN_LOSS_SCALE,
    SKIPPED,
    WINDOW,
    AdamWSettings,
    Ops,
    Report,
)

SETTINGS = AdamWSettings(
    beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, max_loss_scale=64.0
)
NO_VALUES = np.full((2, WINDOW), np.nan)


@op_cases("adamw", "prepare_update")
def test_agrees_with_float64(case: Case, dtype: str, device: str) -> None:
    assert_case(case, dtype, device)


@every_device
def test_nothing_changes_when_the_factors_say_so(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    rng = np.random.default_rng(0)
    states = [upload(ops.device, rng.uniform(0.1, 1.0, 33), FLOAT32) for _ in range(3)]
    master = states[0]
    param = master if dtype == "fp32" else upload(ops.device, np.zeros(33), X_DTYPES[dtype])
    before = [ops.device.download(array).tobytes() for array in (*states, param)]
    grad = upload(ops.device, np.ones(33), FLOAT32)
    factors = upload(ops.device, np.array([0.0, np.nan, 0.1, 0.1, 0.1]), FLOAT32)
    ops.adamw(*states, param, grad, factors, 10, SETTINGS)
    assert [ops.device.download(array).tobytes() for array in (*states, param)] == before


class Prepared:
    """One call of prepare_update: what it makes of a step's loss and squared gradient norm."""

    def __init__(
        self,
        ops: Ops,
        *,
        loss: float = 3.0,
        grad_sq: float,
        scale: float = 16.0,
        counts: tuple[int, ...] = (0, 0, 0),
        windows: npt.ArrayLike = NO_VALUES,
        settings: AdamWSettings = SETTINGS,
    ) -> None:
        def array(*values: float) -> Array:
            return upload(ops.device, np.array(values), FLOAT32)

        factors, report = array(*[np.nan] * 5), array(*[np.nan] * 7)
        loss_scale, made, held = array(scale), array(*counts), upload(ops.device, windows, FLOAT32)
        losses, lr = array(0.0, loss, 2 * loss), array(0.25)
        ops.prepare_update(
            factors, report, loss_scale, made, held, losses, array(grad_sq), lr, 1 / 3, settings
        )
        download = ops.device.download
        self.apply, self.grad_factor, self.lr, self.c1, self.c2 = download(factors).tolist()
        self.report = Report(*download(report).tolist())
        self.skipped = SKIPPED[int(self.report.skipped)]
        self.scale = float(download(loss_scale)[0])
        assert self.apply == (not self.skipped)
        assert (self.report.scaled_by, self.report.loss_scale) == (scale, self.scale)
        self.counts = tuple(download(made).tolist())
        self.windows = download(held)


@every_device
@pytest.mark.parametrize("updates", [0, 1, 17, 999, 10**6])
def test_factors_to_the_last_digits(updates: int, dtype: str, device: str) -> None:
    """The limits of the cases follow the largest factor; these each factor itself."""
    found = Prepared(make_ops(device, dtype), grad_sq=(16 * 5.0) ** 2, counts=(updates, 7, 0))
    t = updates + 1
    assert (found.apply, found.lr, found.report.loss) == (1.0, 0.25, 3.0)
    assert found.report.norm == 5.0
    assert found.grad_factor == pytest.approx(1 / 5 / 16, rel=2e-7)
    assert found.c1 == pytest.approx(1 - 0.9**t, rel=3e-7)
    assert found.c2 == pytest.approx(-math.expm1(t * math.log(0.999)), rel=3e-7)
    assert found.counts == (t, 8, 0)
    below = Prepared(make_ops(device, dtype), grad_sq=(16 * 0.5) ** 2)
    assert below.grad_factor == 1 / 16


@every_device
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_halves_the_scale(
    bad: float, dtype: str, device: str
) -> None:
    ops = make_ops(device, dtype)
    found = Prepared(ops, grad_sq=bad, scale=16.0, counts=(5, 4, 0))
    assert (found.skipped, found.scale, found.counts) == ("not finite", 8.0, (5, 0, 0))
    assert not math.isfinite(found.report.norm)
    assert found.report.loss == 3.0
    above_the_bottom = Prepared(ops, grad_sq=bad, scale=2.0, counts=(5, 4, 0))
    assert (above_the_bottom.scale, above_the_bottom.counts) == (1.0, (5, 0, 0))
    at_the_bottom = Prepared(ops, grad_sq=bad, scale=1.0, counts=(5, 4, 0))
    assert (at_the_bottom.scale, at_the_bottom.counts) == (1.0, (5, 0, 1))


@every_device
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_leaves_the_scale(bad: float, dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    for grad_sq in (1.0, np.nan):
        found = Prepared(ops, loss=bad, grad_sq=grad_sq, counts=(5, 4, 0))
        assert (found.skipped, found.scale, found.counts) == ("not finite", 16.0, (5, 4, 1))
    training_on = replace(SETTINGS, halt=False)
    found = Prepared(ops, loss=bad, grad_sq=1.0, counts=(5, 4, 0), settings=training_on)
    assert (found.skipped, found.scale, found.counts) == ("not finite", 16.0, (5, 4, 0))


@every_device
def test_a_halted_step_changes_nothing(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    for loss, grad_sq in ((3.0, 1.0), (3.0, np.inf), (np.nan, 1.0)):
        before = np.random.default_rng(0).normal(size=(2, WINDOW)).astype(np.float32)
        found = Prepared(ops, loss=loss, grad_sq=grad_sq, counts=(5, 4, 1), windows=before)
        assert (found.skipped, found.scale, found.counts) == ("halted", 16.0, (5, 4, 1))
        np.testing.assert_array_equal(found.windows, before)
        assert math.isnan(found.report.loss_zscore)
        assert math.isnan(found.report.grad_zscore)


def ordinary_windows() -> npt.NDArray[np.float32]:
    """Windows of numbers with the mean 3 and 0.5, and with the standard deviation 0.1."""
    rng = np.random.default_rng(0)
    windows = rng.normal(size=(2, WINDOW))
    windows -= windows.mean(axis=1, keepdims=True)
    windows /= windows.std(axis=1, keepdims=True)
    return (0.1 * windows + np.array([[3.0], [0.5]])).astype(np.float32)


def zscores(windows: npt.NDArray[np.float32]) -> list[float]:
    """The z-scores of the newest values, in float64."""
    values = windows.astype(np.float64)
    return ((values[:, -1] - values.mean(axis=1)) / values.std(axis=1)).tolist()


@every_device
def test_zscores_of_the_newest_values(dtype: str, device: str) -> None:
    before = ordinary_windows()
    found = Prepared(make_ops(device, dtype), loss=3.3, grad_sq=(16 * 0.3) ** 2, windows=before)
    np.testing.assert_array_equal(found.windows[:, :-1], before[:, 1:])
    assert found.windows[0, -1] == found.report.loss == pytest.approx(3.3, rel=1e-6)
    assert found.windows[1, -1] == found.report.norm == pytest.approx(0.3, rel=1e-6)
    scores = [found.report.loss_zscore, found.report.grad_zscore]
    np.testing.assert_allclose(scores, zscores(found.windows), rtol=2e-7)
    assert scores[0] > 2
    assert scores[1] < -1.9


@every_device
@pytest.mark.parametrize("value", [2.0**-70, 3.0, 2.0**120])
def test_zscores_of_tiny_and_huge_values(value: float, dtype: str, device: str) -> None:
    """The square of a deviation need not be a float32, and equal values have no deviation."""
    ops = make_ops(device, dtype)
    equal = np.full((2, WINDOW), value)
    found = Prepared(ops, loss=value, grad_sq=1.0, windows=equal)
    assert found.report.loss_zscore == 0.0
    found = Prepared(ops, loss=2 * value, grad_sq=1.0, windows=equal)
    assert found.report.loss_zscore == pytest.approx(math.sqrt(WINDOW - 1), rel=2e-7)


@every_device
def test_there_are_no_zscores_until_the_window_is_full(dtype: str, device: str) -> None:
    """The last NaN leaves the window with its 128th value."""
    ops = make_ops(device, dtype)
    strict = replace(SETTINGS, max_loss_zscore=1e-3, max_grad_zscore=1e-3)
    windows = ordinary_windows()
    windows[:, :2] = np.nan
    found = Prepared(ops, loss=9.0, grad_sq=1e6, windows=windows, settings=strict)
    assert found.skipped == ""
    assert math.isnan(found.report.loss_zscore)
    assert math.isnan(found.report.grad_zscore)
    found = Prepared(ops, loss=9.0, grad_sq=1e6, windows=found.windows, settings=strict)
    assert found.skipped == "loss spike"
    assert found.report.loss_zscore > 5
    assert found.report.grad_zscore > 5


@every_device
def test_a_value_that_is_not_finite_stays_out_of_its_window(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    before = ordinary_windows()
    found = Prepared(ops, loss=3.1, grad_sq=np.inf, windows=before)
    np.testing.assert_array_equal(found.windows[1], before[1])
    assert found.windows[0, -1] == found.report.loss
    assert math.isfinite(found.report.loss_zscore)
    assert math.isnan(found.report.grad_zscore)
    found = Prepared(ops, loss=np.nan, grad_sq=1.0, windows=before)
    np.testing.assert_array_equal(found.windows[0], before[0])
    assert found.windows[1, -1] == found.report.norm
    assert math.isnan(found.report.loss_zscore)
    assert math.isfinite(found.report.grad_zscore)


@every_device
def test_only_high_outliers_are_skipped_and_only_with_a_limit(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    low, usual, high = 0.5**2, 3.0**2, 9.0**2  # losses, squared; the windows' mean is 3
    expected: list[tuple[float, float, float, float, str]] = [
        (high, high, 0, 0, ""),
        (high, high, 5, 5, "loss spike"),
        (high, high, 0, 5, "gradient spike"),
        (usual, high, 5, 5, "gradient spike"),
        (usual, high, 5, 0, ""),
        (high, usual, 0, 5, ""),
        (low, low, 1, 1, ""),
        (high, high, 20, 20, ""),
    ]
    for loss, grad_sq, max_loss, max_grad, skipped in expected:
        settings = replace(SETTINGS, max_loss_zscore=max_loss, max_grad_zscore=max_grad)
        windows = ordinary_windows()
        windows[1] += 2.5  # norms have the mean 3 too
        found = Prepared(
            ops,
            loss=math.sqrt(loss),
            grad_sq=16 * 16 * grad_sq,
            counts=(5, GROWTH_INTERVAL - 1, 0),
            windows=windows,
            settings=settings,
        )
        case = (loss, grad_sq, max_loss, max_grad)
        assert found.skipped == skipped, case
        updated = (32.0, (6, 0, 0)) if not skipped else (16.0, (5, GROWTH_INTERVAL - 1, 0))
        assert (found.scale, found.counts) == updated, case
        assert found.windows[0, -1] == found.report.loss, case
        assert found.windows[1, -1] == found.report.norm, case


@every_device
def test_the_scale_doubles_after_many_updates_in_a_row(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    cases: list[tuple[int, float, Any]] = [
        (GROWTH_INTERVAL - 2, 16.0, (16.0, GROWTH_INTERVAL - 1)),
        (GROWTH_INTERVAL - 1, 16.0, (32.0, 0)),
        (GROWTH_INTERVAL - 1, 64.0, (64.0, 0)),
    ]
    for good_steps, scale, expected in cases:
        found = Prepared(ops, grad_sq=1.0, scale=scale, counts=(9000, good_steps, 0))
        assert (found.scale, found.counts[1]) == expected
        assert found.grad_factor == 1 / scale  # of the scale that the gradient was computed with


@pytest.mark.parametrize("decayed", [-1, 34])
def test_refuses_to_decay_more_than_there_is(decayed: int) -> None:
    ops = make_ops("emulator", "fp32")
    n = [ops.device.zeros((33,), FLOAT32) for _ in range(5)]
    with pytest.raises(ValueError, match=f"decayed {decayed} is not within 0 to 33"):
        ops.adamw(*n, ops.device.zeros((5,), FLOAT32), decayed, SETTINGS)


def test_the_kernel_has_the_constants_of_the_table() -> None:
    text = (kernels_dir() / "adamw.cu").read_text()
    constants = dict(re.findall(r"^#define (\w+) +([\d.]+)f? ", text, re.MULTILINE))
    assert constants == {"WINDOW": str(WINDOW), "LOWEST_SCALE": str(MIN_LOSS_SCALE)}
    body = re.search(r"enum Skipped {(.*?)};", text, re.DOTALL)
    assert body
    names = re.findall(r"^    (\w+),", body[1], re.MULTILINE)
    assert [name.lower().replace("_", " ") for name in names] == ["updated", *SKIPPED[1:]]
