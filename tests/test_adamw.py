"""kernels/adamw.cu and the NumPy op, on every device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from devices import assert_case, every_device, make_ops, op_cases, upload

from gpu_gpt2.device.base import FLOAT32, X_DTYPES, Array
from gpu_gpt2.ops.cases import Case
from gpu_gpt2.ops.table import GROWTH_INTERVAL, AdamWSettings, Ops

SETTINGS = AdamWSettings(
    beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, max_loss_scale=64.0
)


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
    """What prepare_update makes of a gradient's squared norm, after `counts` and `scale`."""

    def __init__(
        self, ops: Ops, *, grad_sq: float, scale: float = 16.0, counts: tuple[int, int] = (0, 0)
    ) -> None:
        def array(*values: float) -> Array:
            return upload(ops.device, np.array(values), FLOAT32)

        factors, report = array(*[np.nan] * 5), array(*[np.nan] * 3)
        loss_scale, made = array(scale), array(*counts)
        losses, lr = array(1.0, 2.0, 6.0), array(0.25)
        ops.prepare_update(
            factors, report, loss_scale, made, losses, array(grad_sq), lr, 1 / 3, SETTINGS
        )
        download = ops.device.download
        self.apply, self.grad_factor, self.lr, self.c1, self.c2 = download(factors).tolist()
        self.loss, self.grad_norm, reported_scale = download(report).tolist()
        self.scale = float(download(loss_scale)[0])
        assert reported_scale == self.scale
        self.counts = tuple(download(made).tolist())


@every_device
@pytest.mark.parametrize("updates", [0, 1, 17, 999, 10**6])
def test_factors_to_the_last_digits(updates: int, dtype: str, device: str) -> None:
    """The limits of the cases follow the largest factor; these each factor itself."""
    found = Prepared(make_ops(device, dtype), grad_sq=(16 * 5.0) ** 2, counts=(updates, 7))
    t = updates + 1
    assert (found.apply, found.lr, found.loss) == (1.0, 0.25, 3.0)
    assert found.grad_norm == 5.0
    assert found.grad_factor == pytest.approx(1 / 5 / 16, rel=2e-7)
    assert found.c1 == pytest.approx(1 - 0.9**t, rel=3e-7)
    assert found.c2 == pytest.approx(-math.expm1(t * math.log(0.999)), rel=3e-7)
    assert found.counts == (t, 8)
    below = Prepared(make_ops(device, dtype), grad_sq=(16 * 0.5) ** 2)
    assert below.grad_factor == 1 / 16


@every_device
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_halves_the_scale(
    bad: float, dtype: str, device: str
) -> None:
    ops = make_ops(device, dtype)
    found = Prepared(ops, grad_sq=bad, scale=16.0, counts=(5, 4))
    assert (found.apply, found.scale, found.counts) == (0.0, 8.0, (5, 0))
    assert not math.isfinite(found.grad_norm)
    assert found.loss == 3.0
    at_the_bottom = Prepared(ops, grad_sq=bad, scale=1.0)
    assert at_the_bottom.scale == 1.0


@every_device
def test_the_scale_doubles_after_many_updates_in_a_row(dtype: str, device: str) -> None:
    ops = make_ops(device, dtype)
    cases: list[tuple[int, float, Any]] = [
        (GROWTH_INTERVAL - 2, 16.0, (16.0, GROWTH_INTERVAL - 1)),
        (GROWTH_INTERVAL - 1, 16.0, (32.0, 0)),
        (GROWTH_INTERVAL - 1, 64.0, (64.0, 0)),
    ]
    for good_steps, scale, expected in cases:
        found = Prepared(ops, grad_sq=1.0, scale=scale, counts=(9000, good_steps))
        assert (found.scale, found.counts[1]) == expected
        assert found.grad_factor == 1 / scale  # of the scale that the gradient was computed with


@pytest.mark.parametrize("decayed", [-1, 34])
def test_refuses_to_decay_more_than_there_is(decayed: int) -> None:
    ops = make_ops("emulator", "fp32")
    n = [ops.device.zeros((33,), FLOAT32) for _ in range(5)]
    with pytest.raises(ValueError, match=f"decayed {decayed} is not within 0 to 33"):
        ops.adamw(*n, ops.device.zeros((5,), FLOAT32), decayed, SETTINGS)
