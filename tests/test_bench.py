"""Benchmarks count bytes and flops correctly, survive failures, and write results and tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from rich.console import Console
from typer.testing import CliRunner

from gpu_gpt2.cli.app import app
from gpu_gpt2.config import GPT2Config, model_config
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.nvrtc import KernelResources
from gpu_gpt2.errors import ConfigError, DataError, DeviceError
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.tools.bench import generate, kernels, overhead, results, static, step
from gpu_gpt2.tools.bench.cases import BenchCase, cases
from gpu_gpt2.tools.bench.kernels import Limits
from gpu_gpt2.tools.bench.llmc_log import read_llmc_log
from gpu_gpt2.tools.pytorch import step as torch_step

CONFIG = GPT2Config(vocab_size=100, n_positions=8, n_embd=16, n_layer=1, n_head=2)
SMALL = step.Size(model="nano", batch_size=2, seq_len=8)


def case(name: str) -> BenchCase:
    """The case of an op for 2 x 8 tokens in float32."""
    return next(c for c in cases(ReferenceOps(), CONFIG, 2, 8) if c.name == name)


@pytest.mark.parametrize(
    ("name", "moved", "flops"),
    [
        ("residual_layernorm_fwd", 4 * 16 * 16 * 4 + 2 * 16 * 4, 0),
        ("layernorm_bwd", 4 * 16 * 16 * 4 + 2 * 16 * 4, 0),
        ("gelu_bwd", 3 * 16 * 64 * 4, 0),
        ("bias_bwd", 16 * 64 * 4, 0),
        ("classifier_fwd_bwd", 16 * (100 + 128) * 4, 0),
        # Each of 2 x 2 heads has 36 pairs of a query and a key no later than it. A pair takes 2 dot
        # products of 8 elements forward and 5 backward, with 2 flops an element.
        ("attention_fwd", 4 * 16 * 16 * 4 + 32 * 4, 2 * 2 * 8 * 36 * 4),
        ("attention_bwd", 8 * 16 * 16 * 4 + 32 * 4, 5 * 2 * 8 * 36 * 4),
        # Two sequences, whose caches hold 8 positions of 16 elements of k and as many of v.
        ("kv_append", 2 * 2 * 2 * 16 * 4, 0),
        ("attention_decode", 2 * 2 * 8 * 16 * 4 + 2 * 2 * 16 * 4, 2 * 8 * 16 * 4),
        ("matmul y = x w^T", (16 * 16 + 64 * 16 + 16 * 64) * 4, 2 * 16 * 16 * 64),
        ("matmul dw += dy^T x", (16 * 16 + 16 * 64) * 4 + 8 * 64 * 16, 2 * 16 * 16 * 64),
    ],
)
def test_bytes_and_flops_of_a_case_are_those_counted_by_hand(
    name: str, moved: int, flops: int
) -> None:
    found = case(name)
    assert (found.moved, found.flops) == (moved, flops)
    found.run()


def test_counts_of_a_large_model_need_no_memory() -> None:
    found = {row["name"]: row for row in static.counts(model_config("d48"), "bf16")}
    assert found["gelu_fwd"]["bytes"] == 2 * 1024 * 6400 * 2
    assert found["matmul y = x w^T"]["flops"] == 2 * 1024 * 1600 * 6400
    assert found["adamw"]["bytes"] == parameter_count(model_config("d48")) * 30
    assert static.count_cells(found["adamw"]) == ("adamw", "46730.59", "", "")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(static.counts_table([found["gelu_fwd"], found["matmul y = x w^T"]]))
    head, gelu, matmul = (line.split("  ") for line in capture.get().splitlines())
    assert [cell.strip() for cell in head if cell] == ["op", "MB", "GFLOP", "flops per byte"]
    assert [cell.strip() for cell in gelu if cell.strip()] == ["gelu_fwd", "26.21"]
    assert [cell.strip() for cell in matmul if cell][:3] == ["matmul y = x w^T", "36.86", "20.97"]


def test_the_share_is_of_the_limit_that_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(copy_gb_s=100.0, matmul_tflops=10.0)
    work = BenchCase(name="w", run=lambda: None, moved=10**9, flops=10**12)
    monkeypatch.setattr(kernels, "cases", lambda *args: [work])
    monkeypatch.setattr(CpuDevice, "time_ms", lambda *args, **kwargs: [200.0, 200.0, 201.0])
    (row,) = kernels.measure(ReferenceOps(), CONFIG, 2, 8, limits, repeat=3)
    assert (row.gb_s, row.tflops, row.share) == (5.0, 5.0, 0.5)  # 10^9 bytes in 0.2 s, and so on


def test_every_op_is_timed_on_the_cpu() -> None:
    limits = Limits(copy_gb_s=1.0, matmul_tflops=1.0)
    times = list(kernels.measure(ReferenceOps(), CONFIG, 1, 8, limits, repeat=1))
    assert {"embedding_bwd", "softmax_bwd", "squared_norm", "adamw"} <= {t.name for t in times}
    assert all(time.ms > 0 and time.share > 0 for time in times)


@pytest.fixture
def gpu_ops(monkeypatch: pytest.MonkeyPatch) -> KernelOps:
    """The ops of a device that pretends to be a GPU: launches take 2 ms and compute nothing."""
    monkeypatch.setattr(static.RecordingDevice, "is_gpu", True)
    monkeypatch.setattr(static.RecordingDevice, "time_ms", lambda *args, **kwargs: [2.0])
    return KernelOps(static.RecordingDevice(), "bf16")


def test_pytorchs_attention_follows_ours_on_a_gpu(
    gpu_ops: KernelOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torch_attention_ms(*args: object) -> list[float]:
        *sizes, backward = args
        assert sizes == ["bf16", 1, 2, 8, 8, 3]
        return [3.0, 4.0, 9.0] if backward else [1.0, 1.0, 5.0]

    monkeypatch.setattr(torch_step, "torch_attention_ms", torch_attention_ms)
    limits = Limits(copy_gb_s=1.0, matmul_tflops=1.0)
    times = {row.name: row.ms for row in kernels.measure(gpu_ops, CONFIG, 1, 8, limits, repeat=3)}
    attention = {name: ms for name, ms in times.items() if name.startswith("attention")}
    assert attention == {
        "attention_fwd": 2.0, "attention_fwd of PyTorch": 1.0,
        "attention_bwd": 2.0, "attention_bwd of PyTorch": 4.0,
        "attention_decode": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("torch", ["not installed", "without a GPU"])
def test_without_pytorchs_attention_only_ours_is_timed(
    torch: str, gpu_ops: KernelOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch == "not installed":
        monkeypatch.setitem(sys.modules, "gpu_gpt2.tools.pytorch.step", None)
    limits = Limits(copy_gb_s=1.0, matmul_tflops=1.0)
    times = kernels.measure(gpu_ops, CONFIG, 1, 8, limits, repeat=3)
    assert not [row.name for row in times if "PyTorch" in row.name]


def test_the_peak_memory_is_unknown_where_the_system_does_not_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert CpuDevice().peak_memory == 0


def test_the_peak_memory_on_a_cpu_is_unknown_once_pytorch_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert step.measure_ours(CpuDevice(), "fp32", SMALL, 1, 1.0).peak_bytes == 0
    monkeypatch.delitem(sys.modules, "torch")
    assert step.measure_ours(CpuDevice(), "fp32", SMALL, 1, 1.0).peak_bytes > 10**6


@pytest.fixture
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of the device are measured with a small copy and a small matmul."""
    monkeypatch.setitem(kernels.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(kernels.MATMUL_SIZE, "cpu", 64)


@pytest.mark.usefixtures("_small_limits")
def test_our_step_is_timed_although_another_program_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> step.StepTime:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(step, "measure_peer", fail)
    names = (step.OURS, "torch.compile")
    ours, peer = step.measure_all(CpuDevice(), "fp32", [SMALL], names, steps=5)
    assert ours.name == step.OURS
    assert 0 < ours.fastest_ms <= ours.step_ms
    assert ours.tokens_per_s == pytest.approx(16_000 / ours.step_ms)
    assert ours.planned_bytes > 0
    assert (peer.name, peer.problem, peer.step_ms) == ("torch.compile", "out of memory", 0.0)
    lines = step.text_table([ours, peer])[1]
    assert lines[1][:3] == ["", "torch.compile", "failed"]
    assert step.problems([ours, peer]) == ["torch.compile at nano:2x8: out of memory"]


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("model", ["nano", "llama:nano"])
def test_our_speed_up_over_pytorch_is_the_ratio_of_the_medians(model: str) -> None:
    size = step.Size(model=model, batch_size=2, seq_len=8)
    ours, peer = step.measure_all(CpuDevice(), "fp32", [size], (step.OURS, step.PEERS[0]), 5)
    assert peer.problem == ""
    head, lines = step.text_table([ours, peer])
    speed_up = head.index("speed-up")
    assert [line[speed_up] for line in lines] == ["", f"{peer.step_ms / ours.step_ms:.2f} x"]


@pytest.mark.parametrize(
    ("product_name", "peak"), [("NVIDIA H200", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("x", 0.0)]
)
def test_the_peak_of_a_gpu_is_known_by_its_name(product_name: str, peak: float) -> None:
    class Gpu(CpuDevice):
        pass

    Gpu.product_name = product_name
    assert step.peak_tflops(Gpu()) == peak


def llmc_log(steps: int = 10, **changed: object) -> str:
    """The output of train_gpt2cu, whose first five steps are slow."""
    settings = {
        "micro batch size B": 4, "sequence length T": 32, "total batch size": 128,
        "precision": "BF16", "max_sequence_length T": 1024, "num_layers L": 12,
        "channels C": 768, "num_processes": 1,
    } | changed  # fmt: skip
    lines = ["+-----------------------+----------------------------------------------------+"]
    lines += [f"| {name:21} | {value!s:50} |" for name, value in settings.items()]
    lines += ["val loss 11.0"]
    for i in range(1, steps + 1):
        ms = 900.0 if i <= 5 else 100.0 + i**2
        lines.append(
            f"step {i:4d}/100 | loss 10.900000 (+nanz)| norm 5.1000 (+nanz)| lr 1.00e-06 | "
            f"{ms:.2f} ms | -100.0% bf16 MFU | 524288 tok/s"
        )
    return "\n".join(lines)


def test_a_log_of_llmc_gives_the_median_without_its_first_steps(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(llmc_log())
    row = read_llmc_log(log)
    assert (row.name, row.size, row.step_ms, row.fastest_ms) == ("llm.c", "d12:4x32", 164.0, 136.0)
    assert row.tokens_per_s == 128_000 / 164.0
    log.write_text(llmc_log(precision="FP32"))
    assert read_llmc_log(log).name == "llm.c FP32"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (llmc_log(5), "more than 5 lines of steps that took time"),
        (llmc_log().replace("136.00 ms", "0.00 ms"), "lines of steps that took time"),
        (llmc_log() + llmc_log(), "has 2 lines of .*, not one: is it what one run of"),
        ("step 1/2 | 3.0 ms |", "has 0 lines of 'micro batch size B'"),
        (
            llmc_log(**{"total batch size": 512}),
            "of 512 tokens a step; run train_gpt2cu with -d 128",
        ),
        (llmc_log(num_processes=8, **{"total batch size": 1024}), "of 8 GPUs; run .* on one"),
        (llmc_log(**{"num_layers L": 13}), "13 layers and 768 channels, which has no name"),
        (llmc_log(**{"num_layers L": 24}), "24 layers and 768 channels, which has no name"),
    ],
)
def test_a_file_that_is_no_log_of_one_run_on_one_gpu_is_refused(
    tmp_path: Path, text: str, problem: str
) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_llmc_log(log)
    with pytest.raises(DataError, match=r"cannot read .*gone: No such file"):
        read_llmc_log(tmp_path / "gone")


@pytest.mark.parametrize("text", ["d12", "d12:4", "d12:4x", "d12:0x64", ":4x64", "d12:1x1025"])
def test_a_text_that_is_no_size_or_too_long_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        step.parse_size(text)


def kernels_result(date: str, share: float, what: str = "d12, 32 x 1024") -> dict[str, Any]:
    row = {"name": "gelu_fwd", "ms": 0.5, "gb_s": 4000.0, "tflops": 0.0, "share": share}
    machine = {"GPU": "Some GPU", "Python": "3.11"}
    return {
        "schema": 1, "kind": "kernels", "what": what, "date": date,
        "command": "gpu-gpt2 bench kernels",
        "commit": "abc", "machine": machine, "rows": [row],
    }  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    def marks(*names: str) -> str:
        return "".join(f"x\n<!-- bench {n} -->\nold\n<!-- end of bench {n} -->\ny\n" for n in names)

    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "README.md").write_text(marks("steps", "cpu steps", "generate", "cpu generate"))
    (tmp_path / "kernels/README.md").write_text(marks("kernels", "static", "counts"))
    (tmp_path / "docs/training-options.md").write_text(marks("options"))
    return tmp_path


def test_without_results_the_tables_are_sentences_that_say_so(project: Path) -> None:
    results.write_tables(project)
    text = (project / "README.md").read_text()
    assert "Nothing has been measured on a GPU yet: [gpu-queue.md](docs/gpu-queue.md)." in text
    assert text.startswith("x\n<!-- bench steps -->\nNothing")
    assert "<!-- end of bench steps -->\ny\nx\n<!-- bench cpu steps -->\n" in text
    assert results.write_tables(project) == []  # nothing left to change


def test_tables_and_plots_come_from_the_newest_result_of_each_size(project: Path) -> None:
    folder = project / "docs/benchmarks"
    results.save(folder / "b.json", kernels_result("2026-01-02 10:00 UTC", 0.87))
    results.save(folder / "a.json", kernels_result("2026-01-02 09:59 UTC", 0.11))
    results.save(folder / "c.json", kernels_result("2025-01-01 09:59 UTC", 0.22, "d12, 16 x 1024"))
    changed = results.write_tables(project)
    text = (project / "kernels/README.md").read_text()
    assert "| gelu_fwd | 0.500 | 4,000 |  | 87% |" in text
    assert "`gpu-gpt2 bench kernels`, GPU Some GPU, Python 3.11, 2026-01-02 10:00 UTC" in text
    assert "| 22% |" in text
    assert "| 11% |" not in text
    for name in ("kernels-some-gpu-d12-32-x-1024.png", "kernels-some-gpu-d12-16-x-1024.png"):
        assert f"![share of the limit](../docs/benchmarks/{name})" in text
        assert folder / name in changed
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_each_gpu_has_its_own_table(project: Path) -> None:
    folder = project / "docs/benchmarks"
    for name, share in (("This GPU", 0.87), ("That GPU", 0.11)):
        result = kernels_result("2026-01-02", share) | {"machine": {"GPU": name}}
        results.save(folder / f"{name}.json", result)
    results.save(folder / "old.json", kernels_result("2026-01-02", 0.33) | {"schema": 0})
    results.write_tables(project)
    text = (project / "kernels/README.md").read_text()
    assert [share in text for share in ("| 87% |", "| 11% |", "| 33% |")] == [True, True, False]


def test_a_static_result_becomes_the_tables_of_counts_and_registers(project: Path) -> None:
    row = {"kernel": "gelu_fwd", "head_size": "", "threads": 384, "sm_80": 30, "sm_90": 31}
    row |= {"shared_bytes": 2048, "spill_bytes": 16}
    result = kernels_result("2026-01-02", 1.0) | {
        "kind": "static",
        "rows": [row | {"dtype": dtype} for dtype in ("bf16", "fp16")],
        "counts": [{"name": "gelu_fwd", "bytes": 12_500_000, "flops": 0}],
    }
    results.save(project / "docs/benchmarks/static.json", result)
    results.write_tables(project)
    text = (project / "kernels/README.md").read_text()
    assert "| `gelu_fwd` |  | bf16 | 384 | 30 | 31 | 2,048 | 16 |" in text
    assert "| fp16 |" not in text  # fp16 needs what bf16 needs
    assert "| gelu_fwd | 12.50 |  |  |" in text


def test_a_result_of_steps_becomes_a_table_with_speed_ups(project: Path) -> None:
    rows = [
        {"name": "gpu-gpt2", "size": "d12:4x64", "step_ms": 2.0, "tokens_per_s": 128000.0},
        {"name": "torch.compile", "size": "d12:4x64", "step_ms": 5.0, "tokens_per_s": 51200.0},
        {"name": "PyTorch eager", "size": "d12:4x64", "problem": "out of memory"},
    ]
    result = kernels_result("2026-01-01", 1.0) | {"kind": "steps", "rows": rows}
    results.save(project / "docs/benchmarks/steps.json", result)
    results.write_tables(project)
    text = (project / "README.md").read_text()
    assert "|  | torch.compile | 5.00 | 51,200 | 2.50 x |" in text
    assert (
        "|  | PyTorch eager | failed |  |  |\n\nPyTorch eager at d12:4x64: out of memory." in text
    )


def test_a_json_file_that_is_no_result_is_refused(project: Path) -> None:
    right = kernels_result("2026-01-01", 1.0)
    for wrong in ({}, [], right | {"rows": [{"name": "gelu_fwd"}]}, right | {"rows": 3}):
        (project / "docs/benchmarks/other.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"other\.json is not a result of gpu-gpt2 bench"):
            results.write_tables(project)


def test_a_missing_mark_is_named() -> None:
    with pytest.raises(DataError, match="expected the marks <!-- bench steps -->"):
        results.replace_block("text", "steps", "")


def test_a_result_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*/file/a\.json: "):
        results.save(tmp_path / "file/a.json", {})


def test_a_result_records_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PACKAGES", ("numpy", "no-such-package"))
    on_cpu = results.record("steps", "d12", CpuDevice(), [{"ms": 1.0}])
    assert (on_cpu["kind"], on_cpu["rows"]) == ("cpu steps", [{"ms": 1.0}])
    assert on_cpu["machine"].keys() == {"device", "Python", "numpy"}
    gpu: Any = SimpleNamespace(is_gpu=True, product_name="Some GPU")
    on_gpu = results.record("steps", "d12", gpu, [])
    assert (on_gpu["kind"], on_gpu["machine"]["GPU"]) == ("steps", "Some GPU")
    assert {"CuPy", "NVRTC"} <= on_gpu["machine"].keys()
    assert results.record("static", "d12", None, [])["machine"].keys() == {
        "NVRTC", "Python", "numpy",
    }  # fmt: skip


@pytest.mark.usefixtures("_small_limits")
def test_the_commands_kernels_step_and_peers_print_tables_and_write_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> str:
        shown = CliRunner().invoke(app, ["bench", *args])
        assert shown.exit_code == 0, shown
        return shown.output

    small = ("--device", "cpu", "--model", "nano", "--batch-size", "2", "--seq-len", "8")
    assert "adamw" in run("kernels", *small, "--repeat", "3", "--json", "a.json")
    found = json.loads(Path("a.json").read_text())
    assert (found["kind"], found["machine"]["device"]) == ("cpu kernels", "cpu")
    assert {"name", "ms", "share", "copy_gb_s"} <= found["rows"][0].keys()
    assert "nano:2x8" in run("step", *small, "--recompute", "3", "--json", "b.json")
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert step.StepTime(**rows[0]).name == step.OURS
    log = tmp_path / "log"
    log.write_text(llmc_log())
    peers = ("--device", "cpu", "--size", "nano:2x8", "--llmc-log", "log")
    assert "llm.c" in run("peers", *peers)


def test_the_command_kernels_static_lists_registers_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = KernelResources(
        kernel="gelu_fwd", registers=30, shared_bytes=0, stack_bytes=0, spill_bytes=8
    )
    build = static.KernelBuild(
        file="gelu.cu", dtype="bf16", defines=(), architecture="sm_90", threads=512, resources=needs
    )
    monkeypatch.setattr(static, "builds", lambda config: iter([build]))
    path = tmp_path / "static.json"
    shown = CliRunner().invoke(app, ["bench", "kernels", "--static", "--json", str(path)])
    assert shown.exit_code == 0, shown
    assert "1 kernels compiled, 1 of them spill registers to memory" in shown.output
    assert "gelu_fwd" in shown.output
    found = json.loads(path.read_text())
    assert (found["kind"], found["rows"][0]["sm_90"]) == ("static", 30)
    assert found["counts"] == static.counts(model_config("d12"), "bf16")


def test_the_command_tables_names_the_files_that_it_writes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert "wrote kernels/README.md" in CliRunner().invoke(app, ["bench", "tables"]).output


def test_the_command_step_shows_a_warning_about_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = step.StepTime(name=step.OURS, size="d12:4x64", step_ms=1.0, problem="no graphs")
    monkeypatch.setattr(step, "measure_ours", lambda *args: row)
    monkeypatch.setattr(kernels, "large_matmul_tflops", lambda *args: 1.0)
    shown = CliRunner().invoke(app, ["bench", "step", "--device", "cpu"])
    assert "! gpu-gpt2 at d12:4x64: no graphs" in shown.output


@pytest.mark.usefixtures("_small_limits")
def test_the_exit_status_is_1_if_our_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> float:
        raise DeviceError("out of GPU memory")

    monkeypatch.setattr(step, "measure_ours", fail)
    monkeypatch.setitem(sys.modules, "torch", None)  # not installed
    shown = CliRunner().invoke(app, ["bench", "peers", "--device", "cpu", "--size", "nano:2x8"])
    assert shown.exit_code == 1
    assert "! gpu-gpt2 at nano:2x8: out of GPU memory" in shown.output
    assert re.search(r"! PyTorch eager at nano:2x8: PyTorch cannot be used .*pip in", shown.output)


def test_a_step_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "free_memory", 1000)
    with pytest.raises(ConfigError, match=r"training with .* needs .* MB, and there are 0\.0 MB"):
        step.measure_ours(CpuDevice(), "fp32", SMALL, 5, 1.0)


def test_the_commit_of_a_changed_source_tree_has_a_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit() -> str:
        return str(results.record("steps", "d12", CpuDevice(), [])["commit"])

    def git(*args: str) -> None:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *names, *args], check=True, capture_output=True)

    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert commit() == "unknown"
    git("init")
    (tmp_path / "file").write_text("old")
    git("add", "file")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{10}", commit())
    (tmp_path / "file").write_text("new")
    assert re.fullmatch(r"[0-9a-f]{10}\+", commit())


def test_the_commands_refuse_the_emulator_a_missing_log_and_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def problem(*args: str) -> str:
        return str(CliRunner().invoke(app, ["bench", *args]).exception)

    assert "the emulator's times mean nothing" in problem("step", "--device", "emulator")
    assert "cannot read log" in problem("peers", "--device", "cpu", "--llmc-log", "log")
    assert "no folder docs/benchmarks here" in problem("tables")


def test_the_overhead_of_a_run_is_measured_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = ["--model", "nano", "--batch-size", "2", "--seq-len", "16", "--steps", "5"]
    done = CliRunner().invoke(
        app, ["bench", "overhead", "--device", "cpu", *sizes, "--json", str(tmp_path / "o.json")]
    )
    assert done.exit_code == 0, done.output
    assert "pass around the computation" in done.output
    saved = json.loads((tmp_path / "o.json").read_text())
    assert saved["kind"] == "cpu overhead"
    row = overhead.Overhead(**saved["rows"][0])
    assert 0 < row.around_ms < row.run_ms
    assert row.bare_ms > 0


def generated_row(name: str, token_ms: float, **changed: object) -> dict[str, Any]:
    """A row of 2 GB of weights at 100 GB/s, which take 20 ms to read."""
    return {
        "name": name, "size": "d12, batch 1", "prompt_ms": 50.0, "token_ms": token_ms,
        "fastest_ms": 24.0, "tokens_per_s": 1000 / token_ms, "weight_bytes": 2 * 10**9,
        "read_gb_s": 100.0, "share": 20 / token_ms,
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("model", "elements"),
    [
        # Without wpe. Each of 2 layers has 12 C^2 weights and 13 C biases and layernorm weights.
        ("nano", 50304 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32),
        # The head is wte. F = 96; q and o are C^2 each, k and v half of it with half the heads.
        ("llama:nano", 32000 * 32 + 2 * (3 * 32**2 + 3 * 32 * 96 + 2 * 32) + 32),
    ],
)
def test_a_token_reads_all_weights_but_embeddings_that_are_only_looked_up(
    model: str, elements: int
) -> None:
    assert generate.weight_bytes(model_config(model), "fp32") == 4 * elements
    assert generate.weight_bytes(model_config(model), "bf16") == 2 * elements


def test_an_embedding_beside_a_separate_head_does_not_count() -> None:
    tied = model_config("llama:nano")
    untied = replace(tied, tie_word_embeddings=False)
    assert parameter_count(untied) > parameter_count(tied)
    assert generate.weight_bytes(untied, "fp32") == generate.weight_bytes(tied, "fp32")


@pytest.fixture
def _generate_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small matrix measures the bandwidth."""
    monkeypatch.setitem(generate.COPY_BYTES, "cpu", 1 << 20)


NANO = ("generate", "--device", "cpu", "--model", "nano", "--prompt-tokens", "5", "--tokens", "19")


@pytest.mark.usefixtures("_generate_nano")
def test_the_command_generate_times_both_programs_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    more = ("--model", "llama:nano", "--batch-size", "1", "--batch-size", "3", "--json", str(path))
    shown = CliRunner().invoke(app, ["bench", *NANO, *more])
    assert shown.exit_code == 0, shown
    assert "llama:nano, batch 3" in shown.output
    found = json.loads(path.read_text())
    assert found["kind"] == "cpu generate"
    assert {"numpy", "torch", "transformers"} <= found["machine"].keys()
    rows = [generate.GenerateTime(**row) for row in found["rows"]]
    assert [(row.size, row.name) for row in rows] == [
        (f"{model}, batch {batch}", name)
        for model in ("nano", "llama:nano") for batch in (1, 3)
        for name in (generate.OURS, generate.PEER)
    ]  # fmt: skip
    for row in rows:
        batch = int(row.size[-1])
        assert row.problem == ""
        assert 0 < row.fastest_ms <= row.token_ms
        assert row.prompt_ms > 0
        assert row.tokens_per_s == pytest.approx(1000 * batch / row.token_ms)
        bound_ms = row.weight_bytes / row.read_gb_s / 1e6
        assert row.share == pytest.approx(bound_ms / row.token_ms)


def test_transformers_generates_with_a_model_of_our_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    make = transformers.AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_config",
        lambda config: models.append(make(config)) or models[-1],
    )
    prompts = np.zeros((2, 5), np.int32)
    for config in (model_config("nano"), model_config("llama:nano")):
        tokens = generate._transformers(CpuDevice(), "fp32", config, prompts)()
        assert np.shape(next(tokens)) == (2, 1)
        assert np.shape(next(tokens)) == (2, 1)
        padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
        assert models[-1].num_parameters() == parameter_count(config) - padding


@pytest.mark.usefixtures("_generate_nano")
def test_our_generation_is_timed_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # not installed
    shown = CliRunner().invoke(app, ["bench", *NANO, "--batch-size", "1"])
    assert shown.exit_code == 0, shown
    assert re.search(r"! transformers at nano, batch 1: transformers cannot .*pip in", shown.output)


@pytest.mark.usefixtures("_generate_nano")
def test_the_exit_status_is_1_if_our_generation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(CpuDevice, "free_memory", 1000)
    shown = CliRunner().invoke(app, ["bench", *NANO, "--batch-size", "1"])
    assert shown.exit_code == 1
    assert "! gpu-gpt2 at nano, batch 1: the weights and the KV cache need 0.0 GB" in shown.output


def test_the_command_generate_refuses_what_does_not_fit() -> None:
    def problem(*args: str) -> str:
        found = CliRunner().invoke(app, ["bench", *NANO, *args])
        return str(found.exception) + found.output

    assert "30 tokens of a prompt and 19 new ones do not fit into the context of nano, 32" in (
        problem("--prompt-tokens", "30")
    )
    assert "unknown model 'd13'" in problem("--model", "d13")
    assert "the emulator's times mean nothing" in problem("--device", "emulator")
    assert "greater than or equal to 19" in problem("--tokens", "18")


def test_a_result_of_generation_becomes_a_table_with_its_bound(project: Path) -> None:
    rows = [
        generated_row(generate.OURS, 25.0),
        generated_row(generate.PEER, 50.0),
        {"name": generate.OURS, "size": "llama:15m, batch 1", "problem": "out of memory"},
    ]
    result = kernels_result("2026-01-01", 1.0) | {"kind": "cpu generate", "rows": rows}
    results.save(project / "docs/benchmarks/generate.json", result)
    results.write_tables(project)
    text = (project / "README.md").read_text()
    assert "| d12, batch 1 | gpu-gpt2 | 50.00 | 25.00 | 24.00 | 40.0 | 80% |  |" in text
    assert "|  | transformers | 50.00 | 50.00 | 24.00 | 20.0 | 40% | 2.00 x |" in text
    assert "| llama:15m, batch 1 | gpu-gpt2 | failed |  |  |  |  |  |" in text
    assert (
        "reads 2,000.0 MB of weights; at the measured 100.0 GB/s that takes at least 20.00 ms"
        in text
    )
    assert "gpu-gpt2 at llama:15m, batch 1: out of memory." in text
