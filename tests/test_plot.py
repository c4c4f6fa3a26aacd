"""Plots of runs: which files, which curves, and one line for everything that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.plot import COLOURS, plot_runs

Run = Callable[..., tuple[int, str, str]]


def a_run(folder: Path, n: int, *, seed: int = 0, val: int = 0, **changes: Any) -> Path:
    """A synthetic run of n steps with a validation every `val`; `changes` are arrays (n,)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    steps = np.arange(1, n + 1)
    columns: dict[str, Any] = {
        "loss": 3 + 7 * np.exp(-20 * steps / n) + rng.normal(0, 0.05, n),
        "lr": 1e-3 * np.minimum(1, steps / n * 10),
        "grad_norm": 0.5 + rng.gamma(4, 0.05, n),
        "tokens_per_s": np.where(steps == 1, 100.0, 5000.0),
        **changes,
    }
    with (folder / "metrics.jsonl").open("w") as file:
        if val:
            file.write(json.dumps({"step": 0, "val_loss": 11.0}) + "\n")
        for i in range(n):
            values = {name: column[i] for name, column in columns.items()}
            values["grad_norm"] = None if np.isnan(values["grad_norm"]) else values["grad_norm"]
            file.write(json.dumps({"step": i + 1, "step_ms": 1.0, **values}) + "\n")
            if val and (i + 1) % val == 0:
                file.write(json.dumps({"step": i + 1, "val_loss": 3.1}) + "\n")
    return folder


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, for a look at their contents."""
    saved: list[Figure] = []
    original = Figure.savefig

    def saving(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saving)
    return saved


def texts(svg: Path) -> set[str]:
    """The texts of an SVG: matplotlib draws their letters and keeps them as comments."""
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text()))


@pytest.mark.parametrize("n", [1, 5, 300, 20_000])
def test_a_png_of_a_run_of_any_length(tmp_path: Path, n: int) -> None:
    out = tmp_path / "out.PNG"
    plot_runs([a_run(tmp_path / "run", n, val=max(1, n // 4))], out)
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["out.PNG"]


def test_an_svg_names_the_runs_and_the_axes(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, 50, val=10) for name in ("first", "second", "third")]
    out = tmp_path / "out.svg"
    plot_runs(runs, out)
    ElementTree.parse(out)
    assert texts(out) >= {
        "Loss", "Learning rate", "Gradient norm", "Speed", "step", "loss (nats per token)",
        "norm before clipping", "tokens per second", "first", "second", "third", "validation",
    }  # fmt: skip
    assert "no update" not in texts(out)


def test_runs_of_one_name_are_told_apart_by_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("a/001", "b/001", "002"):
        a_run(Path(path), 3)
    plot_runs([Path("a/001"), Path("b/001"), Path("002")], Path("out.svg"))
    assert texts(Path("out.svg")) >= {"a/001", "b/001", "002"}


def test_the_first_losses_of_a_long_run_do_not_set_the_scale(
    tmp_path: Path, figure: list[Figure]
) -> None:
    plot_runs([a_run(tmp_path / "long", 1000, val=100)], tmp_path / "out.png")
    plot_runs([a_run(tmp_path / "short", 100)], tmp_path / "out.png")
    (_, long_top), (_, short_top) = (f.axes[0].get_ylim() for f in figure)
    assert long_top < 7 < 8 < short_top
    speed = figure[0].axes[3]
    assert speed.get_ylim() == (0, pytest.approx(5750))


def test_the_curves_are_the_numbers_of_the_log(tmp_path: Path, figure: list[Figure]) -> None:
    run = a_run(tmp_path / "run", 40, val=20)
    plot_runs([run], tmp_path / "out.png")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss, lr, norm, speed = figure[0].axes
    single, average, validations = loss.get_lines()[:3]
    np.testing.assert_array_equal(single.get_ydata(), [r["loss"] for r in records if "loss" in r])
    assert 0.1 < single.get_alpha() < 0.4 < 1 < average.get_linewidth()
    assert validations.get_xydata().tolist() == [[0, 11.0], [20, 3.1], [40, 3.1]]
    for axes, key in ((lr, "lr"), (norm, "grad_norm"), (speed, "tokens_per_s")):
        data = axes.get_lines()[0].get_ydata()
        np.testing.assert_array_equal(data, [r[key] for r in records if key in r])


def test_skipped_steps_are_marked_and_a_wide_range_has_a_log_axis(
    tmp_path: Path, figure: list[Figure]
) -> None:
    norms = np.full(300, 0.5)
    norms[7], norms[200] = np.nan, 40.0
    skipped = [""] * 300
    skipped[200] = "outlier"
    run = a_run(tmp_path / "run", 300, grad_norm=norms, skipped=skipped)
    plot_runs([run], tmp_path / "out.svg")
    plot_runs([a_run(tmp_path / "calm", 300)], tmp_path / "calm.svg")
    assert "no update" in texts(tmp_path / "out.svg")
    axes = figure[0].axes[2]
    marks = next(line for line in axes.get_lines() if line.get_marker() == "x")
    assert marks.get_xdata().tolist() == [8, 201]
    assert marks.get_ydata().tolist() == [axes.get_ylim()[0], 40.0]
    assert [f.axes[2].get_yscale() for f in figure] == ["log", "linear"]


def test_many_runs_differ_in_colour_or_line_style(tmp_path: Path, figure: list[Figure]) -> None:
    runs = [a_run(tmp_path / str(i), 3, seed=i) for i in range(len(COLOURS) + 2)]
    plot_runs(runs, tmp_path / "out.png")
    lines = figure[0].axes[1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(runs)


def test_the_same_run_gives_the_same_picture(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 20)
    for name in ("a.png", "b.png"):
        plot_runs([run], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "plot.jpg"])
def test_other_kinds_of_picture_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: the name must end in \.png or \.svg"):
        plot_runs([a_run(tmp_path / "run", 3)], tmp_path / name)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 3)
    with pytest.raises(DataError, match=r"cannot write .*out\.png: No such file or directory"):
        plot_runs([run], tmp_path / "nowhere" / "out.png")


def test_a_damaged_log_is_one_line(tmp_path: Path, run: Run) -> None:
    folder = a_run(tmp_path / "run", 3)
    code, _, err = run("plot", str(folder), str(tmp_path / "none"))
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "give the folder of a training run" in err
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("damaged\n{}\n")
    code, _, err = run("plot", str(folder))
    assert (code, len(err.splitlines())) == (1, 1)
    assert "line 4 is damaged: 'damaged'; delete this line" in err


def test_the_command(tmp_path: Path, run: Run) -> None:
    folder = a_run(tmp_path / "run", 3)
    code, out, err = run("plot", str(folder))
    assert (code, err) == (0, "")
    assert out == f"wrote {folder / 'plot.png'}\n"
    code, out, _ = run("plot", str(folder), "--out", str(tmp_path / "other.svg"))
    assert code == 0
    assert (tmp_path / "other.svg").read_text().startswith("<?xml")


def test_matplotlib_is_loaded_for_a_plot_only() -> None:
    code = "import gpu_gpt2.cli.app, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
