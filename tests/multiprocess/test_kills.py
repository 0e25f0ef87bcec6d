"""Runs that are killed at random times, during their start, too, and started again until they are done."""

import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from line_task import run
from processes import Running, launch_train, start
from test_surviving import facts, steps

from clip_jax.training import checkpoint

STEPS = 40


def line(workdir: str) -> None:
    run(Path(workdir), steps=STEPS, evaluate_every=8)


def clip(workdir: str) -> None:
    sys.argv += ["--config=tests/multiprocess/tiny.py", f"--config.steps={STEPS}", "--config.checkpoint_every=2",
                 f"--workdir={workdir}"]  # fmt: skip
    launch_train()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("main", "kills"), [(line, 10), pytest.param(clip, 50, marks=pytest.mark.slowest)])
def test_random_kills_lose_nothing(tmp_path: Path, main: Callable[[str], None], kills: int) -> None:
    seed = random.randrange(2**32)
    draw = random.Random(seed)

    def begin(workdir: Path) -> Running:
        return start(tmp_path / "log", main=main, arguments=[str(workdir)])

    assert begin(tmp_path / "compiled").wait(seconds=1800) == 0  # the others find its programs
    began, expected = time.monotonic(), tmp_path / "expected"
    begin(expected).succeed()
    longest = time.monotonic() - began
    assert len([row for row in facts(expected) if "loss" in row]) == STEPS

    lived: list[float] = []
    resumed, rounds, finished = 0, 0, False
    while len(lived) < kills or not finished:
        workdir = tmp_path / f"round{rounds}"
        resumed += bool(steps(workdir))
        began, running, seconds = time.monotonic(), begin(workdir), draw.uniform(0, longest)
        if len(lived) < kills:
            running.process.join(seconds)
        else:
            running.wait()
        finished = running.process.exitcode is not None
        if not finished:
            running.send(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
            lived.append(seconds)
        if finished:
            running.succeed()
            longest = min(longest, time.monotonic() - began)  # or, on a busy machine, few would still be there to kill
            assert facts(workdir) == facts(expected), f"seed {seed}"
            for got, want in zip(*(jax.tree.leaves(checkpoint.load(d)) for d in (workdir, expected)), strict=True):
                np.testing.assert_array_equal(got, want)
            rounds += 1
    print(f"{len(lived)} kills after {min(lived):.1f} to {max(lived):.1f} s, {resumed} starts that resumed, "
          f"{rounds} runs finished, all with the losses, evaluations and parameters of one that was not killed; "
          f"seed {seed}")  # fmt: skip
