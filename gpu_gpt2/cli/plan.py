"""`gpu-gpt2 plan`: the memory that training needs, and the largest batch that fits into a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.table import Table

from gpu_gpt2.cli.common import console, say, shared_option
from gpu_gpt2.config import OPTIONS, model_config
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.model import check_seq_len
from gpu_gpt2.open_model import open_model
from gpu_gpt2.training.memory import (
    CUDA_OVERHEAD,
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
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of the GPU, such as 8GB or 24GiB.")
    ] = "80GB",
    init_from: Annotated[str, shared_option("init_from")] = "",
    model: Annotated[str | None, shared_option("model", show_default="gpt2")] = None,
    n_layer: Annotated[int, shared_option("n_layer")] = 0,
    n_head: Annotated[int, shared_option("n_head")] = 0,
    n_embd: Annotated[int, shared_option("n_embd")] = 0,
    context: Annotated[int, shared_option("context")] = 0,
    dtype: Annotated[str, shared_option("dtype")] = "bf16",
    seq_len: Annotated[
        int | None, shared_option("seq_len", show_default="the full context of the model")
    ] = None,
    batch_size: Annotated[
        int | None, shared_option("batch_size", show_default="the most that fit")
    ] = None,
    recompute: Annotated[
        int | None, shared_option("recompute", show_default="the lowest level that suffices")
    ] = None,
    optimizer: Annotated[str, shared_option("optimizer")] = "adamw",
) -> None:
    """Print the memory that training needs, and the largest batch that fits; needs no GPU."""
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "context": context}
    if init_from:
        _check_no_sizes(init_from, {"model": model, **sizes})
        config = open_model(init_from).config
    else:
        config = model_config(model or "gpt2", **sizes)
    T = config.n_positions if seq_len is None else seq_len
    check_seq_len(T, config)
    available = parse_bytes(memory)
    usable = available - CUDA_OVERHEAD

    name = init_from or model or "gpt2"
    say(f"{name} in {dtype}, sequences of {T} tokens, a GPU of {format_bytes(available)}")
    levels = Table(box=None)
    for title in ("recompute", "largest batch", "bytes per sequence"):
        levels.add_column(title, justify="right")
    for level in RECOMPUTE_LEVELS:
        one, two = (planned_bytes(config, dtype, B, T, level, optimizer=optimizer) for B in (1, 2))
        largest = largest_batch(config, dtype, T, level, usable, optimizer=optimizer)
        levels.add_row(str(level), str(largest or "none"), format_bytes(two - one))
    console.print(levels)

    if batch_size is None:
        chosen = best_fit(
            config,
            dtype,
            T,
            available,
            headroom=CUDA_OVERHEAD,
            recompute=recompute,
            optimizer=optimizer,
        )
    else:
        tried = RECOMPUTE_LEVELS if recompute is None else (recompute,)
        plans = [
            memory_plan(config, dtype, batch_size, T, level, optimizer=optimizer) for level in tried
        ]
        chosen = next((fit for fit in plans if fit.total <= usable), plans[-1])
    say(f"\nwith --batch-size {chosen.batch_size} --recompute {chosen.recompute}")
    console.print(plan_table(chosen))
    say(f"and about {format_bytes(CUDA_OVERHEAD)} for CUDA and its libraries (an estimate)")
    check_fits(chosen, available, headroom=CUDA_OVERHEAD)


def _check_no_sizes(init_from: str, sizes: Mapping[str, object]) -> None:
    """Raises ConfigError for sizes that are given beside a model that has its own."""
    if contradicting := [OPTIONS[name].flag for name, value in sizes.items() if value]:
        raise ConfigError(
            f"--init-from {init_from} has sizes of its own; leave out {', '.join(contradicting)}"
        )
