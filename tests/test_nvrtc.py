"""NVRTC compiles every kernel of a training step for three generations of GPUs, without one.

What ptxas says of registers and memory is printed at the end of the test run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_gpt2.config import ModelConfig, model_config
from gpu_gpt2.device import source as source_module
from gpu_gpt2.device.cuda import DEFAULT_SHARED_BYTES
from gpu_gpt2.device.nvrtc import compile_for
from gpu_gpt2.device.source import DTYPES, kernel_files, kernel_source
from gpu_gpt2.errors import KernelError
from gpu_gpt2.ops.kernels import FLASH_HEAD_SIZES
from gpu_gpt2.tools.bench.static import (
    ARCHITECTURES,
    HEAD_SIZES,
    KernelBuild,
    builds,
    launches,
    rows,
)

REGISTERS = 65536  # of a multiprocessor: a block that needs more does not start


@pytest.fixture(scope="module")
def compiled() -> list[KernelBuild]:
    return list(builds(model_config("d12")))


def test_every_kernel_is_compiled(compiled: list[KernelBuild]) -> None:
    kernels = {name for file in kernel_files() for name in kernel_source(file, "fp32").signatures}
    unused = {"prepare_update"}  # of the optimizer: not an op of bench.cases
    casts = {"float_to_bf16", "float_to_fp16", "bf16_to_float", "fp16_to_float"}
    found = {(build.resources.kernel, build.dtype) for build in compiled}
    for kernel in kernels - unused - casts:
        dtypes = DTYPES[1:] if kernel.startswith("flash") else DTYPES
        assert {dtype for name, dtype in found if name == kernel} == set(dtypes), kernel
    flash = {dict(build.defines)["HEAD_SIZE"] for build in compiled if "flash" in build.file}
    assert flash == set(HEAD_SIZES) & set(FLASH_HEAD_SIZES)
    assert {build.architecture for build in compiled} == set(ARCHITECTURES)


def test_none_spills_or_asks_for_too_much(
    compiled: list[KernelBuild], record_property: Callable[[str, object], None]
) -> None:
    for build in compiled:
        r = build.resources
        assert (r.stack_bytes, r.spill_bytes) == (0, 0), build
        assert r.registers * build.threads <= REGISTERS, build
        assert r.shared_bytes <= DEFAULT_SHARED_BYTES, build
    for row in rows(compiled):
        if row["dtype"] != "fp16":
            registers = " ".join(f"{name} {row[name]:<4}" for name in ARCHITECTURES)
            record_property(
                "kernel",
                f"{row['kernel']:<24}{row['head_size']:<5}{row['dtype']}  {registers} registers, "
                f"{row['shared_bytes']} shared",
            )


@pytest.mark.parametrize(("C", "n_head"), [(15, 3), (1600, 25)])
def test_other_widths_compile_too(C: int, n_head: int) -> None:
    config = ModelConfig(vocab_size=300, n_positions=16, n_embd=C, n_layer=1, n_head=n_head)
    by_width = {"layernorm.cu", "bias.cu", "embedding.cu", "gelu.cu", "classifier.cu"}
    sources = {s for s, _ in launches(config) if s.file in by_width and s.dtype != "fp16"}
    assert {source.file for source in sources} == by_width
    for source in sources:
        for r in compile_for(source, "sm_80"):
            assert (r.stack_bytes, r.spill_bytes) == (0, 0), (source, r)


@pytest.mark.parametrize("text", ["int x = y;", "#define WARP 31"])
def test_errors_and_warnings_are_reported(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "common.cuh").write_text("#define WARP 32\n")
    (tmp_path / "bad.cu").write_text(f"{text}\n")
    monkeypatch.setattr(source_module, "kernels_dir", lambda: tmp_path)
    with pytest.raises(KernelError, match=r"bad.cu .* for sm_80: .*bad.cu\(1\)"):
        compile_for(kernel_source("bad.cu", "fp32"), "sm_80")
