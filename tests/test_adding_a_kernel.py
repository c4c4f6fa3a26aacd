"""The example of docs/adding-a-kernel.md passes its tests in a copy of the source tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/adding-a-kernel.md").read_text()
BLOCK = re.compile(
    r"^In `(?P<file>[^`]+)`, (?:above `(?P<line>[^`]+)`|a new file):\n\n```\w+\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COPIED = ("gpu_gpt2", "kernels", "pyproject.toml")
COPIED_TESTS = ("conftest.py", "devices.py", "test_table.py")

pytestmark = pytest.mark.emulator


def apply_page(root: Path) -> None:
    """Does to the source tree what the page says."""
    for block in BLOCK.finditer(PAGE):
        path, line, code = root / block["file"], block["line"], block["code"]
        if line is None:
            assert not path.exists()
            path.write_text(code)
            continue
        lines = path.read_text().splitlines(keepends=True)
        (index,) = (i for i, text in enumerate(lines) if text.strip() == line)
        path.write_text("".join([*lines[:index], code, *lines[index:]]))


def python(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the source tree."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the example needs of the source tree, with the page applied."""
    root = tmp_path_factory.mktemp("tree")
    (root / "tests").mkdir()
    for name in (*COPIED, *(f"tests/{name}" for name in COPIED_TESTS)):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    apply_page(root)
    return root


def test_the_example_passes_its_tests(tree: Path) -> None:
    done = python(tree, "-m", "pytest", "-q", "tests/test_row_rms.py", "tests/test_table.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulator 33" in done.stdout  # 11 sizes in 3 dtypes


def test_the_example_is_in_the_bench_and_in_style(tree: Path) -> None:
    counts = (
        "from gpu_gpt2.config import model_config; from gpu_gpt2.tools.bench.static import counts; "
        "print([c['bytes'] for c in counts(model_config('d12'), 'bf16') if c['name'] == 'row_rms'])"
    )
    done = python(tree, "-c", counts)
    assert done.stdout.strip() == str([1024 * 768 * 2 + 1024 * 4]), done.stderr
    for command in (["format", "--check"], ["check", "--no-cache"]):
        style = python(tree, "-m", "ruff", *command, ".")
        assert style.returncode == 0, style.stdout + style.stderr


def test_the_fault_is_reported_in_the_words_of_the_page(tree: Path) -> None:
    kernel = tree / "kernels/row_rms.cu"
    right = kernel.read_text()
    kernel.write_text(right.replace("c < C", "c <= C"))
    try:
        done = python(tree, "-m", "pytest", "-q", "-x", "tests/test_row_rms.py", "-k", "emulator")
    finally:
        kernel.write_text(right)
    reports = re.findall(r"^KernelError: .*$", PAGE, re.MULTILINE)
    assert len(reports) == 1
    assert reports[0] in done.stdout
