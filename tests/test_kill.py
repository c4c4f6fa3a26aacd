"""A run that is killed again and again ends like one that is not: 50 times SIGKILL."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import WHOLE

KILLS = 50
SEED = 0
STEPS = range(1, 13)
VALIDATIONS = range(2, 13, 2)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The run without a kill, and the runs that were finished in spite of the kills."""
    folder = tmp_path_factory.mktemp("killing")
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    script = Path(__file__).with_name("killing.py")
    process = subprocess.run(
        [sys.executable, str(script), str(folder), str(KILLS), str(SEED)],
        env={**os.environ, **one_thread, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["kills"] == KILLS
    assert found["in_saves"] >= KILLS // 10, "too few kills have hit a save"
    assert len(found["finished"]) > 1
    return folder / WHOLE, [folder / name for name in found["finished"]]


def records(run: Path, key: str) -> list[tuple[int, float]]:
    """The step and the value of every record that has `key`, in the order of the file."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r[key]) for r in map(json.loads, lines) if key in r]


def sums(run: Path) -> list[str]:
    """The SHA-256 of the weights and of the optimizer state after the last step."""
    folder = run / f"step_{STEPS[-1]:08d}"
    files = [folder / name for name in ("model.safetensors", "optimizer.safetensors")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_killed_runs_end_with_the_same_bits(runs: tuple[Path, list[Path]]) -> None:
    whole, killed = runs
    for run in killed:
        assert sums(run) == sums(whole), run.name


def test_killed_runs_record_each_step_once(runs: tuple[Path, list[Path]]) -> None:
    whole, killed = runs
    expected = records(whole, "loss")
    assert [step for step, _ in expected] == list(STEPS)
    for run in killed:
        assert records(run, "loss") == expected, run.name


def test_killed_runs_record_each_validation_once(runs: tuple[Path, list[Path]]) -> None:
    whole, killed = runs
    expected = records(whole, "val_loss")
    assert [step for step, _ in expected if step > 0] == list(VALIDATIONS)
    for run in killed:
        assert records(run, "val_loss") == expected, run.name
