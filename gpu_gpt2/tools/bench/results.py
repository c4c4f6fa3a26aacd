"""Saves benchmark results as JSON, and makes the tables and plots of the documentation of them.

A result is one JSON file in docs/benchmarks: the command, the machine, the date, and rows of
measurements. A table stands in a Markdown file between two marks, and `write_tables` replaces it by
one made of the newest results.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from gpu_gpt2.config import AUTO, OPTIONS, Option, device_defaults
from gpu_gpt2.device.base import Device
from gpu_gpt2.device.cuda import cuda_versions
from gpu_gpt2.errors import DataError
from gpu_gpt2.tools.bench import generate, kernels
from gpu_gpt2.tools.bench.static import count_cells
from gpu_gpt2.tools.bench.step import StepTime, problems, text_table

SCHEMA: Final = 1  # version of the result files; files of another version are ignored
FOLDER: Final = Path("docs/benchmarks")  # results and plots, relative to the project's root
# Packages whose versions a result records: they decide the CPU's speed, and that of other programs.
PACKAGES: Final = ("numpy", "torch", "transformers")
# Exceptions raised by reading a JSON file that is no result, or that lacks a key of its kind.
NOT_A_RESULT: Final = (ValueError, KeyError, TypeError, AttributeError, IndexError)
# Texts that stand in place of a table without results.
NOT_COMPILED: Final = "Not compiled yet: `gpu-gpt2 bench kernels --static --json FILE`."
NOT_TIMED: Final = "Not timed yet: `gpu-gpt2 bench peers --device cpu --json FILE`."
NOT_GENERATED: Final = "Not timed yet: `gpu-gpt2 bench generate --device cpu --json FILE`."
UNMEASURED: Final = "Nothing has been measured on a GPU yet: [gpu-queue.md]({docs}/gpu-queue.md)."


def record(
    kind: str, what: str, device: Device | None, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns a result with the command, commit, machine and date that produced it.

    `kind` is "kernels", "static", "step", "steps" or "generate", to which "cpu " is prefixed for a
    CPU. `what` names sizes and dtype: a newer result replaces an older one in the tables only if
    kind, GPU and `what` are the same. `device` is None for "static", which needs none.
    """
    if device is not None and not device.is_gpu:
        kind = f"cpu {kind}"
    return {
        "schema": SCHEMA,
        "kind": kind,
        "what": what,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["gpu-gpt2", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": _machine(device),
        "rows": [dict(row) for row in rows],
    }


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result to a JSON file. Raises DataError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def newest(kind: str, folder: Path = FOLDER) -> list[tuple[Path, dict[str, Any]]]:
    """Returns the newest result of a kind for each GPU and each `what`, with its file.

    Raises DataError for a JSON file in `folder` that is no result.
    """
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_bytes())
            if result["schema"] != SCHEMA or result["kind"] != kind:
                continue
            key = str(result["machine"].get("GPU", "")), str(result["what"])
            if key not in found or str(found[key][1]["date"]) < str(result["date"]):
                found[key] = path, result
        except NOT_A_RESULT as error:
            raise _not_a_result(path, error) from None
    return [found[key] for key in sorted(found)]


def write_tables(root: Path) -> list[Path]:
    """Rewrites the generated tables and plots of the documentation; returns the files written."""
    folder = root / FOLDER

    def tables(kind: str, render: Callable[[dict[str, Any]], str], missing: str) -> str:
        """Returns a table of each newest result of `kind`, or the text `missing` without any."""
        parts = []
        for path, result in newest(kind, folder):
            try:
                parts.append(render(result))
            except NOT_A_RESULT as error:
                raise _not_a_result(path, error) from None
        return "\n\n".join(parts) or missing

    def with_plot(result: dict[str, Any]) -> str:
        path = plot(result, folder)
        written.append(path)
        return f"{_kernels(result)}\n\n![share of the limit](../{FOLDER.as_posix()}/{path.name})"

    written: list[Path] = []
    texts = {
        root / "README.md": {
            "steps": tables("steps", _steps, UNMEASURED.format(docs="docs")),
            "cpu steps": tables("cpu steps", _steps, NOT_TIMED),
            "generate": tables("generate", _generated, UNMEASURED.format(docs="docs")),
            "cpu generate": tables("cpu generate", _generated, NOT_GENERATED),
        },
        root / "kernels/README.md": {
            "kernels": tables("kernels", with_plot, UNMEASURED.format(docs="../docs")),
            "static": tables("static", _static, NOT_COMPILED),
            "counts": tables("static", _counts, NOT_COMPILED),
        },
        root / "docs/training-options.md": {"options": option_tables()},
    }
    for path, blocks in texts.items():
        old = new = path.read_text()
        for name, text in blocks.items():
            new = replace_block(new, name, text)
        if new != old:
            path.write_text(new)
            written.append(path)
    return written


def replace_block(text: str, name: str, block: str) -> str:
    """Returns `text` with `block` between the marks of `name`. Raises DataError without marks."""
    start, stop = f"<!-- bench {name} -->\n", f"<!-- end of bench {name} -->"
    if start not in text or stop not in text:
        raise DataError(f"expected the marks {start.strip()} and {stop}")
    pattern = re.escape(start) + ".*?" + re.escape(stop)
    return re.sub(pattern, lambda match: f"{start}{block.strip()}\n{stop}", text, flags=re.DOTALL)


def option_tables() -> str:
    """The tables of docs/training-options.md: all settings of TrainConfig, one table a group."""
    devices = OPTIONS["device"].choices
    head = ("option", "meaning", "allowed", *(f"default on {name}" for name in devices), "resume")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for option in OPTIONS.values():
        line = (
            f"`{option.flag} {option.metavar}".rstrip().replace("|", "\\|") + "`",
            option.help + (f" {AUTO}: {option.auto}." if option.auto else ""),
            option.allowed,
            *(_default(option, device) for device in devices),
            "may change" if option.resumable else "",
        )
        groups.setdefault(option.group, []).append(line)
    return "\n\n".join(f"## {name}\n\n{_markdown(head, lines)}" for name, lines in groups.items())


def _default(option: Option, device: str) -> str:
    default = device_defaults(device).get(option.name, option.default)
    if default is None or default == "":
        return AUTO if option.auto else ""
    return f"`{default}`" if option.kind is not bool else "off"


def plot(result: Mapping[str, Any], folder: Path) -> Path:
    """Draws a bar for each op, its share of the limit, into a PNG; returns the file's path."""
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["name"] for row in rows], [100 * row["share"] for row in rows])
    axes.set_xlabel("% of the limit measured on the same GPU: copy bandwidth or matmul throughput")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_title(f"{result['what']} on {result['machine']['GPU']}, {result['date']}")
    name = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']['GPU']} {result['what']}".lower())
    path = folder / f"kernels-{name}.png"
    figure.savefig(path, dpi=120)
    return path


def _steps(result: Mapping[str, Any]) -> str:
    rows = [StepTime(**row) for row in result["rows"]]
    parts = [_markdown(*text_table(rows)), *(f"{problem}." for problem in problems(rows))]
    return _with_source(result, "\n\n".join(parts))


def _generated(result: Mapping[str, Any]) -> str:
    rows = [generate.GenerateTime(**row) for row in result["rows"]]
    lines = (f"{line}." for line in (*generate.bounds(rows), *generate.problems(rows)))
    return _with_source(result, "\n\n".join([_markdown(*generate.text_table(rows)), *lines]))


def _kernels(result: Mapping[str, Any]) -> str:
    return _with_source(result, _markdown(kernels.HEAD, list(map(kernels.cells, result["rows"]))))


def _static(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    architectures = [name for name in rows[0] if name.startswith("sm_")]
    lines = [
        (
            f"`{row['kernel']}`", str(row["head_size"]), row["dtype"], str(row["threads"]),
            *(str(row[architecture]) for architecture in architectures),
            f"{row['shared_bytes']:,}", str(row["spill_bytes"]),
        )
        for row in rows if row["dtype"] != "fp16"  # whose kernels need what those of bf16 need
    ]  # fmt: skip
    head = (
        "kernel", "D", "X", "threads",
        *(f"registers {architecture}" for architecture in architectures),
        "shared bytes", "spilled bytes",
    )  # fmt: skip
    return _with_source(result, _markdown(head, lines))


def _counts(result: Mapping[str, Any]) -> str:
    head = ("op", "MB", "GFLOP", "flops per byte")
    return _markdown(head, [count_cells(row) for row in result["counts"]])


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _with_source(result: Mapping[str, Any], table: str) -> str:
    """Returns the table and a line with the command, machine, date and commit of the result."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    source = f"`{result['command']}`, {machine}, {result['date']}, commit {result['commit']}."
    return f"{table}\n\n{source}"


def _not_a_result(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a result of gpu-gpt2 bench ({error!r})")


def _machine(device: Device | None) -> dict[str, str]:
    """Returns the device, or NVRTC without one, and the versions on which results depend."""
    found: dict[str, str] = {}
    if device is not None and device.is_gpu:
        found |= {"GPU": device.product_name, **cuda_versions()}
    elif device is not None:
        found["device"] = device.name
    else:
        found["NVRTC"] = cuda_versions()["NVRTC"]
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Returns the commit of the source tree, with "+" if files have changed, or "unknown"."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
