"""Kills training with SIGKILL at random moments, resumes it, and checks what every kill leaves.

    python killing.py FOLDER KILLS SEED

The runs lie in FOLDER: one without a kill, then others, until KILLS kills have hit a process that
was training. Prints a JSON object: the number of kills, how many of them hit a process that was
writing or removing a checkpoint, and the names of the runs that were finished all the same.

This is a process of its own because it forks a child for each attempt, which takes less time than
to import everything anew. Forking is safe as long as there is one thread: this process never
trains, and test_kill.py gives BLAS one thread.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from models import quiet, train_settings

from gpu_gpt2.train import train
from gpu_gpt2.training import checkpoint

WHOLE = "whole"  # the run without a kill
TEXT = "".join(f"{i} squared is {i * i}, and the cube of {i} is {i**3}.\n" for i in range(300))
AFTER_SAVE = 1.5  # a kill may come later than a save takes: in the removal of an old checkpoint
POLL_S = 0.0002  # seconds between two looks at a child: a small part of a save


def train_on(run_dir: str) -> None:
    """Trains until the run is finished, from its newest checkpoint or from the start."""
    found = checkpoint.checkpoints(Path(run_dir))
    state = checkpoint.load(found[-1]) if found else None
    new = train_settings(
        data="numbers.txt", run_dir=run_dir, steps=12, batch_size=2, total_batch_tokens=64,
        eval_every=2, save_every=2,
    )  # fmt: skip
    train(state.train if state else new, quiet(), state)


def _wait_for_threads() -> None:
    """Waits until the threads that have ended are gone: forking is safe with one thread only."""
    deadline = time.monotonic() + 10
    while sys.platform == "linux" and len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.001)


class Child:
    """A forked process that trains on a run."""

    def __init__(self, run_dir: str) -> None:
        assert threading.active_count() == 1
        _wait_for_threads()
        self._run_dir = Path(run_dir)
        self._leftovers = self._hidden()  # hidden folders that earlier kills left
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                train_on(run_dir)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self._status: int | None = None

    def wait(self, seconds: float = math.inf) -> None:
        """Waits until the process has ended, but at most for `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait_for_save(self, *, begins: bool) -> None:
        """Waits until a save begins or, if not `begins`, until none is going on."""
        while not self.ended() and self.saving() != begins:
            time.sleep(POLL_S)

    def ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def saving(self) -> bool:
        """Returns True if there is a hidden folder: one that is being written or removed."""
        try:
            names = os.listdir(self._run_dir)
        except FileNotFoundError:
            return False
        return any(name.startswith(".step_") for name in names)

    def killed_in_save(self) -> bool:
        """Returns True if the process, which was killed, has left a hidden folder."""
        return bool(self._hidden() - self._leftovers)

    def _hidden(self) -> set[tuple[str, int]]:
        """The hidden folders, each with the time of its last change; no process may run."""
        return {(path.name, path.stat().st_mtime_ns) for path in self._run_dir.glob(".step_*")}

    def kill(self) -> bool:
        """Sends SIGKILL; returns True if that ended the process, False if it had finished."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            _, self._status = os.waitpid(self._pid, 0)
        if os.WIFSIGNALED(self._status):
            assert os.WTERMSIG(self._status) == signal.SIGKILL, self._status
            return True
        assert self._status == 0, f"training failed in {self._run_dir}"
        return False


def measured() -> tuple[float, float]:
    """The seconds that the run without a kill takes, and those that it needs for one save."""
    started, saves, save_time = time.monotonic(), 0, 0.0
    child = Child(WHOLE)
    while True:
        child.wait_for_save(begins=True)
        if child.ended():
            break
        began = time.monotonic()
        child.wait_for_save(begins=False)
        saves, save_time = saves + 1, save_time + time.monotonic() - began
    assert not child.kill()
    return time.monotonic() - started, save_time / saves


def newest_step(run_dir: str) -> int:
    """Opens every checkpoint of a run, and returns the step of the newest, 0 without any."""
    files = set(os.listdir(checkpoint.checkpoints(Path(WHOLE))[-1]))
    steps = [0]
    for folder in checkpoint.checkpoints(Path(run_dir)):
        steps.append(checkpoint.load(folder).step)
        assert set(os.listdir(folder)) == files, f"{folder} is incomplete"
    return max(steps)


def main(folder: str, kills: int, seed: int) -> None:
    os.chdir(folder)
    Path("numbers.txt").write_text(TEXT)
    rng = random.Random(seed)
    run_time, save_time = measured()
    finished: list[str] = []
    done = in_saves = step = 0
    while done < kills:
        run_dir = f"run_{len(finished)}"
        child = Child(run_dir)
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 3)):
                child.wait_for_save(begins=False)
                child.wait_for_save(begins=True)
            child.wait(rng.uniform(0, AFTER_SAVE * save_time))
        else:
            child.wait(rng.uniform(0, run_time))
        killed = child.kill()
        before, step = step, newest_step(run_dir)
        assert step >= before, f"{run_dir}: checkpoint {before} is lost, {step} is the newest"
        if killed:
            done += 1
            in_saves += child.killed_in_save()
        else:
            finished.append(run_dir)
            step = 0
    last = Child(run_dir)  # the last kill has hit this run
    last.wait()
    assert not last.kill()
    finished.append(run_dir)
    print(json.dumps({"kills": done, "in_saves": in_saves, "finished": finished}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
