"""Learning-rate schedules, as pure functions of the step."""

import math


def warmup_cosine(
    step: int, *, lr: float, warmup_steps: int, steps: int, final_lr_fraction: float
) -> float:
    """Returns the learning rate of step `step`, from 0 on: linear warm-up, then half a cosine.

    Warm-up ends at `lr` on step `warmup_steps - 1`; the cosine would reach `lr *
    final_lr_fraction` on step `steps`. Source: llm.c's "cosine" schedule.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    lowest = lr * final_lr_fraction
    return lowest + 0.5 * (1.0 + math.cos(math.pi * progress)) * (lr - lowest)
