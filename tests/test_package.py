"""The wheel: what it carries, and that the kernels are found where it is installed."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_kernels_emulator_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "kernels").glob("*.cu*"):
        assert f"gpu_gpt2/kernels/{file.name}" in names
    for file in (ROOT / "gpu_gpt2").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_an_installed_wheel_finds_its_own_kernels(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows this one's dependencies but not the package."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    # Behind the environment's own packages, and without the .pth file of an editable install.
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    code = (
        "import gpu_gpt2.device.source as s; print(s.kernels_dir());"
        "print(len(s.kernel_files())); print(s.__file__)"
    )
    out = subprocess.run(
        [python, "-E", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.splitlines()
    assert Path(out[0]) == site / "gpu_gpt2" / "kernels"
    assert int(out[1]) == len(list((ROOT / "kernels").glob("*.cu"))) >= 10
    assert Path(out[2]).is_relative_to(site)
