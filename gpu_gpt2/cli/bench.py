"""`gpu-gpt2 bench`: times ops, training and generation, and writes the documentation's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from gpu_gpt2.cli.common import (
    BatchSize,
    Device,
    Dtype,
    ModelName,
    Recompute,
    SeqLen,
    console,
    say,
    show_table,
)
from gpu_gpt2.config import AUTO, DEFAULTS, model_config
from gpu_gpt2.device import base, choose_dtype, open_device
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tools.bench import generate, kernels, overhead, results, static, step
from gpu_gpt2.tools.bench.llmc_log import read_llmc_log

bench_app = typer.Typer(
    no_args_is_help=True, help="Time ops, training steps and text generation on this machine."
)

Steps = Annotated[
    int, typer.Option(min=5, metavar="STEPS", help="Timed steps, of which the median counts.")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="File to which the result is also written."),
]


@bench_app.command("kernels")
def bench_kernels(
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
    model: ModelName = "d12",
    batch_size: BatchSize = 32,
    seq_len: SeqLen = 1024,
    repeat: Annotated[
        int,
        typer.Option(min=3, metavar="RUNS", help="Timed runs of each op, whose median counts."),
    ] = 20,
    static_only: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Time nothing: compile every kernel and list its registers and shared memory, "
            "which needs no GPU.",
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Time every op, and compare it with the limits of the device."""
    config = model_config(model)
    if static_only:
        compiling = track(static.builds(config), "compiling", console=console, transient=True)
        builds = list(compiling)
        show_table(static.table(builds))
        spilled = [build for build in builds if build.resources.spill_bytes]
        say(f"{len(builds)} kernels compiled, {len(spilled)} of them spill registers to memory")
        counts = static.counts(config, "bf16")
        say(f"\nminimum bytes and matmul FLOPs of a sequence of {config.n_positions} tokens, bf16")
        show_table(static.counts_table(counts))
        _save(json, "static", model, None, static.rows(builds), counts=counts)
        return
    device = _timed_device(device_name)
    dtype = choose_dtype(dtype, device)
    ops = ops_for(device, dtype)
    limits = kernels.measure_limits(ops)
    timing = kernels.measure(ops, config, batch_size, seq_len, limits, repeat)
    times = list(track(timing, "timing", console=console, transient=True))
    say(f"{model}, batch {batch_size} x {seq_len}, {dtype}, {device.name}: medians of {repeat}")
    show_table(kernels.table(times, limits))
    if not device.is_gpu:
        say("CPU caches are not emptied between runs: an op that fits into them may beat the limit")
    what = f"{model}, {batch_size} x {seq_len}, {dtype}"
    _save(json, "kernels", what, device, [asdict(row) | asdict(limits) for row in times])


@bench_app.command("step")
def bench_step(
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
    model: ModelName = "d12",
    batch_size: BatchSize = 4,
    seq_len: SeqLen = 64,
    steps: Steps = 5,
    recompute: Recompute = DEFAULTS["recompute"],
    json: Json = None,
) -> None:
    """Time training steps of gpu-gpt2."""
    device = _timed_device(device_name)
    dtype = choose_dtype(dtype, device)
    size = step.Size(model=model, batch_size=batch_size, seq_len=seq_len)
    matmul_tflops = kernels.large_matmul_tflops(ops_for(device, dtype))
    row = step.measure_ours(device, dtype, size, steps, matmul_tflops, recompute)
    say(f"{dtype} on {device.name}, medians of {steps}")
    show_table(step.table([row]))
    for problem in step.problems([row]):
        say(f"! {problem}")
    _save(json, "step", f"{size}, {dtype}", device, [asdict(row)])


@bench_app.command("peers")
def bench_peers(
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL:BxT",
            help="Model, batch size and sequence length to time, such as d12:32x1024; may be "
            "given several times.",
        ),
    ] = None,
    steps: Steps = 10,
    llmc_log: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Output of llm.c's train_gpt2cu, whose step times join the table; may be given "
            "several times.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Time training steps of gpu-gpt2 and of PyTorch, eager and compiled, in one run."""
    device = _timed_device(device_name)
    dtype = choose_dtype(dtype, device)
    logs = [read_llmc_log(path) for path in llmc_log or ()]
    sizes = tuple(map(step.parse_size, size)) if size else step.SIZES[device.name]
    names = (step.OURS, *(step.PEERS if device.is_gpu else step.PEERS[:1]))
    rows: list[step.StepTime] = []
    timing = step.measure_all(device, dtype, sizes, names, steps)
    total = len(sizes) * len(names)
    for row in track(timing, "timing", total=total, console=console, transient=True):
        rows.append(row)
    rows += logs
    say(f"{dtype} on {device.name}, medians of {steps}")
    show_table(step.table(rows))
    for problem in step.problems(rows):
        say(f"! {problem}")
    what = f"{', '.join(dict.fromkeys(row.size for row in rows))}, {dtype}"
    _save(json, "steps", what, device, [asdict(row) for row in rows])
    if not any(row.step_ms for row in rows if row.name == step.OURS):
        raise typer.Exit(1)


@bench_app.command("overhead")
def bench_overhead(
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
    model: ModelName = "d12",
    batch_size: BatchSize = 4,
    seq_len: SeqLen = 64,
    steps: Steps = 10,
    json: Json = None,
) -> None:
    """Time what a run adds to the computation of its steps: batches, log and checks."""
    device = _timed_device(device_name)
    dtype = choose_dtype(dtype, device)
    size = step.Size(model=model, batch_size=batch_size, seq_len=seq_len)
    row = overhead.measure(device.name, dtype, size, steps)
    say(
        f"{size}, {dtype} on {device.name}, medians of {steps}: bare step {row.bare_ms:.2f} ms, "
        f"step of a run {row.run_ms:.2f} ms, of which {row.around_ms:.2f} ms "
        f"({row.around_ms / row.bare_ms:.2%}) pass around the computation"
    )
    _save(json, "overhead", f"{size}, {dtype}", device, [asdict(row)])


@bench_app.command("generate")
def bench_generate(
    device_name: Device = AUTO,
    dtype: Dtype = AUTO,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Named model to time; may be given several times. Default: "
            f"{', '.join(generate.MODELS)}.",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="B",
            help="Sequences that are generated at once; may be given several times. Default: "
            f"{', '.join(map(str, generate.BATCH_SIZES))}.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Tokens of each prompt.")
    ] = 16,
    tokens: Annotated[
        int,
        typer.Option(
            min=generate.MIN_TOKENS,
            metavar="TOKENS",
            help="New tokens of each sequence; the first ones are not timed.",
        ),
    ] = 64,
    json: Json = None,
) -> None:
    """Time text generation of gpu-gpt2 and of transformers in one run.

    The bound is the time to read all weights once at the bandwidth that is measured in the same
    run: no program with a batch of 1 can be faster.
    """
    device = _timed_device(device_name)
    dtype = choose_dtype(dtype, device)
    models, batch_sizes = model or generate.MODELS, batch_size or generate.BATCH_SIZES
    for name in models:
        generate.check_length(name, prompt_tokens, tokens)
    timing = generate.measure(
        device, dtype, models, batch_sizes, prompt_tokens=prompt_tokens, tokens=tokens
    )
    total = 2 * len(models) * len(batch_sizes)
    rows = list(track(timing, "timing", total=total, console=console, transient=True))
    say(f"{dtype} on {device.name}, prompts of {prompt_tokens} tokens, medians of the new tokens")
    show_table(generate.table(rows))
    for line in generate.bounds(rows):
        say(line)
    for problem in generate.problems(rows):
        say(f"! {problem}")
    sizes = ", ".join(dict.fromkeys(row.size for row in rows))
    what = f"{sizes}, prompts of {prompt_tokens}, {dtype}"
    _save(json, "generate", what, device, [asdict(row) for row in rows])
    if not any(row.token_ms for row in rows if row.name == step.OURS):
        raise typer.Exit(1)


@bench_app.command("tables")
def bench_tables() -> None:
    """Rewrite the generated tables and plots of the documentation; run it in the source tree."""
    if not results.FOLDER.is_dir():
        raise ConfigError(f"no folder {results.FOLDER} here; run this in the root of the project")
    for path in results.write_tables(Path()):
        say(f"wrote {path}")


def _timed_device(name: str) -> base.Device:
    device = open_device(name)
    if device.is_emulated:
        raise ConfigError("the emulator's times mean nothing; use --device cuda or cpu")
    return device


def _save(
    path: Path | None,
    kind: str,
    what: str,
    device: base.Device | None,
    rows: Sequence[dict[str, Any]],
    **more: Any,
) -> None:
    if path:
        results.save(path, results.record(kind, what, device, rows) | more)
        say(f"wrote {path}")
