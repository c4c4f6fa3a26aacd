"""The memory that training needs, computed without a GPU, and the batch that fits into a size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from rich.table import Table

from gpu_gpt2.config import MAX_BATCH_TOKENS, MAX_RECOMPUTE, ModelConfig
from gpu_gpt2.device.base import FLOAT32, X_DTYPES
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.models.arena import bytes_of, element_count
from gpu_gpt2.models.families import activations, constants, parameter_count
from gpu_gpt2.models.kv_cache import cache_bytes
from gpu_gpt2.ops.kernels import SCRATCH_FLOATS
from gpu_gpt2.training.muon import OPTIMIZERS

# Bytes that a process takes on a GPU beside its tensors: the CUDA context, cuBLAS with its
# workspace, the compiled kernels. An estimate: the size depends on the GPU and on the versions.
CUDA_OVERHEAD: Final = 768 << 20
RECOMPUTE_LEVELS: Final = range(MAX_RECOMPUTE + 1)
# Tokens in a micro-batch that keep a GPU busy. Beyond them a larger batch gains less than the
# recomputation costs that makes it fit.
ENOUGH_TOKENS: Final = 4096
UNITS: Final = {  # bytes
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The memory of a training run at one batch size and recompute level, by purpose."""

    batch_size: int
    recompute: int
    rows: tuple[tuple[str, int], ...]  # purpose and bytes

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(size for _, size in self.rows)


def memory_plan(
    config: ModelConfig,
    dtype: str,
    batch_size: int,
    seq_len: int,
    recompute: int,
    *,
    optimizer: str = "adamw",
    host_copies: bool = False,
) -> MemoryPlan:
    """The memory that training on micro-batches of (batch_size, seq_len) tokens allocates.

    With `host_copies` it counts the host memory from which checkpoints are written: for devices
    whose own memory is the host's.
    """
    n, x = parameter_count(config), X_DTYPES[dtype]
    specs = activations(config, batch_size, seq_len, recompute=recompute)
    logits = tuple(spec for spec in specs if spec.name == "logits")
    kind = OPTIMIZERS[optimizer]
    state, scratch = n + element_count(kind.second_moments(config)), kind.scratch(config)
    rows = [("weights", n * x.itemsize)]
    if x != FLOAT32:
        rows.append(("master weights, float32", n * FLOAT32.itemsize))
    rows += [
        ("gradients, float32", n * FLOAT32.itemsize),
        ("optimizer state, float32", state * FLOAT32.itemsize),
        ("optimizer scratch", bytes_of(scratch, x)),
        ("logits", bytes_of(logits, x)),
        ("other activations", bytes_of(specs, x) - bytes_of(logits, x)),
        ("angles of RoPE, float32", element_count(constants(config, seq_len)) * FLOAT32.itemsize),
        ("KV cache of samples", cache_bytes(config, x, batch=1, length=seq_len)),
        ("kernel scratch", SCRATCH_FLOATS * FLOAT32.itemsize),
    ]
    if host_copies:
        rows.append(("checkpoint copies", (n + state) * FLOAT32.itemsize))  # weights and moments
    present = tuple((purpose, size) for purpose, size in rows if size)
    return MemoryPlan(batch_size=batch_size, recompute=recompute, rows=present)


def planned_bytes(
    config: ModelConfig,
    dtype: str,
    batch_size: int,
    seq_len: int,
    recompute: int = 0,
    *,
    optimizer: str = "adamw",
    host_copies: bool = False,
) -> int:
    """The total of `memory_plan` in bytes."""
    plan = memory_plan(
        config,
        dtype,
        batch_size,
        seq_len,
        recompute,
        optimizer=optimizer,
        host_copies=host_copies,
    )
    return plan.total


def largest_batch(
    config: ModelConfig,
    dtype: str,
    seq_len: int,
    recompute: int,
    memory: int,
    sequences: int | None = None,
    *,
    optimizer: str = "adamw",
    host_copies: bool = False,
) -> int:
    """The largest batch size whose plan fits into `memory` bytes, or 0 if none does.

    `sequences` is the number of sequences in an optimizer step: the batch size then divides it.
    `optimizer` and `host_copies` are as for `memory_plan`.
    """

    def fits(batch_size: int) -> bool:
        needed = planned_bytes(
            config,
            dtype,
            batch_size,
            seq_len,
            recompute,
            optimizer=optimizer,
            host_copies=host_copies,
        )
        return needed <= memory

    most = MAX_BATCH_TOKENS // seq_len
    if sequences is not None:
        divisors = (b for b in range(min(sequences, most), 0, -1) if sequences % b == 0)
        return next(filter(fits, divisors), 0)
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) and middle <= most else (low, middle)
    return low


def best_fit(
    config: ModelConfig,
    dtype: str,
    seq_len: int,
    memory: int,
    *,
    headroom: int = 0,
    recompute: int | None = None,
    sequences: int | None = None,
    optimizer: str = "adamw",
    host_copies: bool = False,
) -> MemoryPlan:
    """The plan with the best batch size and recompute level for `memory` less `headroom` bytes.

    The level is the lowest whose largest batch holds ENOUGH_TOKENS; if no level's does, it is the
    lowest of those with the largest batch. `recompute` fixes the level, and `sequences`,
    `optimizer` and `host_copies` are as for `largest_batch`. Raises ConfigError if nothing fits.
    """
    levels = RECOMPUTE_LEVELS if recompute is None else (recompute,)
    best = (0, levels[-1])
    for level in levels:
        batch_size = largest_batch(
            config,
            dtype,
            seq_len,
            level,
            memory - headroom,
            sequences,
            optimizer=optimizer,
            host_copies=host_copies,
        )
        if batch_size > best[0]:
            best = batch_size, level
        if batch_size * seq_len >= ENOUGH_TOKENS:
            break
    fit = memory_plan(
        config,
        dtype,
        max(1, best[0]),
        seq_len,
        best[1],
        optimizer=optimizer,
        host_copies=host_copies,
    )
    check_fits(fit, memory, headroom=headroom)
    return fit


def check_fits(plan: MemoryPlan, memory: int, *, headroom: int = 0, resumed: bool = False) -> None:
    """Raises ConfigError, with advice, if the plan needs more than `memory` less `headroom` bytes.

    The advice for a `resumed` run leaves out options that it cannot change.
    """
    needed = plan.total + headroom
    if needed <= memory:
        return
    ways = []
    if plan.recompute < MAX_RECOMPUTE:
        ways.append("a higher --recompute")
    if not resumed:
        if plan.batch_size > 1:
            ways.append("a smaller --batch-size")
        ways.append("a smaller --seq-len or --model")
    raise ConfigError(
        f"training with --batch-size {plan.batch_size} --recompute {plan.recompute} needs "
        f"{format_bytes(needed)}, and there are {format_bytes(memory)}: "
        f"{'use ' + ', or '.join(ways) if ways else 'free some memory'}"
    )


def parse_bytes(text: str) -> int:
    """The bytes of a size such as "8GB" (10^9 bytes each) or "16 GiB" (2^30 bytes each).

    Raises ConfigError for other text.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e\d+)?)\s*([A-Z]*)", text.strip(), re.IGNORECASE)
    size = float(match[1]) * UNITS.get(match[2].upper(), math.nan) if match else math.nan
    if not math.isfinite(size):
        raise ConfigError(f"cannot read {text!r} as memory; write 8GB, 16GiB or 500MB")
    return int(size)


def format_bytes(size: int) -> str:
    """The size in MB (10^6 bytes) or GB (10^9 bytes), as GPUs are labelled."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def plan_table(plan: MemoryPlan) -> Table:
    """The rows and the total of a plan as a table for the console."""
    columns = Table(box=None, show_header=False)
    columns.add_column()
    columns.add_column(justify="right")
    for name, size in (*plan.rows, ("total", plan.total)):
        columns.add_row(name, format_bytes(size))
    return columns
