"""TensorBoard and Weights & Biases get a run's numbers, each step once, and cannot stop it."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginAccumulator,
)
from wandb.proto.wandb_internal_pb2 import Record

from gpu_gpt2.errors import ConfigError
from gpu_gpt2.training.metrics import RunLog
from gpu_gpt2.training.sinks import Sink, TensorBoardSink, WandbSink


def a_run(run_dir: Path, sink: Sink, first: int, last: int, scale: float = 1.0) -> None:
    """Logs the steps after `first` up to `last`; the loss of step i is `scale` times i."""
    console = Console(quiet=True)
    with RunLog(run_dir, console, first_step=first, steps=9, sinks=[sink]) as log:
        for step in range(first + 1, last + 1):
            log.training(step, loss=scale * step, lr=0.5, grad_norm=None, step_ms=8.0, tokens=4)
        log.validation(last, loss=scale * last, bits_per_byte=0.25)


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """Returns the numbers that TensorBoard shows, as both of its readers find them."""
    reader = EventAccumulator(str(run_dir / "tensorboard"))
    reader.Reload()
    found = [(event.step, event.value) for event in reader.Scalars(tag)]
    plugins = PluginAccumulator(str(run_dir / "tensorboard"))
    plugins.Reload()
    tensors = plugins.Tensors(tag)
    assert [(e.step, e.tensor_proto.float_val[0]) for e in tensors] == found
    return found


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    a_run(tmp_path, TensorBoardSink(tmp_path), 0, 3)
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert scalars(tmp_path, "train/lr") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert scalars(tmp_path, "val/bits_per_byte") == [(3, 0.25)]
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert "train/grad_norm" not in reader.Tags()["scalars"]


def test_tensorboard_shows_a_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    a_run(tmp_path, TensorBoardSink(tmp_path), 0, 4)
    a_run(tmp_path, TensorBoardSink(tmp_path), 2, 3, scale=2.0)
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 6.0)]
    assert scalars(tmp_path, "val/loss") == [(3, 6.0)]  # that of step 4 is gone


def test_tensorboard_drops_what_a_rewind_takes_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.start(0)
    for step in (1, 2, 3):
        sink.log(step, {"loss": step})
    sink.start(1)
    sink.log(2, {"loss": 5.0})
    sink.close()
    sink.close()
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 5.0)]


def test_a_full_disk_takes_tensorboard_away_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    a_run(tmp_path, TensorBoardSink(tmp_path), 0, 3)
    (message,) = caplog.messages
    assert message.startswith(
        "TensorBoard failed and receives no more numbers, but training continues"
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("extra", "make"), [
    ("tensorboard", TensorBoardSink), ("wandb", lambda run_dir: WandbSink(run_dir, {})),
])  # fmt: skip
def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, make: Any
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ConfigError, match=rf"pip install 'gpu-gpt2\[{extra}\]'") as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_tensorboard_needs_no_tensorflow(tmp_path: Path) -> None:
    TensorBoardSink(tmp_path).start(0)
    assert "tensorflow" not in sys.modules


def wandb_records(file: Path) -> list[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    A block has 32768 bytes; a record is one chunk, or a first, middle ones and a last.
    """
    data, at, parts, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, last
            found.append(Record.FromString(parts))
            parts = b""
    return found


def wandb_parts(run_dir: Path) -> list[list[Record]]:
    """The records of every part of a run; W&B's own process may still be writing the last."""
    deadline = time.monotonic() + 30
    while True:
        files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
        parts = [wandb_records(file) for file in files]
        if all(any(record.HasField("exit") for record in part) for part in parts):
            return parts
        assert time.monotonic() < deadline
        time.sleep(0.05)


def history(records: list[Record]) -> list[dict[str, float]]:
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.append({key: x for key, x in row.items() if key == "_step" or key[0] != "_"})
    return rows


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.mark.usefixtures("offline")
def test_wandb_keeps_settings_numbers_and_the_id_of_a_resumed_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "the run"
    run_dir.mkdir()
    a_run(run_dir, WandbSink(run_dir, {"lr": 0.5, "model": "d12"}), 0, 3)
    (first,) = wandb_parts(run_dir)
    (run,) = [record.run for record in first if record.HasField("run")]
    assert (run.project, run.display_name) == ("gpu-gpt2", "the run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["lr"], config["model"]) == (0.5, "d12")
    rows = history(first)
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert (rows[2]["val/loss"], rows[2]["val/bits_per_byte"]) == (3.0, 0.25)

    a_run(run_dir, WandbSink(run_dir, {}), 2, 3)
    parts = wandb_parts(run_dir)
    assert len(parts) == 2
    ids = {record.run.run_id for part in parts for record in part if record.HasField("run")}
    assert ids == {run.run_id} == {(run_dir / "wandb" / "id.txt").read_text().strip()}
    (resumed,) = (part for part in parts if len(history(part)) == 1)
    assert history(resumed)[0]["_step"] == 3
    a_run(run_dir, WandbSink(run_dir, {}), 0, 1)  # the run begins anew, so it is another one
    assert (run_dir / "wandb" / "id.txt").read_text().strip() not in ids


@pytest.mark.usefixtures("offline")
def test_wandb_keeps_the_first_value_of_a_step_after_a_rewind(tmp_path: Path) -> None:
    sink = WandbSink(tmp_path, {})
    sink.start(0)
    for step in (1, 2, 3):
        sink.log(step, {"loss": step})
    logged = []
    log = sink._run.log
    sink._run.log = lambda values, step: logged.append(step) or log(values, step=step)
    sink.start(1)
    for step in (2, 3, 4):
        sink.log(step, {"loss": 10 * step, **({"val": 7} if step == 3 else {})})
    sink.close()
    sink.close()
    assert logged == [3, 4]  # W&B would print a warning for step 2
    (records,) = wandb_parts(tmp_path)
    assert [row["_step"] for row in history(records)] == [1, 2, 3, 4]
    assert [row["loss"] for row in history(records)][:2] == [1, 2]


def test_wandb_without_a_login_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from gpu_gpt2.training.sinks import WandbSink;"
        "from gpu_gpt2.errors import ConfigError\n"
        "try: WandbSink(Path(), {}).start(0)\n"
        "except ConfigError as error: print(error)"
    )  # W&B reads its environment variables once, so this needs a process of its own
    hidden = {"WANDB_API_KEY", "WANDB_MODE"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert re.search(r"^W&B: .*; run `wandb login`, or set WANDB_MODE=offline$", done.stdout, re.M)
