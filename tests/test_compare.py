"""Reference curves: a new seed lies inside the band, a small bug outside, and what is refused."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import quiet, train_settings

from gpu_gpt2 import compare as module
from gpu_gpt2.compare import (
    COLUMNS,
    MOST_ROWS,
    SMALLEST_MARGIN,
    Deviation,
    compare,
    make_reference,
    open_reference,
    read_reference,
)
from gpu_gpt2.config import ModelConfig, TrainConfig, model_config, read_preset
from gpu_gpt2.errors import ConfigError, DataError
from gpu_gpt2.run import Run as TrainingRun
from gpu_gpt2.settings import new_config
from gpu_gpt2.train import train
from gpu_gpt2.training.history import read_history, smoothed

Run = Callable[..., tuple[int, str, str]]
STEPS = 400
CURVES = Path(__file__).parents[1] / "docs" / "reference-curves"


def write_run(folder: Path, losses: Sequence[float], validations: dict[int, float]) -> Path:
    """A run folder with a log alone."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        if 0 in validations:
            file.write(json.dumps({"step": 0, "val_loss": validations[0]}) + "\n")
        for step, loss in enumerate(losses, start=1):
            numbers = {"lr": 1.0, "grad_norm": 1.0, "step_ms": 1.0, "tokens_per_s": 1.0}
            file.write(json.dumps({"step": step, "loss": float(loss), **numbers}) + "\n")
            if step in validations:
                file.write(json.dumps({"step": step, "val_loss": validations[step]}) + "\n")
    return folder


class Runs:
    """Makes synthetic runs: a common curve, an offset of each seed, and noise of each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[Path, tuple[TrainConfig, ModelConfig]] = {}

    def make(
        self, seed: int, bug: float = 0.0, since: int = 0, steps: int = STEPS, **changes: object
    ) -> Path:
        """A run whose loss is too high by `bug` after step `since`."""
        rng = np.random.default_rng(seed)
        s = np.arange(steps + 1)
        curve = 3 + 2.5 * np.exp(-s / (15 + rng.normal(0, 0.5))) + rng.normal(0, 0.005)
        curve += np.where(s > since, bug, 0)
        validations = {
            step: float(curve[step] + rng.normal(0, 0.003)) for step in range(0, steps + 1, 50)
        }
        name = f"{seed}_{len(self.settings)}"
        path = write_run(self.folder / name, curve[1:] + rng.normal(0, 0.05, steps), validations)
        settings = train_settings(
            **{"data": "/home/me/a text.txt", "seed": seed, "run_dir": name, **changes}
        )
        self.settings[path] = settings, model_config("nano", 257)
        return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs(tmp_path / "runs")
    monkeypatch.setattr(module, "_settings", lambda path: runs.settings[path])
    return runs


@pytest.fixture
def curve(runs: Runs, tmp_path: Path) -> Path:
    """The reference of seeds 1 to 4."""
    make_reference([runs.make(seed) for seed in range(1, 5)], tmp_path / "curve.csv")
    return tmp_path / "curve.csv"


def test_new_seeds_lie_inside_the_band(runs: Runs, curve: Path) -> None:
    reference = read_reference(curve)
    found = [compare(runs.make(seed), reference) for seed in range(10, 40)]
    outside = [sum(not pair[kind].inside for pair in found) for kind in (0, 1)]
    assert max(outside) <= 2, outside
    assert all(len(pair[0].steps) == STEPS and len(pair[1].steps) == 9 for pair in found)


@pytest.mark.parametrize("bug", [0.25, -0.25])
def test_a_bug_is_found_where_it_begins(runs: Runs, curve: Path, bug: float) -> None:
    training, validation = compare(runs.make(10, bug, since=300), read_reference(curve))
    for deviation in (training, validation):
        assert not deviation.inside
        assert (deviation.excess[deviation.steps <= 300] == 0).all()
        assert np.sign(deviation.excess).sum() == np.sign(bug) * np.count_nonzero(deviation.excess)
        assert 0.5 * abs(bug) < np.abs(deviation.excess).max() < abs(bug)
    first = training.steps[np.flatnonzero(training.excess)[0]]
    assert 300 < first < 350  # the moving average takes a while
    assert validation.steps[np.flatnonzero(validation.excess)].tolist() == [350, 400]
    side = "above" if bug > 0 else "below"
    text = f"{validation}"
    assert text.startswith("validation loss: outside the band from step 350 on (0.")
    assert f"nats {side} it), most at step " in text
    assert text.endswith("outside at 2 of 9 steps")


def test_a_shorter_run_is_compared_as_far_as_it_goes(runs: Runs, curve: Path) -> None:
    training, validation = compare(runs.make(10, steps=120), read_reference(curve))
    assert str(training) == (
        "training loss (smoothed): inside the band at all 120 steps compared, up to step 120"
    )
    assert validation.steps.tolist() == [0, 50, 100]


def test_the_band_is_the_seeds_and_a_margin(runs: Runs, tmp_path: Path) -> None:
    paths = [runs.make(seed) for seed in (1, 2, 3)]
    make_reference(paths, tmp_path / "curve.csv")
    band = read_reference(tmp_path / "curve.csv").training
    losses = np.array([smoothed(read_history(path).loss, 50) for path in paths])
    low, middle, high = np.sort(losses, axis=0)
    excess = np.maximum(high - middle, middle - low)  # largest distance from the middle seed
    for step in (1, 2, 7, 100, 399, 400):
        near = excess[-(-step // 2) - 1 : 2 * step].max()
        margin = max(SMALLEST_MARGIN, 3 * near)
        i = step - 1
        expected = low[i] - margin, losses[:, i].mean(), high[i] + margin
        assert (band.low[i], band.loss[i], band.high[i]) == pytest.approx(expected, abs=1e-5)


def test_seeds_that_agree_leave_the_smallest_margin(runs: Runs, tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2, 3):
        path = write_run(tmp_path / str(seed), [4.0, 3.0], {2: 3.5})
        runs.settings[path] = runs.settings[runs.make(seed)]
        paths.append(path)
    make_reference(paths, tmp_path / "curve.csv")
    reference = read_reference(tmp_path / "curve.csv")
    assert reference.validation.low.tolist() == [3.49]
    assert reference.validation.high.tolist() == [3.51]


def test_the_file_says_where_it_comes_from(curve: Path) -> None:
    lines = curve.read_text().splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines[1:] if line.startswith("# "))
    assert lines[0] == "# gpu-gpt2 reference curve, format 1"
    command = header["command"]
    assert command.startswith("gpu-gpt2 train --data 'a text.txt' --model nano --tokenizer bytes ")
    assert command.endswith(" --seed SEED")
    assert "--lr 0.003" in command
    assert "run_dir" not in command
    assert "/home" not in curve.read_text()
    assert json.loads(header["model"])["n_embd"] == 32
    assert (header["tokens per step"], header["seeds"]) == ("256", "1, 2, 3, 4")
    assert header.keys() >= {"commit", "date", "moving average"}
    table = [line.split(",") for line in lines if not line.startswith("#")]
    assert tuple(table[0]) == COLUMNS
    assert table[1][:4] == ["0", "", "", ""]  # the validation before the first step
    assert table[2][4:] == ["", "", ""]
    assert table[51][0] == "50"
    assert all(table[51])
    assert len(table) == STEPS + 2


def test_a_long_curve_is_thinned_but_keeps_its_validations(runs: Runs, tmp_path: Path) -> None:
    paths = [runs.make(seed, steps=3000) for seed in (1, 2, 3)]
    make_reference(paths, tmp_path / "curve.csv")
    reference = read_reference(tmp_path / "curve.csv")
    assert MOST_ROWS <= len(reference.training.steps) <= MOST_ROWS + 60
    assert reference.training.steps[[0, -1]].tolist() == [1, 3000]
    assert reference.validation.steps.tolist() == list(range(0, 3001, 50))
    assert all(deviation.inside for deviation in compare(paths[0], reference))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-3}, "must differ in --seed only, but differ in --lr"),
        ({"lr": 1e-3, "beta2": 0.99}, "but differ in --lr, --beta2"),
        ({"seed": 1}, "have the same --seed 1; train one of them again with another seed"),
    ],
)
def test_runs_that_make_no_reference(
    runs: Runs, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    paths = [runs.make(1), runs.make(2), runs.make(**{"seed": 3, **changes})]
    with pytest.raises(ConfigError, match=message):
        make_reference(paths, tmp_path / "curve.csv")
    assert not (tmp_path / "curve.csv").exists()


def test_what_has_no_effect_on_the_losses_may_differ(runs: Runs, tmp_path: Path) -> None:
    paths = [runs.make(1), runs.make(2, sample_every=5), runs.make(3)]
    make_reference(paths, tmp_path / "curve.csv")


def test_a_reference_knows_the_family_of_its_model(runs: Runs, tmp_path: Path) -> None:
    llama = replace(model_config("llama:nano", 257), tie_word_embeddings=False)
    paths = [runs.make(seed) for seed in (1, 2, 3)]
    for path in paths:
        runs.settings[path] = runs.settings[path][0], llama
    make_reference(paths, tmp_path / "curve.csv")
    reference = read_reference(tmp_path / "curve.csv")
    assert reference.model == llama
    compare(paths[0], reference)
    runs.settings[paths[0]] = runs.settings[paths[0]][0], replace(llama, rope_theta=500.0)
    with pytest.raises(ConfigError, match=r"rope_theta 500\.0.*Llama.*rope_theta 10000\.0"):
        compare(paths[0], reference)
    text = (tmp_path / "curve.csv").read_text().replace('"family": "llama"', '"family": "bert"')
    (tmp_path / "curve.csv").write_text(text)
    with pytest.raises(DataError, match=r"the comments 'model' and .* are missing or damaged"):
        read_reference(tmp_path / "curve.csv")


def test_a_reference_without_a_family_is_of_a_gpt2(curve: Path) -> None:
    curve.write_text(curve.read_text().replace('"family": "gpt2", ', ""))
    assert "family" not in curve.read_text()
    assert read_reference(curve).model == model_config("nano", 257)


def test_runs_of_other_lengths_or_models_make_no_reference(runs: Runs, tmp_path: Path) -> None:
    paths = [runs.make(1), runs.make(2), runs.make(3, steps=STEPS - 1)]
    runs.settings[paths[2]] = replace(runs.settings[paths[1]][0], seed=3), model_config("nano", 257)
    with pytest.raises(DataError, match="have not logged the same steps and validations; let all"):
        make_reference(paths, tmp_path / "curve.csv")
    paths[2] = runs.make(4)
    runs.settings[paths[2]] = runs.settings[paths[2]][0], model_config("mini", 257)
    with pytest.raises(ConfigError, match="but differ in the model"):
        make_reference(paths, tmp_path / "curve.csv")
    with pytest.raises(ConfigError, match="at least 3 runs with different seeds, not 2"):
        make_reference(paths[:2], tmp_path / "curve.csv")


def test_a_reference_that_cannot_be_written(runs: Runs, tmp_path: Path) -> None:
    paths = [runs.make(seed) for seed in (1, 2, 3)]
    with pytest.raises(DataError, match=r"cannot write .*: No such file or directory"):
        make_reference(paths, tmp_path / "nowhere" / "curve.csv")


@pytest.mark.parametrize(
    ("total", "model", "message"),
    [
        (512, "nano", r"tokens per step: 512 in the run, 256 in the reference; choose"),
        (
            256,
            "mini",
            r"model: GPT-2 with 2 layers of 256 with 4 heads, .*2 layers of 32 with 2 heads",
        ),
    ],
)
def test_other_models_and_batches_are_not_compared(
    runs: Runs, curve: Path, total: int, model: str, message: str
) -> None:
    path = runs.make(10, total_batch_tokens=total)
    runs.settings[path] = runs.settings[path][0], model_config(model, 257)
    with pytest.raises(ConfigError, match=message):
        compare(path, read_reference(curve))


def test_two_runs_are_compared_within_a_tolerance(runs: Runs) -> None:
    first, second = runs.make(1), runs.make(1, 0.06, since=200)
    assert all(d.inside for d in compare(first, open_reference(first)))
    training, validation = compare(second, open_reference(first))
    assert validation.steps[np.flatnonzero(validation.excess)].tolist() == [250, 300, 350, 400]
    np.testing.assert_allclose(validation.excess[-4:], 0.01, atol=1e-9)
    assert training.excess.max() == pytest.approx(0.01, abs=0.002)
    assert all(d.inside for d in compare(second, open_reference(first, 0.0601)))


def test_a_tolerance_beside_a_file_is_refused(curve: Path) -> None:
    with pytest.raises(ConfigError, match="--tolerance is for comparing two runs"):
        open_reference(curve, 0.1)


def test_no_step_in_common() -> None:
    nothing = np.zeros(0)
    deviation = Deviation("validation loss", nothing.astype(int), nothing)
    assert deviation.inside
    assert str(deviation) == "validation loss: no step in common with the reference"


def test_runs_without_a_step_in_common_are_refused(runs: Runs, tmp_path: Path) -> None:
    run = runs.make(1)
    late = run.parent / "late"
    late.mkdir()
    text = (run / "metrics.jsonl").read_text()
    (late / "metrics.jsonl").write_text(text.replace('"step": ', '"step": 9000'))
    runs.settings[late] = runs.settings[run]
    with pytest.raises(DataError, match="has no training step in common with the reference"):
        compare(run, open_reference(late))


def damaged(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("format 1", "format 2"), "is no reference: its first line must be"),
        (lambda _: "", "is no reference"),
        (
            damaged("# model: {", "# model: "),
            "the comments 'model' and 'tokens per step' are missing",
        ),
        (damaged("# tokens per step: 256\n", ""), "are missing or damaged"),
        (damaged("loss_low", "low"), "the columns must be step,loss_low,loss,"),
        (damaged("\n3,", "\nx,"), "line 13 is damaged: 'x,"),
        (damaged("\n3,", "\n3,nan,"), "line 13 is damaged"),
        (damaged("\n3,", "\n3,1.0,"), "line 13 is damaged"),
        (damaged("\n50,", "\n50,,"), "line 60 is damaged"),
    ],
)
def test_a_damaged_reference_is_one_line(
    curve: Path, damage: Callable[[str], str], message: str
) -> None:
    curve.write_text(damage(curve.read_text()))
    with pytest.raises(DataError, match=message) as error:
        read_reference(curve)
    assert "\n" not in str(error.value)


def test_files_that_are_no_text_or_missing(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe")
    for name, reason in (("x.csv", "not UTF-8 text"), ("y.csv", "No such file")):
        with pytest.raises(DataError, match=rf"cannot read the reference .*{name}: {reason}"):
            read_reference(tmp_path / name)


def test_the_commands_with_real_runs(run: Run, tmp_path: Path) -> None:
    text = "".join(f"{i} squared is {i * i}.\n" for i in range(400))
    Path("text.txt").write_text(text)
    names = ["a", "b", "c", "new"]
    for seed, name in enumerate(names):
        train(train_settings(data="text.txt", seed=seed, run_dir=name, steps=12), quiet())
    code, out, err = run("compare", "--make", "curve.csv", *names[:3])
    assert (code, out, err) == (0, "wrote curve.csv\n", "")
    code, out, err = run("compare", "new", "curve.csv")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "new compared with the band of curve.csv (seeds 0, 1, 2)",
        "training loss (smoothed): inside the band at all 12 steps compared, up to step 12",
        "validation loss: inside the band at all 4 steps compared, up to step 12",
    ]
    train(train_settings(data="text.txt", run_dir="bad", steps=12, lr=0.1), quiet())
    code, out, _ = run("compare", "bad", "curve.csv")
    assert code == 1
    assert "outside the band from step " in out
    code, out, _ = run("compare", "new", "a", "--tolerance", "5")
    assert code == 0
    assert "new compared with the losses of a +- 5 nats per token" in out
    for words, message in (
        (["new"], "expected a run and its reference, not 1 paths"),
        (["--make", "x.csv", "a", "b", "bad"], "but differ in --lr"),
        (["--make", "x.csv", "--tolerance", "1", "a", "b", "c"], "leave it out with --make"),
        (["nowhere", "curve.csv"], "nowhere: no checkpoint here"),
        (["new", "nowhere.csv"], "cannot read the reference nowhere.csv"),
    ):
        code, _, err = run("compare", *words)
        assert (code, len(err.splitlines())) == (1, 1), err
        assert message in err


@pytest.mark.parametrize(("change", "inside"), [({}, True), ({"lr": 0.02}, False)])
def test_the_first_steps_of_a_run_against_our_own_curve(
    change: dict[str, float], inside: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the preset tiny-cpu with a seed that the curve does not have."""
    count_step = TrainingRun.count_step

    def stopping(self: TrainingRun, *args: Any) -> None:
        count_step(self, *args)
        if self.step == 60:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingRun, "count_step", stopping)
    given = {"seed": 1, "plot": False, **change}
    train(new_config(given, read_preset("tiny-cpu"), Path("tiny")), quiet())
    code, out, err = run("compare", "tiny", str(CURVES / "tiny-cpu.csv"))
    assert (code, err) == (0 if inside else 1, "")
    assert ("outside the band from step " in out) != inside


def test_every_curve_of_ours_can_be_read_and_is_listed() -> None:
    names = sorted(path.name for path in CURVES.glob("*.csv"))
    listed = re.findall(r"^\| \[([^]]+)\]", (CURVES / "README.md").read_text(), re.MULTILINE)
    assert names == sorted(listed)
    for name in names:
        reference = read_reference(CURVES / name)
        assert reference.tokens_per_step == 512
        assert len(reference.training.steps) > 500
