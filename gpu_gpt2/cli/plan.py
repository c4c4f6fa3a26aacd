"""`gpu-gpt2 plan`: what fits into how much memory, without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from gpu_gpt2.cli.common import console, say
from gpu_gpt2.config import MAX_RECOMPUTE, MODEL_NAMES, model_config
from gpu_gpt2.device.source import DTYPES
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.gpt2 import check_seq_len
from gpu_gpt2.training.memory import (
    LIBRARIES,
    RECOMPUTE_LEVELS,
    best_fit,
    check_fits,
    format_bytes,
    largest_batch,
    memory_plan,
    parse_bytes,
    plan_table,
    planned_bytes,
)


def show_plan(
    memory: Annotated[str, typer.Option(help="Of the GPU: 8GB, 24GiB ...")] = "80GB",
    model: Annotated[str, typer.Option(help=MODEL_NAMES)] = "gpt2",
    dtype: Annotated[str, typer.Option(help=" | ".join(DTYPES))] = "bf16",
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences; else the most.")] = None,
    recompute: Annotated[int | None, typer.Option(min=0, max=MAX_RECOMPUTE, help="Level.")] = None,
) -> None:
    """Say what training needs, and the largest batch that fits into a GPU's memory."""
    config = model_config(model)
    T = config.n_positions if seq_len is None else seq_len
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if T < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError("--seq-len and --batch-size must be at least 1")
    check_seq_len(T, config)
    available = parse_bytes(memory)
    usable = available - LIBRARIES

    say(f"{model} in {dtype}, sequences of {T} tokens, a GPU of {format_bytes(available)}")
    levels = Table(box=None)
    for title in ("recompute", "largest batch", "bytes per sequence"):
        levels.add_column(title, justify="right")
    for level in RECOMPUTE_LEVELS:
        one, two = (planned_bytes(config, dtype, B, T, level) for B in (1, 2))
        largest = largest_batch(config, dtype, T, level, usable)
        levels.add_row(str(level), str(largest or "none"), format_bytes(two - one))
    console.print(levels)

    if batch_size is None:
        chosen = best_fit(config, dtype, T, available, reserved=LIBRARIES, recompute=recompute)
    else:
        tried = RECOMPUTE_LEVELS if recompute is None else (recompute,)
        plans = [memory_plan(config, dtype, batch_size, T, level) for level in tried]
        chosen = next((fit for fit in plans if fit.total <= usable), plans[-1])
    say(f"\nwith --batch-size {chosen.batch_size} --recompute {chosen.recompute}")
    console.print(plan_table(chosen))
    say(f"and about {format_bytes(LIBRARIES)} for CUDA and its libraries (an estimate)")
    check_fits(chosen, available, reserved=LIBRARIES)
