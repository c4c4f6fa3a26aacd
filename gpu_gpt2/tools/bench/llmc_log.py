"""Reads the step times from the output of llm.c's train_gpt2cu, for the tables of `bench peers`."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Final

from gpu_gpt2.config import GPT2_SIZES
from gpu_gpt2.errors import DataError
from gpu_gpt2.tools.bench.step import StepTime, parse_size

SKIPPED_STEPS: Final = 5  # the first steps of a run, in which the GPU and its caches warm up
STEP_LINE: Final = re.compile(r"step +\d+/\d+ \|.*?\| ([\d.]+) ms \|")


def read_llmc_log(path: Path) -> StepTime:
    """Returns the median of the steps that train_gpt2cu printed, with the size that it printed.

    Raises DataError unless the file is the output of one run on one GPU, with one micro-step per
    step, of a model whose layers and channels are in config.GPT2_SIZES.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None

    def setting(name: str) -> str:
        found = re.findall(rf"^\| {name} +\| (\S+) +\|", text, re.MULTILINE)
        if len(found) != 1:
            raise DataError(
                f"{path} has {len(found)} lines of {name!r}, not one: is it what one run of "
                f"train_gpt2cu printed?"
            )
        return str(found[0])

    def number(name: str) -> int:
        """Returns the setting as an integer, or 0 if it is none, which no check accepts."""
        return int(setting(name)) if setting(name).isdecimal() else 0

    B, T = number("micro batch size B"), number("sequence length T")
    L, C = number("num_layers L"), number("channels C")
    if number("num_processes") != 1:
        raise DataError(f"{path} is of {setting('num_processes')} GPUs; run train_gpt2cu on one")
    if number("total batch size") != B * T:
        raise DataError(
            f"{path} is of {setting('total batch size')} tokens a step; run train_gpt2cu with "
            f"-d {B * T}"
        )
    if L not in GPT2_SIZES or GPT2_SIZES[L][0] != C:
        raise DataError(f"{path} is of a model with {L} layers and {C} channels, which has no name")
    times = [float(ms) for ms in STEP_LINE.findall(text)][SKIPPED_STEPS:]
    if not times or min(times) <= 0:
        raise DataError(
            f"{path}: more than {SKIPPED_STEPS} lines of steps that took time are needed "
            f"(step n/m | loss ... | ... ms | ...)"
        )
    median = statistics.median(times)
    precision = setting("precision")
    return StepTime(
        name="llm.c" if precision == "BF16" else f"llm.c {precision}",
        size=str(parse_size(f"d{L}:{B}x{T}")),
        step_ms=median,
        fastest_ms=min(times),
        tokens_per_s=1000 * B * T / median,
    )
