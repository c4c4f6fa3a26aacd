"""The log of a run: its two files, its lines on the terminal, resume and rewind, the curve."""

from __future__ import annotations

import io
import json
import math
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gpu_gpt2.errors import CheckpointError, ConfigError, DataError
from gpu_gpt2.training import metrics as metrics_module
from gpu_gpt2.training.curve import FEWEST_STEPS, curve_text
from gpu_gpt2.training.history import read_history, smoothed
from gpu_gpt2.training.metrics import RunLog, duration


class Recorder:
    """A sink that keeps what it is told, and fails on the calls named in `fails`."""

    name = "Recorder"

    def __init__(self, fails: str = "", error: type[Exception] = OSError) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails = fails
        self._error = error

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self._fails:
            raise self._error("no\nroute")

    def start(self, step: int) -> None:
        self._note("start", step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note("log", step, dict(values))

    def close(self) -> None:
        self._note("close")


def a_console(*, terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def shown(log: RunLog) -> str:
    assert isinstance(log.console.file, io.StringIO)
    return log.console.file.getvalue()


def a_log(run_dir: Path, *, first: int = 0, steps: int = 100, **more: Any) -> RunLog:
    console = more.pop("console", None) or a_console()
    return RunLog(run_dir, console, first_step=first, steps=steps, **more)


def train(log: RunLog, *steps: int, step_ms: float = 10.0, **more: Any) -> None:
    for step in steps:
        values = {"loss": 5 - step / 100, "lr": 1e-3, "grad_norm": 1.5, "tokens": 512} | more
        log.training(step, step_ms=step_ms, **values)


def lines(run_dir: Path, name: str) -> list[str]:
    return (run_dir / name).read_text().splitlines()


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(run_dir, "metrics.jsonl")]


def test_the_records_and_llmcs_lines(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        log.validation(0, loss=10.98765, bits_per_byte=3.5)
        log.training(1, loss=10.95555, lr=8.57e-7, grad_norm=15.256, step_ms=20.0, tokens=512)
        log.training(
            2, loss=9.0, lr=6e-4, grad_norm=None, step_ms=20.0, tokens=512, skipped="overflow"
        )
        log.validation(2, loss=9.5, bits_per_byte=3.0)
        log.hellaswag(2, correct=2980, count=10042)
    step = {"lr": 8.57e-7, "grad_norm": 15.256, "step_ms": 20.0, "tokens_per_s": 25600.0}
    assert records(tmp_path) == [
        {"step": 0, "val_loss": 10.98765, "val_bits_per_byte": 3.5},
        {"step": 1, "loss": 10.95555, **step},
        {"step": 2, "loss": 9.0, **step, "lr": 6e-4, "grad_norm": None, "skipped": "overflow"},
        {"step": 2, "val_loss": 9.5, "val_bits_per_byte": 3.0},
        {"step": 2, "hellaswag_acc_norm": 2980 / 10042},
    ]
    # llm.c prints these with "s:%d trl:%.4f lr:%.6f norm:%.2f" and so on; its first step is 0.
    assert lines(tmp_path, "main.log") == [
        "s:0 tel:10.9877",
        "s:0 trl:10.9556 lr:0.000001 norm:15.26",
        "s:1 trl:9.0000 lr:0.000600 norm:nan",
        "s:2 tel:9.5000",
        "s:2 eval:0.2968",
    ]
    assert "step 2  HellaSwag 2,980/10,042 = 0.2968" in shown(log)


def test_a_resumed_run_cuts_both_files_behind_its_checkpoint(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        train(log, 1, 2)
        log.validation(2, loss=4.5, bits_per_byte=1.0)
        train(log, 3)
        log.validation(3, loss=4.0, bits_per_byte=1.0)
        log.hellaswag(3, correct=1, count=4)
    for name, half in (("metrics.jsonl", 'no JSON\n{"step": 2, "lo'), ("main.log", "s:x\ns:1 tr")):
        with (tmp_path / name).open("a") as file:
            file.write(half)  # a crash leaves half a line
    with a_log(tmp_path, first=2) as log:
        assert log.best == (2, 4.5)
        assert [log.has("val_loss", step) for step in (1, 2, 3)] == [False, True, False]
        assert not log.has("hellaswag_acc_norm", 3)
        train(log, 3)
        log.hellaswag(3, correct=1, count=4)
        assert log.has("hellaswag_acc_norm", 3)
    assert [(r["step"], "loss" in r) for r in records(tmp_path)] == [
        (1, True), (2, True), (2, False), (3, True), (3, False),
    ]  # fmt: skip
    assert [line.split(":")[:2] for line in lines(tmp_path, "main.log")] == [
        ["s", "0 trl"], ["s", "1 trl"], ["s", "2 tel"], ["s", "2 trl"], ["s", "3 eval"],
    ]  # fmt: skip


def test_a_new_run_keeps_nothing_of_an_old_one_in_its_folder(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        log.validation(0, loss=1.0, bits_per_byte=1.0)
        train(log, 1)
    with a_log(tmp_path) as log:
        assert log.best is None
        assert not log.has("val_loss", 0)
    assert records(tmp_path) == lines(tmp_path, "main.log") == []


def test_the_best_validation_is_the_first_of_the_lowest(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        for step, loss in ((10, 3.0), (20, 2.5), (30, 2.5), (40, 2.75)):
            log.validation(step, loss=loss, bits_per_byte=1.0)
        assert log.best == (20, 2.5)
        log.rewind(10)
        assert log.best == (10, 3.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_rewind_takes_back_what_came_after_a_checkpoint(tmp_path: Path, terminal: bool) -> None:
    sink = Recorder()
    with a_log(tmp_path, console=a_console(terminal=terminal), sinks=[sink]) as log:
        train(log, 1, 2, 3, 4)
        log.validation(4, loss=3.0, bits_per_byte=1.0)
        log.rewind(2)
        assert log._progress.tasks[0].completed == 2
        assert not log.has("val_loss", 4)
        train(log, 3)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert [line.split()[0] for line in lines(tmp_path, "main.log")] == ["s:0", "s:1", "s:2"]
    assert [call[:2] for call in sink.calls] == [
        ("start", 0), ("log", 1), ("log", 2), ("log", 3), ("log", 4), ("log", 4),
        ("start", 2), ("log", 3), ("close",),
    ]  # fmt: skip


def test_sinks_get_every_number(tmp_path: Path) -> None:
    sink = Recorder()
    with a_log(tmp_path, first=4, sinks=[sink]) as log:
        train(log, 5, grad_norm=None)
        log.validation(5, loss=4.0, bits_per_byte=1.25)
        log.hellaswag(5, correct=1, count=4)
    loss = {"train/loss": 4.95, "train/lr": 1e-3, "train/step_ms": 10.0}
    assert sink.calls == [
        ("start", 4),
        ("log", 5, {**loss, "train/tokens_per_s": 51200.0}),
        ("log", 5, {"val/loss": 4.0, "val/bits_per_byte": 1.25}),
        ("log", 5, {"val/hellaswag_acc_norm": 0.25}),
        ("close",),
    ]


@pytest.mark.parametrize("fails", ["start", "log", "close"])
def test_a_failing_sink_is_warned_of_once(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recorder(fails), Recorder()
    with a_log(tmp_path, sinks=[bad, good]) as log:
        train(log, 1, 2, 3)
    assert caplog.messages == [
        "Recorder failed and receives no more numbers, but training continues: no route"
    ]
    assert bad.calls[-1][0] == fails
    assert len(good.calls) == 5
    assert len(records(tmp_path)) == 3


def test_a_sink_that_needs_the_user_ends_the_run_and_frees_the_folder(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder("start", ConfigError)
    with pytest.raises(ConfigError, match="no\nroute"):
        a_log(tmp_path, sinks=[first, second])
    assert first.calls == [("start", 0), ("close",)]
    with a_log(tmp_path):
        pass


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (60, "1 min"),
        (80, "1 min 20 s"), (119.7, "2 min"), (3599.7, "1 h"), (3600, "1 h"),
        (11100, "3 h 5 min"), (86399, "1 d"), (86400 * 2.3, "2 d 7 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_of_progress_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now)
    with a_log(tmp_path, steps=9) as log:
        train(log, 1, step_ms=10_000)
        log.doing("validating", 1024, 15975)
        now = 6.0
        log.doing("validating", 4096, 15975)
        log.doing("validating", 8192, 15975)
        log.doing("")
        now = 12.0
        log.doing("saving")  # how much is not known: there is nothing to say about progress
        log.doing("scoring", 100, 10042, unit="questions")
        now = 18.0
        train(log, 2, step_ms=10_000)
        train(log, 9)
    assert shown(log).splitlines() == [
        "validating 4,096/15,975 tokens",
        "scoring 100/10,042 questions",
        "step 2/9  loss 4.989  51 tokens/s  1 min 10 s left",
        "step 9/9  loss 4.981  51,200 tokens/s  0 s left",
    ]


def test_the_progress_bar_says_what_is_being_done(tmp_path: Path) -> None:
    with a_log(tmp_path, console=a_console(terminal=True)) as log:
        log.doing("validating", 12, 100)
        assert log._progress.tasks[0].description == "validating 12%, "
        log.doing("saving")
        assert log._progress.tasks[0].description == "saving, "
        log.doing("")
        assert log._progress.tasks[0].description == ""
    assert "tokens\n" not in shown(log)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_time_of_the_rest_is_told_after_four_steps(tmp_path: Path, terminal: bool) -> None:
    console = a_console(terminal=terminal)
    with a_log(tmp_path, first=50, steps=1450, console=console) as log:
        train(log, 51, step_ms=9000)  # the first step compiles kernels
        for step, ms in zip((52, 53, 54, 55), (60, 64, 68, 9000), strict=True):
            assert "about" not in shown(log)
            train(log, step, step_ms=ms)
            if step == 54:
                assert "about 1 min 29 s for the 1,396 steps left\n" in shown(log)
                console.file = io.StringIO()
        log.rewind(50)
        train(log, 51, 52, 53, 54, 55)


@pytest.mark.parametrize(("step_ms", "told"), [(103, False), (105, True)])
def test_a_short_rest_is_not_told(tmp_path: Path, step_ms: float, told: bool) -> None:
    with a_log(tmp_path) as log:
        train(log, 1, 2, 3, 4, step_ms=step_ms)
    assert ("about 10 s for the 96 steps left" in shown(log)) == told


def test_a_full_disk_is_one_error_and_the_folder_is_free_again(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"cannot write .*metrics\.jsonl: File too large; free some space, then .* --resume"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with a_log(tmp_path) as log, pytest.raises(CheckpointError, match=message):
            train(log, *range(1, 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    with a_log(tmp_path, first=100) as log:  # the half record is cut off
        train(log, 101)
    steps = [r["step"] for r in records(tmp_path)]
    assert steps == [*range(1, len(steps)), 101]


def losses(n: int) -> tuple[list[int], list[float]]:
    rng = np.random.default_rng(0)
    steps = np.arange(1, n + 1)
    return steps.tolist(), (3 + 6 * np.exp(-8 * steps / n) + rng.normal(0, 0.1, n)).tolist()


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "unknown"])
@pytest.mark.parametrize(("n", "width"), [(8, 24), (100, 70), (5000, 110)])
def test_the_curve_fits_and_falls(n: int, width: int, encoding: str) -> None:
    text = curve_text(*losses(n), {n: 3.1}, width=width, height=8, encoding=encoding)
    rows = text.split("\n")
    assert len(rows) == 11
    assert max(map(len, rows)) <= width
    if encoding != "utf-8":
        assert text.isascii()
    mark = "◆" if encoding == "utf-8" else "o"
    curve = [row[row.index("│" if encoding == "utf-8" else "|") + 1 :] for row in rows[1:9]]
    assert curve[-1].endswith(mark) or curve[-2].endswith(mark)
    assert sum(row.count(mark) for row in curve) == 1
    # Every column has a dot, but for the start of a long run, and the curve goes down.
    columns = range(0 if n < 200 else 20, width - 6)
    assert all(any(row[c : c + 1].strip() for row in curve) for c in columns)
    first = next(i for i, row in enumerate(curve) if row[:10].strip())
    assert first <= 1
    assert f"step {n:,}" in rows[-1]
    high, low = float(rows[1].split()[0]), float(rows[8].split()[0])
    assert 2.5 < low < 3.6 < high < 9.3


def test_no_curve_for_a_few_steps_or_a_narrow_terminal() -> None:
    assert curve_text(*losses(FEWEST_STEPS - 1), {}, width=70, height=8, encoding="utf-8") == ""
    assert curve_text(*losses(100), {}, width=20, height=8, encoding="utf-8") == ""


def test_a_constant_loss_has_a_curve() -> None:
    text = curve_text(list(range(10)), [2.0] * 10, {}, width=40, height=8, encoding="ascii")
    assert "." in text.split("\n")[4] + text.split("\n")[5]


def test_finish_shows_the_whole_run_with_its_earlier_parts(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        train(log, *range(1, 7))
        log.finish()
        assert "training loss" not in shown(log)
    with a_log(tmp_path, first=6, steps=20) as log:
        train(log, *range(7, 21))
        log.validation(20, loss=4.85, bits_per_byte=1.0)
        log.finish()
    out = shown(log)
    assert "training loss (nats per token, smoothed)   ◆ validation loss\n" in out
    assert re.search(r"^ +1 +step 20$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) == 70


@pytest.mark.parametrize(("width", "expected"), [(80, 80), (120, 110)])
def test_finish_on_a_terminal(tmp_path: Path, width: int, expected: int) -> None:
    with a_log(tmp_path, console=a_console(terminal=True, width=width)) as log:
        train(log, *range(1, 21))
        log.console.file = io.StringIO()
        log.finish()
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown(log))
    assert max(len(line) for line in plain.splitlines() if "─" in line) == expected


def test_the_moving_average_weighs_the_past_without_bias() -> None:
    values = np.array([4.0, 2.0, np.nan, 3.0, 5.0])
    decays = [1 - 1 / window for window in (1, 1.125, 1.25, 1.25, 1.25)]  # the window grows first
    weights = np.zeros(5)
    expected = []
    for i, decay in enumerate(decays):
        if i != 2:  # NaN is left out
            weights *= decay
            weights[i] = 1
        expected.append(np.nansum(weights * values) / weights.sum())
    np.testing.assert_allclose(smoothed(values, 1.25), expected)
    np.testing.assert_array_equal(smoothed(values, 1), [4, 2, 2, 3, 5])
    np.testing.assert_allclose(smoothed(np.full(500, 2.5), 20), 2.5)


def test_the_history_is_what_was_logged(tmp_path: Path) -> None:
    with a_log(tmp_path) as log:
        train(log, 1)
        train(log, 2, grad_norm=None, skipped="overflow")
        train(log, 3, skipped="gradient norm is an outlier")
        log.validation(3, loss=4.5, bits_per_byte=1.0)
        log.hellaswag(3, correct=1, count=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a training is writing it right now
    history = read_history(tmp_path)
    assert history.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(history.loss, [4.99, 4.98, 4.97])
    np.testing.assert_array_equal(history.grad_norm, [1.5, np.nan, 1.5])
    assert history.skipped.tolist() == [False, True, True]
    assert (history.val_steps.tolist(), history.val_loss.tolist()) == ([3], [4.5])


STEP = '{"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 9.0}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read .*metrics\.jsonl: No such file or directory; give the folder of a"),
        ("", "holds no training step yet"),
        ('{"step": 0, "val_loss": 3.0}\n', "holds no training step yet"),
        (STEP + "\n" + STEP, r"line 2 is damaged: ''; delete this line"),
        (STEP + "[1]\n", r"line 2 is damaged: '\[1\]'"),
        (STEP + "7\n", "line 2 is damaged"),
        (STEP.replace("1,", '"x",'), "line 1 is damaged"),
        (STEP.replace("1,", "-1,"), "line 1 is damaged"),
        (STEP.replace('"lr"', '"rl"'), "line 1 is damaged"),
        (STEP.replace("9.0", "null"), "line 1 is damaged"),
        ('{"val_loss": 3.0}\n', "line 1 is damaged"),
        (STEP + STEP, "training step 1 comes after 1; delete the older"),
        (STEP + '{"step": 5, "val_loss": 3}\n{"step": 4, "val_loss": 3}\n', "validation of step 4"),
    ],
)
def test_a_damaged_log_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_history(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [1, 2])
def test_a_loss_that_is_not_finite_is_shown_for_its_step_only(tmp_path: Path, bad: int) -> None:
    with a_log(tmp_path, steps=3) as log:
        for step in (1, 2, 3):
            train(log, step, loss=math.nan if step == bad else 2.0)
        assert "step 3/3  loss 2.000" in shown(log)
