"""The wheel holds all files of the package, and an installed package finds its kernels."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from gpu_gpt2.device import source

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
    """The wheel is unpacked into a new environment, which shares the dependencies of this one."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    shared = [path for path in sys.path if path.endswith("site-packages")]
    # These folders come after the environment's own packages, and their .pth files are not read,
    # so that an editable install of the package is not found.
    (site / "shared.pth").write_text("\n".join(shared))
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


def test_a_package_without_kernels_says_to_install_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "__file__", str(tmp_path / "gpu_gpt2/device/source.py"))
    source.kernels_dir.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"no kernels: .*; install gpu-gpt2 again"):
            source.kernels_dir()
    finally:
        source.kernels_dir.cache_clear()
