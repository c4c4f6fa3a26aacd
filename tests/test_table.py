"""Both implementations of the ops, their launches and the signatures in kernels/ fit the table."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from gpu_gpt2.device.base import X_DTYPES
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.device.source import (
    DTYPES,
    KernelSource,
    Parameter,
    kernel_files,
    kernel_source,
    kernels_dir,
)
from gpu_gpt2.errors import LaunchError
from gpu_gpt2.ops.cases import CASES, Case
from gpu_gpt2.ops.kernels import KernelOps
from gpu_gpt2.ops.reference import ReferenceOps
from gpu_gpt2.ops.table import TABLE, Counts, Factors, Ops, OpTensor, Report

SAVED_STATISTICS = ("mean", "rstd", "lse")  # inputs that the forward pass saves for the backward
CTYPES = {
    "X": ["floatX"],
    "float32": ["float"],
    "int32": ["int"],
    "int8": ["signed char"],
    "any": ["float", "bf16", "fp16"],
}
SCRATCH = "partial"  # the only pointer of a kernel that may be missing in the row of its op
LAUNCHED_OPS = [op for op in TABLE if op != "matmul"]  # matmul is not a kernel of ours
# Kernels that belong to more than one op. Each of their ops has the tensors that they take.
SHARED_KERNELS = {"embedding_bwd_wte": {"embedding_bwd", "token_embedding_bwd"}}


class Recorder(CpuDevice):
    """Runs nothing; `launched` has name, parameters and arguments of each launch."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[Parameter, ...], tuple[Any, ...]]] = []

    def _launch(self, source: KernelSource, name: str, *rest: Any) -> None:
        _grid, _block, args, _shared_bytes = rest
        self.launched.append((name, source.parameters(name), args))


def arrays_of(case: Case, dtype: str) -> dict[str, Any]:
    """The tensors of a case as arrays; those that share memory are one array."""
    arrays: dict[str, Any] = {}
    for name, tensor in case.call(X_DTYPES[dtype]).tensors.items():
        in_place = isinstance(tensor.value, str)
        arrays[name] = arrays[tensor.value] if in_place else tensor.copy().astype(tensor.dtype)
    return arrays


def scalars_of(case: Case) -> dict[str, Any]:
    return case.call(X_DTYPES["fp32"]).scalars


# --- the table itself and the Python methods ---


def test_every_method_is_an_op_of_the_table() -> None:
    for ops in (Ops, ReferenceOps, KernelOps):
        methods = {name for name, value in vars(ops).items() if inspect.isfunction(value)}
        public = {name for name in methods if not name.startswith("_")}
        assert public == set(TABLE if ops is Ops else LAUNCHED_OPS), ops


@pytest.mark.parametrize("op", TABLE)
def test_methods_take_the_tensors_of_the_row_in_its_order(op: str) -> None:
    names = [tensor.name for tensor in TABLE[op]]
    expected = list(inspect.signature(getattr(Ops, op)).parameters)
    assert expected[1 : 1 + len(names)] == names
    for ops in (ReferenceOps, KernelOps):
        assert list(inspect.signature(getattr(ops, op)).parameters) == expected


@pytest.mark.parametrize("op", TABLE)
def test_outputs_come_before_inputs_and_saved_statistics_last(op: str) -> None:
    def place(tensor: OpTensor) -> int:
        return 0 if tensor.role != "in" else 2 if tensor.name in SAVED_STATISTICS else 1

    places = [place(tensor) for tensor in TABLE[op]]
    assert places == sorted(places)


def test_small_arrays_have_a_name_for_each_element() -> None:
    sizes = {str(tensor) for tensor in TABLE["prepare_update"]}
    for names in (Factors, Report, Counts):
        text = f"{names.__name__.lower()} ({len(names._fields)}) float32"
        assert any(size.startswith(text) for size in sizes), text


# --- launches and signatures ---


def assert_fits(op: str, ops: KernelOps, device: Recorder, arrays: dict[str, Any]) -> set[str]:
    """Compares the launches of one call of `op` with its row; returns the kernels' names.

    Each kernel takes some tensors of the row in its order, and numbers after all arrays. A tensor
    is const unless the kernel writes it: an input always, an output only after an earlier kernel
    of the op has written it, as attention_delta has written the delta that attention_bwd_dq reads.
    """
    row = {tensor.name: tensor for tensor in TABLE[op]}
    written: set[str] = set()
    for kernel, parameters, args in device.launched:
        pointers = [(p, arg) for p, arg in zip(parameters, args, strict=True) if p.pointer]
        assert all(p.pointer for p in parameters[: len(pointers)]), f"{kernel}: arrays first"
        names = [p.name for p, _ in pointers if p.name in row]
        assert names == [name for name in row if name in names], f"{kernel}: order"
        for p, arg in pointers:
            what = f"{kernel}: {p}"
            if p.name not in row:
                assert p.name == SCRATCH, what
                assert np.shares_memory(arg, ops._scratch), what
                continue
            tensor = row[p.name]
            assert arg is arrays[p.name], f"{what}: another tensor is passed"
            assert p.ctype in CTYPES[tensor.dtype], f"{what}: dtype is {tensor}"
            if p.const:
                assert tensor.role == "in" or p.name in written, f"{what}: {tensor}"
            else:
                assert tensor.role != "in", f"{what}: {tensor}"
        written |= {p.name for p, _ in pointers if not p.const and p.name in row}
    if device.launched:
        assert written == {tensor.name for tensor in row.values() if tensor.role != "in"}
    return {kernel for kernel, *_ in device.launched}


def test_launches_and_signatures_fit_the_table() -> None:
    ops_of = defaultdict(set)  # ops that launch a kernel, by its name
    for dtype in DTYPES:
        device = Recorder()
        ops = KernelOps(device, dtype)
        for case in CASES:
            if case.op == "matmul":
                continue
            arrays = arrays_of(case, dtype)
            device.launched.clear()
            getattr(ops, case.op)(*arrays.values(), **scalars_of(case))
            for kernel in assert_fits(case.op, ops, device, arrays):
                ops_of[kernel].add(case.op)
    kernels = {name for file in kernel_files() for name in kernel_source(file, "fp32").signatures}
    assert set(ops_of) == kernels, "kernels that no case of an op launches"
    shared = {kernel: users for kernel, users in ops_of.items() if len(users) > 1}
    assert shared == SHARED_KERNELS


# --- what the launches refuse ---


def first_case(op: str) -> Case:
    return next(case for case in CASES if case.op == op)


@pytest.mark.parametrize("op", LAUNCHED_OPS)
def test_every_tensor_of_another_shape_or_dtype_is_refused(op: str) -> None:
    ops = KernelOps(Recorder(), "bf16")
    case = first_case(op)
    arrays, scalars = arrays_of(case, "bf16"), scalars_of(case)
    for name, array in arrays.items():
        deeper = arrays | {name: array[..., None]}
        with pytest.raises(ValueError, match=f"^{op}: {name} is .*, expected "):
            getattr(ops, op)(*deeper.values(), **scalars)
        other = arrays | {name: array.astype(np.float64)}
        with pytest.raises(LaunchError, match=f"^{op}: {name}: expected dtype .*, got float64"):
            getattr(ops, op)(*other.values(), **scalars)


def test_small_arrays_are_the_structs_of_the_kernel() -> None:
    text = "".join((kernels_dir() / file).read_text() for file in ("factors.cuh", "adamw.cu"))
    for names in (Factors, Report, Counts):
        body = re.search(rf"struct {names.__name__} {{(.*?)}};", text, re.DOTALL)
        assert body
        assert tuple(re.findall(r"float (\w+);", body[1])) == names._fields
