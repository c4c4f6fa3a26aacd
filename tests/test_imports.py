"""Imports between modules run one way, from the top of the tree down, and three files know CuPy."""

import ast
from pathlib import Path

import gpu_gpt2

PACKAGE = Path(gpu_gpt2.__file__).parent
# From the top down, as in the README: a module may import from its own line and from those below.
# A name stands for a module or for all modules of a package that no other line names.
LAYERS = [
    "__main__",
    "cli",
    "tools",
    "settings",
    "train",
    "run",
    "parts summary",
    "compare convert evaluate plot",
    "chat generate",
    "open_model",
    "samplers text",
    "data.prepare",
    "data",
    "tokenizer",
    "training.saver",
    "training.checkpoint training.memory",
    "training",
    "formats",
    "models.decoder",
    "models.init",
    "models.size",
    "models.llama_int8",
    "models.weights",
    "models.families",
    "models.gpt2 models.llama",
    "models.model",
    "models.kv_cache",
    "models.arena models.batch models.rope",
    "ops.cases",
    "ops.__init__",
    "ops.reference ops.kernels",
    "ops.table",
    "device.__init__",
    "device.cpu device.cuda device.emulator",
    "device.cublas",
    "device.base",
    "device.launch device.nvrtc",
    "device.source",
    "config",
    "rng",
    "cache errors __init__",
]


def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its name inside the package."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }


def imported(tree: ast.Module) -> set[str]:
    """Every name that a module imports, in full: gpu_gpt2.ops.reference.ReferenceOps."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def target_of(name: str) -> str:
    """The module of the package that an imported name is, or lies in."""
    parts = name.split(".")[1:]
    while parts and not _is_module(parts):
        parts.pop()
    path = PACKAGE.joinpath(*parts)
    return ".".join([*parts, "__init__"] if path.is_dir() else parts)


def layer(module: str) -> int:
    """The index of the line of LAYERS that names the module, or else a package around it."""
    for name in _itself_and_packages(module):
        found = [i for i, line in enumerate(LAYERS) if name in line.split()]
        assert len(found) <= 1, f"{name} stands in {len(found)} lines of LAYERS"
        if found:
            return found[0]
    raise AssertionError(f"{module} stands in no line of LAYERS")


def _itself_and_packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _is_module(parts: list[str]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_imports_run_from_the_top_down() -> None:
    checked = 0
    for module, tree in modules().items():
        for name in imported(tree):
            if name.split(".")[0] != "gpu_gpt2":
                continue
            target = target_of(name)
            assert layer(target) >= layer(module), f"{module} must not import {target}"
            checked += 1
    assert checked > 200


def test_every_line_of_the_layers_names_modules_that_exist() -> None:
    for name in " ".join(LAYERS).split():
        assert _is_module(name.removesuffix(".__init__").split(".")) or name == "__init__", name


def test_only_these_files_import_cupy() -> None:
    users = [
        module
        for module, tree in modules().items()
        if any(name.split(".")[0] in ("cupy", "cupy_backends", "cupyx") for name in imported(tree))
    ]
    assert sorted(users) == ["device.cuda", "device.nvrtc"]  # the GPU, and its compiler
