"""Learning rates are those of llm.c's formulas, and impossible lengths are refused."""

from dataclasses import replace

import pytest

from gpu_gpt2.config import TrainConfig, defaults_for
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.training.schedule import check_lengths, learning_rate


def settings(**changes: object) -> TrainConfig:
    values = {
        **defaults_for("cpu"), "device": "cpu", "dtype": "fp32", "run_dir": "run", "lr": 6e-4,
        "warmup_steps": 10, "steps": 100, "final_lr_fraction": 0.1,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


# Learning rates by schedule and step, by llm.c's formulas with the settings above; constant and the
# decay of wsd differ from llm.c's, and stand here as the docstring of learning_rate defines them.
WARM_UP = {0: 6e-5, 4: 3e-4, 9: 6e-4, 10: 6e-4}
GOLDEN = {
    "cosine": {**WARM_UP, 50: 3.76885e-4, 80: 1.23168e-4, 90: 7.62830e-5, 99: 6.01645e-5},
    "linear": {**WARM_UP, 50: 3.6e-4, 80: 1.8e-4, 90: 1.2e-4, 99: 6.6e-5},
    "constant": {**WARM_UP, 50: 6e-4, 99: 6e-4, 1000: 6e-4},
    "wsd": {**WARM_UP, 79: 6e-4, 80: 6e-4, 90: 3.3e-4, 99: 8.7e-5, 100: 6e-5},
}


@pytest.mark.parametrize("schedule", GOLDEN)
def test_rates_of_every_schedule(schedule: str) -> None:
    config = settings(lr_schedule=schedule)
    for step, expected in GOLDEN[schedule].items():
        assert learning_rate(step, config) == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_without_warmup_the_rate_starts_at_its_peak_and_ends_at_its_lowest(schedule: str) -> None:
    config = settings(lr=1.0, warmup_steps=0, steps=4, final_lr_fraction=0.25, lr_schedule=schedule)
    assert learning_rate(0, config) == 1.0
    assert learning_rate(4, config) == learning_rate(400, config) == 0.25


def test_prolonging_a_wsd_run_changes_no_rate_before_its_decay() -> None:
    short = settings(lr_schedule="wsd", steps=100)
    longer = replace(short, steps=200)
    assert [learning_rate(s, short) for s in range(80)] == [
        learning_rate(s, longer) for s in range(80)
    ]


def test_the_longest_schedule_that_fits_is_taken() -> None:
    check_lengths(settings(warmup_steps=100))
    check_lengths(settings(warmup_steps=80, lr_schedule="wsd"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 101}, "--warmup-steps 101 is longer than the run of 100 steps"),
        (
            {"warmup_steps": 81, "lr_schedule": "wsd"},
            r"--warmup-steps 81 and the decay from step 80 on \(--decay-fraction 0.2 of 100 steps",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_lengths(settings(**changes))
