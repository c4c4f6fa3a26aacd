"""Learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

import math

from gpu_gpt2.config import TrainConfig
from gpu_gpt2.errors import ConfigError


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of step `step`, counted from 0.

    The warm-up is linear and reaches config.lr on step `warmup_steps - 1`. Then `lr_schedule`
    applies; cosine, linear and wsd would reach lr * final_lr_fraction on step `steps`, one step
    after the last. Cosine and linear equal llm.c's. wsd (Hu et al. 2024, "MiniCPM"; Hägele et al.
    2024) decays linearly, while llm.c's follows a square root. constant has a warm-up, while
    llm.c's has none.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    start = decay_start(config)
    progress = min(1.0, max(0.0, (step - start) / max(1, config.steps - start)))
    lowest = config.lr * config.final_lr_fraction
    if config.lr_schedule == "cosine":
        return lowest + 0.5 * (1.0 + math.cos(math.pi * progress)) * (config.lr - lowest)
    return config.lr - progress * (config.lr - lowest)


def decay_start(config: TrainConfig) -> int:
    """Returns the step on which the learning rate begins to fall; `steps` if it never falls."""
    if config.lr_schedule == "constant":
        return config.steps
    if config.lr_schedule == "wsd":
        return config.steps - round(config.decay_fraction * config.steps)
    return config.warmup_steps


def check_lengths(config: TrainConfig) -> None:
    """Raises ConfigError if warm-up and decay do not fit into the steps of the run."""
    if config.warmup_steps > config.steps:
        raise ConfigError(
            f"--warmup-steps {config.warmup_steps} is longer than the run of {config.steps} steps; "
            f"use a shorter warm-up or more --steps"
        )
    if (start := decay_start(config)) < config.warmup_steps:
        raise ConfigError(
            f"--warmup-steps {config.warmup_steps} and the decay from step {start} on "
            f"(--decay-fraction {config.decay_fraction} of {config.steps} steps) overlap; shorten "
            f"one of them"
        )
