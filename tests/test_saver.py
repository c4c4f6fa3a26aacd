"""Checkpoints saved in a thread: training goes on at once, and no error or file is lost."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from devices import upload
from models import train_settings

from gpu_gpt2.config import GPT2Config
from gpu_gpt2.device import open_device
from gpu_gpt2.device.base import FLOAT32
from gpu_gpt2.device.cpu import CpuDevice
from gpu_gpt2.errors import CheckpointError
from gpu_gpt2.models.families import parameter_count
from gpu_gpt2.models.weights import named
from gpu_gpt2.training import checkpoint
from gpu_gpt2.training.checkpoint import Retention, TrainingState
from gpu_gpt2.training.memory import (
    best_fit,
    largest_batch,
    memory_plan,
    planned_bytes,
)
from gpu_gpt2.training.optimizer import UpdateState
from gpu_gpt2.training.saver import CheckpointSaver

MODEL = GPT2Config(vocab_size=257, n_positions=17, n_embd=48, n_layer=2, n_head=3)
N = parameter_count(MODEL)
SIZES = (N, N, N)  # of weights, m and v
TRAIN = train_settings(data="python-docs", seq_len=16, run_dir="run")
NEWEST_TWO = Retention()

devices = pytest.mark.parametrize(
    "device", ["cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
)


class SlowTokenizer:
    """Waits in the middle of a save until the test lets it go on."""

    eot = 256

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._then = then

    def save(self, folder: Path) -> None:
        self.reached.set()
        assert self.go_on.wait(30)
        self._then()


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def arenas(seed: int) -> np.ndarray:
    """(3, N) float32 as the arrays of a checkpoint: weights, m and v."""
    values = np.random.default_rng(seed).standard_normal((len(SIZES), N), np.float32)
    named(MODEL, values[0])["wte"][MODEL.vocab_size :] = 0
    return values


def state_of(step: int, copies: tuple[np.ndarray, ...]) -> TrainingState:
    weights, m, v = copies
    return TrainingState(
        model=MODEL, train=TRAIN, step=step, tokens=0, loader={}, weights=weights, m=m, v=v,
        update=UpdateState(updates=step, good_steps=0, loss_scale=1.0),
    )  # fmt: skip


def saved(folder: Path) -> np.ndarray:
    state = checkpoint.load(folder)
    return np.stack([state.weights, state.m, state.v])


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []


@devices
def test_arrays_may_change_while_they_are_saved(device: str, tmp_path: Path) -> None:
    place, tokenizer = open_device(device), SlowTokenizer()
    before, after = arenas(1), arenas(2)
    arrays = [upload(place, values, FLOAT32) for values in before]
    with CheckpointSaver(tmp_path, place, SIZES, tokenizer) as saver:
        folder = saver.start(state_of(5, saver.host_copies(*arrays)), NEWEST_TWO)
        assert tokenizer.reached.wait(30)
        assert folder == tmp_path / "step_00000005"
        assert not folder.exists()
        for array, values in zip(arrays, after, strict=True):
            place.upload(array, values)
        place.synchronize()
        saver.check()
        tokenizer.go_on.set()
        saver.wait()
        assert saved(folder).tobytes() == before.tobytes()


@devices
def test_a_download_into_host_memory_waits_and_takes_one_shape_and_dtype(device: str) -> None:
    place = open_device(device)
    source = upload(place, np.arange(6).reshape(2, 3), FLOAT32)
    host = place.host_empty((2, 3), FLOAT32)
    assert isinstance(host, np.ndarray)
    assert host.flags.c_contiguous
    place.download_into(host, source)
    assert host.tolist() == [[0, 1, 2], [3, 4, 5]]
    for shape, dtype in (((3, 2), np.float32), ((2, 3), np.int32)):
        with pytest.raises((ValueError, TypeError)):
            place.download_into(place.host_empty(shape, dtype), source)


def test_no_memory_is_allocated_by_a_save(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer()
    tokenizer.go_on.set()
    with CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver:
        first = saver.host_copies(*arenas(1))
        saver.start(state_of(1, first), NEWEST_TWO)
        second = saver.host_copies(*arenas(2))
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_two_saves_come_one_after_the_other(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer()
    values = {1: arenas(1), 2: arenas(2), 3: arenas(3)}
    with CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver:
        saver.start(state_of(1, saver.host_copies(*values[1])), Retention(last=0))
        assert tokenizer.reached.wait(30)
        threading.Timer(0.3, tokenizer.go_on.set).start()
        started = time.perf_counter()
        copies = saver.host_copies(*values[2])  # must not overwrite what the thread still reads
        assert time.perf_counter() - started > 0.2
        assert names(tmp_path) == ["step_00000001"]
        saver.start(state_of(2, copies), Retention(last=0))
        saver.start(state_of(3, saver.host_copies(*values[3])), Retention(last=0))
    for step, expected in values.items():
        assert saved(checkpoint.folder_of(tmp_path, step)).tobytes() == expected.tobytes()


def test_a_start_waits_for_the_save_before(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer()
    copies = tuple(arenas(1))
    with CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver:
        saver.start(state_of(1, copies), NEWEST_TWO)
        threading.Timer(0.2, tokenizer.go_on.set).start()
        saver.start(state_of(2, copies), NEWEST_TWO)
        assert "step_00000001" in names(tmp_path)


def test_the_retention_of_each_save_is_used(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer()
    tokenizer.go_on.set()
    with CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver:
        for step in range(1, 5):
            saver.start(state_of(step, saver.host_copies(*arenas(1))), Retention(last=1, best=2))
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def until_failed(saver: CheckpointSaver) -> None:
    """Calls check as a trainer does after every step, until it raises."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        saver.check()
        time.sleep(0.01)


def test_a_full_disk_ends_the_training_at_the_next_step(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer(no_space)
    with (  # noqa: PT012 (the end of the inner `with` must pass the error on)
        pytest.raises(CheckpointError) as caught,
        CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver,
    ):
        saver.start(state_of(7, saver.host_copies(*arenas(1))), NEWEST_TWO)
        saver.check()  # nothing has failed yet
        tokenizer.go_on.set()
        for later in (
            lambda: until_failed(saver),
            saver.wait,
            saver.check,
            lambda: saver.host_copies(*arenas(1)),
        ):
            with pytest.raises(CheckpointError, match="No space left on device"):
                later()
        saver.check()
    assert str(caught.value).startswith(
        f"cannot write checkpoint {tmp_path}/step_00000007: No space left on device (up to "
    )
    assert names(tmp_path) == []


def test_an_error_that_nobody_asked_for_is_raised_at_the_end(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer(no_space)
    tokenizer.go_on.set()
    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver,
    ):
        saver.start(state_of(7, saver.host_copies(*arenas(1))), NEWEST_TWO)


@pytest.mark.parametrize("fails", [False, True])
def test_an_exception_of_the_training_waits_for_the_save_and_is_not_hidden(
    fails: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = SlowTokenizer(no_space if fails else lambda: None)
    threading.Timer(0.2, tokenizer.go_on.set).start()
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer) as saver,
    ):
        folder = saver.start(state_of(7, saver.host_copies(*arenas(1))), NEWEST_TWO)
        raise ZeroDivisionError
    assert names(tmp_path) == ([] if fails else [folder.name])
    assert ("No space left" in caplog.text) == fails


def test_an_interrupt_while_waiting_leaves_no_half_written_checkpoint(tmp_path: Path) -> None:
    tokenizer = SlowTokenizer()
    waiting = CheckpointSaver(tmp_path, CpuDevice(), SIZES, tokenizer)
    waiting.start(state_of(7, waiting.host_copies(*arenas(1))), NEWEST_TWO)
    assert tokenizer.reached.wait(30)
    thread = waiting._thread
    assert thread is not None
    join = thread.join

    def interrupted() -> None:
        raise KeyboardInterrupt

    thread.join = interrupted  # type: ignore[method-assign]  # a second Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        waiting.wait()
    assert names(tmp_path) == [".step_00000007.tmp"]
    assert checkpoint.checkpoints(tmp_path) == []
    assert thread.daemon  # the end of the program does not wait for it
    tokenizer.go_on.set()
    join()
    assert names(tmp_path) == ["step_00000007"]  # a program that went on would have it


def test_the_host_memory_has_been_touched_before_the_first_save(tmp_path: Path) -> None:
    """Memory that the system has yet to find would make the first copy slow, or fail there."""
    n, process = 12_000_000, psutil.Process()  # 48 MB each: too large to come from the heap
    before = process.memory_info().rss
    saver = CheckpointSaver(tmp_path, CpuDevice(), (n, n, n), SlowTokenizer())
    taken = process.memory_info().rss - before
    assert taken > 0.9 * sum(buffer.nbytes for buffer in saver._buffers)


def test_the_plan_of_a_run_on_the_host_counts_the_copies(tmp_path: Path) -> None:
    without = memory_plan(MODEL, "fp32", 2, 16, 0)
    plan = memory_plan(MODEL, "fp32", 2, 16, 0, host_copies=True)
    saver = CheckpointSaver(tmp_path, CpuDevice(), SIZES, SlowTokenizer())
    copies = sum(buffer.nbytes for buffer in saver._buffers)
    assert plan.rows == (*without.rows, ("checkpoint copies", copies))
    assert planned_bytes(MODEL, "fp32", 2, 16, host_copies=True) == without.total + copies
    memory = planned_bytes(MODEL, "fp32", 5, 16) + copies
    assert largest_batch(MODEL, "fp32", 16, 0, memory, host_copies=True) == 5
    assert largest_batch(MODEL, "fp32", 16, 0, memory) > 5
    fit = best_fit(MODEL, "fp32", 16, memory, recompute=0, host_copies=True)
    assert (fit.batch_size, dict(fit.rows)["checkpoint copies"]) == (5, copies)
