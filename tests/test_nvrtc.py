"""NVRTC compiles every kernel of a training step for three GPU architectures, without a GPU.

`gpu-gpt2 bench kernels --static` shows the registers and memory that ptxas reports.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from cupy_backends.cuda.libs import nvrtc
from rich.console import Console

from gpu_gpt2.config import GPT2Config, model_config
from gpu_gpt2.device.cuda import DEFAULT_SHARED_BYTES
from gpu_gpt2.device.nvrtc import OPTIONS, compile_for
from gpu_gpt2.device.source import DTYPES, kernel_files, kernel_source
from gpu_gpt2.errors import DeviceError, KernelError
from gpu_gpt2.ops.kernels import (
    FLASH_HEAD_SIZES,
    attention_decode_defines,
    flash_attention_defines,
    row_group_defines,
)
from gpu_gpt2.tools.bench.static import (
    ARCHITECTURES,
    HEAD_SIZES,
    KernelBuild,
    builds,
    launches,
    table,
)

REGISTERS = 65536  # every multiprocessor has so many, and a block cannot need more


@pytest.fixture(scope="module")
def compiled() -> list[KernelBuild]:
    return list(builds(model_config("d12")))


def test_every_kernel_is_compiled_for_every_architecture(compiled: list[KernelBuild]) -> None:
    kernels = {name for file in kernel_files() for name in kernel_source(file, "fp32").signatures}
    not_timed = {"prepare_update"}  # of the optimizer, but not an op of bench.cases
    casts = {"float_to_bf16", "float_to_fp16", "bf16_to_float", "fp16_to_float"}
    found = {(build.resources.kernel, build.dtype) for build in compiled}
    for kernel in kernels - not_timed - casts:
        dtypes = DTYPES[1:] if kernel.startswith("flash") else DTYPES
        assert {dtype for name, dtype in found if name == kernel} == set(dtypes), kernel
    flash = {dict(build.defines)["HEAD_SIZE"] for build in compiled if "flash" in build.file}
    assert flash == set(HEAD_SIZES) & set(FLASH_HEAD_SIZES)
    assert {build.architecture for build in compiled} == set(ARCHITECTURES)


def test_no_kernel_spills_registers_or_exceeds_a_multiprocessor(
    compiled: list[KernelBuild],
) -> None:
    for build in compiled:
        r = build.resources
        assert (r.stack_bytes, r.spill_bytes) == (0, 0), build
        assert r.registers * build.threads <= REGISTERS, build
        assert r.shared_bytes <= DEFAULT_SHARED_BYTES, build


def test_the_table_has_a_line_for_each_kernel_head_size_and_dtype(
    compiled: list[KernelBuild],
) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(compiled))
    head, *lines = (line.split() for line in capture.get().splitlines())
    assert head == ["kernel", "D", "threads", "dtype", *ARCHITECTURES, "shared", "spilled"]
    kernels = {
        (build.resources.kernel, dict(build.defines).get("HEAD_SIZE"), build.dtype)
        for build in compiled
    }
    assert len(lines) == len(kernels)
    (line,) = (line for line in lines if line[:4] == ["flash_attention_fwd", "64", "128", "bf16"])
    assert line[4].isdecimal()


@pytest.mark.parametrize(("C", "n_head"), [(15, 3), (1600, 25)])
def test_kernels_with_compile_time_widths_compile_for_other_widths(C: int, n_head: int) -> None:
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=C, n_layer=1, n_head=n_head)
    by_width = {
        *("layernorm.cu", "bias.cu", "embedding.cu", "gelu.cu", "classifier.cu"),
        *("rmsnorm.cu", "swiglu.cu"),
    }
    sources = {s for s, _ in launches(config) if s.file in by_width and s.dtype != "fp16"}
    assert {source.file for source in sources} == by_width
    for source in sources:
        for r in compile_for(source, "sm_80"):
            assert (r.stack_bytes, r.spill_bytes) == (0, 0), (source, r)


@pytest.mark.parametrize(("C", "dtype"), [(2048, "bf16"), (4096, "bf16"), (1025, "fp32")])
def test_rmsnorm_of_long_rows_spills_no_registers(C: int, dtype: str) -> None:
    defines = row_group_defines("rmsnorm_fwd", C, 8 if dtype == "bf16" else 1)
    for r in compile_for(kernel_source("rmsnorm.cu", dtype, **defines), "sm_90"):
        assert (r.stack_bytes, r.spill_bytes) == (0, 0), (defines, r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_compiles_for_heads_of_no_whole_vectors(dtype: str) -> None:
    for r in compile_for(kernel_source("rope.cu", dtype, WIDTH=1), "sm_80"):
        assert (r.stack_bytes, r.spill_bytes) == (0, 0), r


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_compiles_for_parts_of_an_arena_that_are_not_aligned(dtype: str) -> None:
    for r in compile_for(kernel_source("adamw.cu", dtype, ALIGNED=0), "sm_80"):
        assert (r.stack_bytes, r.spill_bytes) == (0, 0), r


@pytest.mark.parametrize("head_size", [33, 128])
def test_decoding_for_groups_of_query_heads_spills_no_registers(head_size: int) -> None:
    width = 8 if head_size % 8 == 0 else 1
    for group in (2, 8):
        defines = attention_decode_defines(head_size, group, width)
        for r in compile_for(kernel_source("attention_decode.cu", "bf16", **defines), "sm_80"):
            assert (r.stack_bytes, r.spill_bytes) == (0, 0), (defines, r)
            assert r.shared_bytes <= DEFAULT_SHARED_BYTES, (defines, r)


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 8), ("fp16", 1)])
def test_sampling_has_no_multiplication_that_may_be_fused_with_an_addition(
    dtype: str, width: int
) -> None:
    """PTX's mul.rn and add.rn are never fused. mul multiplies by a power of two, which is exact."""
    source = kernel_source("sample.cu", dtype, WIDTH=width)
    program = nvrtc.createProgram(source.text, source.file, [], [])
    nvrtc.compileProgram(program, [*source.options(), *OPTIONS, "-arch=compute_80"])
    ptx = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    text = ptx.decode() if isinstance(ptx, bytes) else ptx
    operations = re.findall(r"\b(?:fma|mad|add|mul|div)\.[\w.]*f32", text)
    assert set(operations) == {"add.rn.ftz.f32", "mul.rn.ftz.f32", "mul.ftz.f32"}
    assert operations.count("mul.ftz.f32") == text.count("cvt.rzi.ftz.u64.f32")


def test_flash_attention_of_small_llamas_spills_no_registers() -> None:
    """The head size of a Llama of 15M parameters, at which ptxas is tempted to spill."""
    for r in compile_for(
        kernel_source("flash_attention.cu", "bf16", **flash_attention_defines(48)), "sm_90"
    ):
        assert (r.stack_bytes, r.spill_bytes) == (0, 0), r


@pytest.mark.parametrize("text", ["int x = y;", "#define WARP 31"])
def test_an_error_or_a_warning_is_raised_with_file_and_line(text: str, kernel_folder: Path) -> None:
    (kernel_folder / "common.cuh").write_text("#define WARP 32\n")
    (kernel_folder / "bad.cu").write_text(f"{text}\n")
    with pytest.raises(KernelError, match=r"bad.cu .* for sm_80: .*bad.cu\(1\)"):
        compile_for(kernel_source("bad.cu", "fp32"), "sm_80")


def test_without_nvrtc_the_error_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(DeviceError, match=r"NVRTC cannot be opened .*: pip install nvidia-cuda-nv"):
        compile_for(kernel_source("gelu.cu", "fp32"), "sm_80")
