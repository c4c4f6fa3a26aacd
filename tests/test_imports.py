"""The arrows between modules run one way, and only one file knows CuPy."""

import ast
from pathlib import Path

import gpu_gpt2

PACKAGE = Path(gpu_gpt2.__file__).parent
# A module may import from its own line and from those above it.
LAYERS = [
    "__init__ errors",
    "config schedule cache rng libm",
    "device.source",
    "device.launch device.nvrtc",
    "device.base",
    "device.cublas",
    "device.host device.cupy_device",
    "device.emulator",
    "device.select",
    "layout ops.interface",
    "formats",
    "ops.reference ops.kernels",
    "ops.select check plan",
    "model",
    "optimizer peers",
    "tokenizer",
    "data init",
    "step",
    "evaluate multiple_choice generate runlog checkpoint bench info",
    "models verify",
    "train convert",
    "cli",
    "__main__",
]


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> int:
    """The line of LAYERS that names the module or a package around it."""
    found = [
        i for i, line in enumerate(LAYERS)
        if any(module == name or module.startswith(name + ".") for name in line.split())
    ]  # fmt: skip
    assert len(found) == 1, f"{module} stands in {len(found)} lines of LAYERS"
    return found[0]


def test_arrows_run_one_way() -> None:
    checked = 0
    for module, tree in modules().items():
        if module.endswith("__init__") and "emulator" not in module:
            continue
        for name in imported(tree):
            if not name.startswith("gpu_gpt2."):
                continue
            target = name.removeprefix("gpu_gpt2.")
            while target and not _is_module(target):
                target = target.rpartition(".")[0]
            target = target or "__init__"
            if target.endswith(("device", "ops", "data", "formats", "cli")) and "." not in target:
                continue
            assert layer(target) <= layer(module), f"{module} must not import {target}"
            checked += 1
    assert checked > 50


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def test_two_files_import_cupy() -> None:
    users = [
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] in ("cupy", "cupy_backends", "cupyx") for name in imported(tree))
    ]
    assert sorted(users) == ["device.cupy_device", "device.nvrtc"]  # the GPU, and its compiler
