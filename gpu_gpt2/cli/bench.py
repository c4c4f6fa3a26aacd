"""`gpu-gpt2 bench`: speed of ops and of whole steps, size of kernels, tables of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from gpu_gpt2.cli.common import Device, Dtype, console, say, show_table
from gpu_gpt2.config import MAX_RECOMPUTE, MODEL_NAMES, model_config
from gpu_gpt2.device import choose_dtype, open_device
from gpu_gpt2.device.base import Device as Place
from gpu_gpt2.errors import ConfigError
from gpu_gpt2.ops import ops_for
from gpu_gpt2.tools.bench import kernels, results, static, step

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")

Model = Annotated[str, typer.Option(help=MODEL_NAMES)]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences.")]
SeqLen = Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


@bench_app.command("kernels")
def bench_kernels(
    device: Device = "auto",
    dtype: Dtype = "auto",
    model: Model = "d12",
    batch_size: BatchSize = 32,
    seq_len: SeqLen = 1024,
    repeat: Annotated[int, typer.Option(min=3, help="Runs to take the median of.")] = 20,
    static_only: Annotated[
        bool, typer.Option("--static", help="Compile only, which needs no GPU.")
    ] = False,
    json: Json = None,
) -> None:
    """Time every op beside the device's limits, or say what each kernel needs (--static)."""
    config = model_config(model)
    if static_only:
        compiling = track(static.builds(config), "compiling", console=console, transient=True)
        builds = list(compiling)
        show_table(static.table(builds))
        spilled = [build for build in builds if build.resources.spill_bytes]
        say(f"{len(builds)} kernels compiled, {len(spilled)} of them spill registers to memory")
        counts = static.counts(config, "bf16")
        say(f"\nleast bytes, and flops of products, of a sequence of {config.n_positions} in bf16")
        show_table(static.counts_table(counts))
        _save(json, "static", model, None, static.rows(builds), counts=counts)
        return
    place = _timed_device(device)
    dtype = choose_dtype(dtype, place)
    ops = ops_for(place, dtype)
    limits = kernels.measure_limits(ops)
    timing = kernels.measure(ops, config, batch_size, seq_len, limits, repeat)
    times = list(track(timing, "timing", console=console, transient=True))
    say(f"{model}, batch {batch_size} x {seq_len}, {dtype}, {place.name}: medians of {repeat}")
    show_table(kernels.table(times, limits))
    if place.name == "cpu":
        say("a CPU's caches are not emptied between runs: what fits into them may pass the limit")
    what = f"{model}, {batch_size} x {seq_len}, {dtype}"
    _save(json, "kernels", what, place, [asdict(row) | asdict(limits) for row in times])


@bench_app.command("step")
def bench_step(
    device: Device = "auto",
    dtype: Dtype = "auto",
    model: Model = "d12",
    batch_size: BatchSize = 4,
    seq_len: SeqLen = 64,
    steps: Annotated[int, typer.Option(min=5, help="Steps to take the median of.")] = 5,
    recompute: Annotated[int, typer.Option(min=0, max=MAX_RECOMPUTE, help="As in train.")] = 0,
    json: Json = None,
) -> None:
    """Time our training step."""
    place = _timed_device(device)
    dtype = choose_dtype(dtype, place)
    size = step.Size(model=model, batch_size=batch_size, seq_len=seq_len)
    products = kernels.product_tflops(ops_for(place, dtype))
    row = step.measure_ours(place, dtype, size, steps, products, recompute)
    say(f"{dtype} on {place.name}, medians of {steps}")
    show_table(step.table([row]))
    for problem in step.problems([row]):
        say(f"! {problem}")
    _save(json, "step", f"{size}, {dtype}", place, [asdict(row)])


@bench_app.command("peers")
def bench_peers(
    device: Device = "auto",
    dtype: Dtype = "auto",
    size: Annotated[
        list[str] | None, typer.Option(help="MODEL:BATCHxLENGTH, several times if you like.")
    ] = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps to take the median of.")] = 10,
    llmc_log: Annotated[
        list[Path] | None,
        typer.Option(help="A file with what llm.c's train_gpt2cu printed; several times too."),
    ] = None,
    json: Json = None,
) -> None:
    """Time our training step beside PyTorch's, eager and compiled, in one run."""
    place = _timed_device(device)
    dtype = choose_dtype(dtype, place)
    logs = [step.read_llmc_log(path) for path in llmc_log or ()]
    sizes = tuple(map(step.parse_size, size)) if size else step.SIZES[place.name]
    names = (step.OURS, *(step.PEERS if place.name == "cuda" else step.PEERS[:1]))
    rows: list[step.StepTime] = []
    timing = step.measure_all(place, dtype, sizes, names, steps)
    total = len(sizes) * len(names)
    for row in track(timing, "timing", total=total, console=console, transient=True):
        rows.append(row)
    rows += logs
    say(f"{dtype} on {place.name}, medians of {steps}")
    show_table(step.table(rows))
    for problem in step.problems(rows):
        say(f"! {problem}")
    what = f"{', '.join(dict.fromkeys(row.size for row in rows))}, {dtype}"
    _save(json, "steps", what, place, [asdict(row) for row in rows])
    if not any(row.step_ms for row in rows if row.name == step.OURS):
        raise typer.Exit(1)


@bench_app.command("tables")
def bench_tables() -> None:
    """Write the tables and the plots anew from docs/benchmarks, in the root of the source tree."""
    if not results.FOLDER.is_dir():
        raise ConfigError(f"no folder {results.FOLDER} here; run this in the root of the project")
    for path in results.write_tables(Path()):
        say(f"wrote {path}")


def _timed_device(name: str) -> Place:
    place = open_device(name)
    if place.name == "emulator":
        raise ConfigError("the emulator's times mean nothing; use --device cuda or cpu")
    return place


def _save(
    path: Path | None,
    kind: str,
    what: str,
    place: Place | None,
    rows: Sequence[dict[str, Any]],
    **more: Any,
) -> None:
    if path:
        results.save(path, results.record(kind, what, place, rows) | more)
        say(f"wrote {path}")
