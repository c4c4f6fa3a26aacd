"""Learning rates are those of llm.c's formula."""

import pytest

from gpu_gpt2.training.schedule import warmup_cosine

# (step, learning rate) by llm.c's formula, with the settings of the first test.
GOLDEN = [
    (0, 6e-5), (4, 3e-4), (9, 6e-4), (10, 6e-4),
    (50, 3.76885e-4), (80, 1.23168e-4), (90, 7.62830e-5), (99, 6.01645e-5),
]  # fmt: skip


@pytest.mark.parametrize(("step", "expected"), GOLDEN)
def test_the_rate_rises_linearly_and_falls_as_a_cosine(step: int, expected: float) -> None:
    lr = warmup_cosine(step, lr=6e-4, warmup_steps=10, steps=100, final_lr_fraction=0.1)
    assert lr == pytest.approx(expected, rel=1e-5)


def test_without_warmup_the_rate_starts_at_its_peak_and_ends_at_its_lowest() -> None:
    settings = {"lr": 1.0, "warmup_steps": 0, "steps": 4, "final_lr_fraction": 0.25}
    assert warmup_cosine(0, **settings) == 1.0
    assert warmup_cosine(4, **settings) == warmup_cosine(400, **settings) == 0.25


def test_a_warmup_longer_than_the_run_ends_below_the_peak() -> None:
    assert warmup_cosine(4, lr=1.0, warmup_steps=10, steps=5, final_lr_fraction=0.0) == 0.5
