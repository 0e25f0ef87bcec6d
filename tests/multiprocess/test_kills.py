"""Runs that are killed at random times, during their start, too, and started again until they are done."""

import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import start
from test_surviving import facts

from clip_jax.training import checkpoint
from clip_jax.training.metrics import read_metrics

FLAGS = ("--config=tests/multiprocess/tiny.py", "--config.checkpoint_every=2", "--config.steps=40")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slowest)])
def test_random_kills_lose_nothing(tmp_path: Path, kills: int) -> None:
    seed = random.randrange(2**32)
    draw, expected = random.Random(seed), tmp_path / "expected"
    start(tmp_path / "log", *FLAGS, f"--workdir={tmp_path / 'compiled'}").succeed()  # the rest finds its programs
    began = time.monotonic()
    start(tmp_path / "log", *FLAGS, f"--workdir={expected}").succeed()
    longest = time.monotonic() - began
    assert len([row for row in facts(expected) if "loss" in row]) == 40

    lived: list[float] = []
    resumed, rounds, finished = 0, 0, False
    while len(lived) < kills or not finished:
        workdir = tmp_path / f"round{rounds}"
        running = start(tmp_path / "log", *FLAGS, f"--workdir={workdir}")
        seconds = draw.uniform(0, longest) if len(lived) < kills else 300
        running.process.join(seconds)
        finished = running.process.exitcode is not None
        if not finished:
            running.send(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
            lived.append(seconds)
        resumed += "resuming at" in running.text()
        if finished:
            running.succeed()
            assert facts(workdir) == facts(expected), f"seed {seed}"
            for got, want in zip(*(jax.tree.leaves(checkpoint.load(d)) for d in (workdir, expected)), strict=True):
                np.testing.assert_array_equal(got, want)
            last = read_metrics(workdir)[-2]
            assert last["step"] == 40 and last["goodput"] < 1
            rounds += 1
    print(f"{len(lived)} kills after {min(lived):.1f} to {max(lived):.1f} s, {resumed} starts that resumed, "
          f"{rounds} runs finished, all with the losses, evaluations and parameters of one that was not killed; "
          f"seed {seed}")  # fmt: skip
