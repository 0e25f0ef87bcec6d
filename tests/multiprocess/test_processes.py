"""Runs of several processes: the same figures, the same step to stop at, and nobody left waiting."""

import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from line_task import LineTask, run, run_together
from processes import Running, launch_train, start, start_several
from test_flamingo_task import flags_of, runs  # noqa: F401  (a fixture)
from test_surviving import facts, steps

from clip_jax.training import checkpoint

MESH = ("--config.mesh.replica=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=4")  # over all of the processes
OTHER_MESH = ("--config.mesh.replica=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
CLIP: tuple[str, ...] = ("--config=tests/multiprocess/tiny.py", "--config.evaluate_every=0")


def slow_train() -> None:
    """Gives signals the time to come between two steps."""
    from clip_jax.training.preemption import Preemption

    reached = Preemption.reached

    def later(self: Preemption) -> bool:
        time.sleep(0.4)
        return reached(self)

    Preemption.reached = later  # type: ignore[method-assign]
    launch_train()


def stop(running: list[Running]) -> int:
    """SIGTERM to the last process after its first step, and again. All stop at the same step, which is returned."""
    running[0].wait_for("gradient_norm")
    for _ in range(2):
        running[-1].send(signal.SIGTERM)
    for process in running:
        process.succeed()
    (step,) = {int(step) for r in running for step in re.findall(r"stopped at step (\d+) of 12", r.text())}
    return step


def check(workdir: Path, whole: Path) -> None:
    got, expected = facts(workdir), facts(whole)
    assert len(got) == len(expected) > 10
    for row, want in zip(got, expected, strict=True):
        assert row.keys() == want.keys()
        for key in want:
            if "loss" in key or key in ("step", "gradient_norm"):
                assert abs(row[key] - want[key]) <= 1e-5 * abs(want[key]), (key, row, want)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "family", ["clip", *(pytest.param(f, marks=pytest.mark.slowest) for f in ("siglip", "flamingo"))]
)
def test_a_run_moves_from_four_processes_to_two_and_to_one(
    tmp_path: Path, request: pytest.FixtureRequest, family: str
) -> None:
    flags = CLIP
    if family == "siglip":
        flags += ("--config.loss=sigmoid",)
    if family == "flamingo":
        flags = ("--config=configs/flamingo/quickstart.py:debug", *flags_of(request.getfixturevalue("runs")),
                 "--config.steps=12", "--config.evaluation.quick=0")  # fmt: skip
    flags += ("--config.checkpoint_every=1", "--config.keep=100")
    whole, moved, log = tmp_path / "whole", tmp_path / "moved", tmp_path / "log"
    start(log, *flags, *OTHER_MESH, f"--workdir={whole}", devices=4).succeed()

    flags += (f"--workdir={moved}",)
    first = stop(start_several(4, log, *flags, *MESH, devices=1, main=slow_train))
    assert steps(moved) == list(range(1, first + 1))
    second = stop(start_several(2, log, *flags, *OTHER_MESH, devices=2, main=slow_train))
    assert first < second < 12 and steps(moved)[-1] == second
    start(log, *flags, devices=1).succeed()
    check(moved, whole)

    # Adam's first moment after one step is the gradient: of every parameter the same.
    moments = [
        {jax.tree_util.keystr(path): np.asarray(leaf)
         for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.load(d / "checkpoints" / "00000001", "train"))
         if "mu" in jax.tree_util.keystr(path)}
        for d in (moved, whole)
    ]  # fmt: skip
    assert len(moments[1]) > 10
    largest = max(np.abs(leaf).max() for leaf in moments[1].values())
    for path, want in moments[1].items():
        assert np.abs(moments[0][path] - want).max() <= 1e-5 * largest, path


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_died(tmp_path: Path) -> None:
    both = start_several(2, tmp_path / "log", *CLIP, f"--workdir={tmp_path / 'run'}", devices=1, main=slow_train)
    both[0].wait_for("gradient_norm")
    both[1].send(signal.SIGKILL)
    assert both[0].wait(seconds=60) not in (0, None)
    assert both[1].wait() == -signal.SIGKILL


def hang_together(workdir: str) -> None:
    """Many steps; says when the fifth is over."""

    def during(n: int) -> None:
        time.sleep(0.1)
        if n == 5:
            print("the fifth step", flush=True)

    run_together(Path(workdir), LineTask(during=during), steps=1000, watchdog__step_seconds=6.0)


@pytest.mark.parametrize("hung", [0, pytest.param(1, marks=pytest.mark.slowest)])
def test_nobody_waits_for_a_process_that_hangs(tmp_path: Path, hung: int) -> None:
    both = start_several(2, tmp_path / "log", devices=1, main=hang_together, arguments=[str(tmp_path / "run")])
    both[0].wait_for("the fifth step")
    both[hung].send(signal.SIGSTOP)
    # In a step the watchdog ends it, with all stacks; between two, where more time is given, JAX does, after a minute.
    code, text = both[1 - hung].wait(seconds=150), both[1 - hung].text()
    assert code in (1, -signal.SIGABRT)
    if code == 1:
        assert "Timeout (0:00:06)!" in text and text.count("Thread 0x") > 2 and "loop.py" in text
    both[hung].send(signal.SIGCONT)  # it finds itself late, or alone
    assert both[hung].wait(seconds=60) not in (0, None)
    assert steps(tmp_path / "run")  # what was saved stays


class LongEvaluation(LineTask):
    """At step 4 one of a thousand batches, of which the tenth is told; the others are short."""

    def evaluate(self, params: Any, state: Any, mesh: Any, between: Callable[[], None]) -> dict[str, float]:
        for batch in range(1000 if self.long else 1):
            between()
            time.sleep(0.05 if self.long else 0)
            if batch == 10:
                print("the tenth batch", flush=True)
        return super().evaluate(params, state, mesh, between)

    long = True


def evaluate_long(workdir: str) -> None:
    run_together(Path(workdir), LongEvaluation(), evaluate_every=4, checkpoint_every=3)


def evaluate_short(workdir: str) -> None:
    task = LongEvaluation()
    task.long = False
    run_together(Path(workdir), task, evaluate_every=4, checkpoint_every=3)


def test_a_signal_during_an_evaluation_stops_all_processes_between_two_batches(tmp_path: Path) -> None:
    both = start_several(2, tmp_path / "log", devices=1, main=evaluate_long, arguments=[str(tmp_path / "run")])
    both[0].wait_for("the tenth batch")
    both[1].send(signal.SIGTERM)
    for process in both:
        process.succeed()
        assert "the evaluation of step 4 is cut short" in process.text() and "stopped at step 4 of 6" in process.text()
    assert steps(tmp_path / "run") == [3, 4]
    for process in start_several(2, tmp_path / "log", devices=1, main=evaluate_short,
                                 arguments=[str(tmp_path / "run")]):  # fmt: skip
        process.succeed()
    run(tmp_path / "whole", evaluate_every=4, checkpoint_every=3)
    rows, expected = facts(tmp_path / "run"), facts(tmp_path / "whole")
    assert [int(row["step"]) for row in rows if "evaluation/w0" in row] == [4, 6]
    assert rows == [pytest.approx(row, rel=1e-5) for row in expected]


class SplitLine(LineTask):
    """Half of its weights in each of two processes."""

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        params, state = super().init(rng)
        return {"line": {"w": nn.LogicallyPartitioned(params["line"]["w"], ("embed",))}}, state


def fill_a_disk(workdir: str, full: int) -> None:
    """From the evaluation of step 3 to that of step 7 one process can't write."""

    def during(n: int) -> None:
        if n in (3, 7) and jax.process_index() == full:
            size = 1 if n == 3 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run_together(Path(workdir), SplitLine(during=during), steps=9, checkpoint_every=1, keep=100)


@pytest.mark.parametrize("full", [pytest.param(0, marks=pytest.mark.slowest), 1])
def test_where_one_process_alone_fails_a_save_all_go_on_and_say_so(tmp_path: Path, full: int) -> None:
    workdir = tmp_path / "run"
    both = start_several(2, tmp_path / "log", devices=1, main=fill_a_disk, arguments=[str(workdir), full])
    for process in both:
        process.succeed()
    found = steps(workdir)
    assert set(found) - {3, 7} == {1, 2, 8, 9}  # those in between failed
    for step in found:
        checkpoint.verify(workdir / "checkpoints" / f"{step:08d}")
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {f"{step:08d}" for step in found}
    other = both[1 - full].text()  # the full one's log has no room for more
    assert f"00000005: NOT SAVED: process {full} failed" in other
    assert "The run goes on; finished checkpoints: 1, 2" in other
    rows = [row for row in facts(workdir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10)) and rows[-1]["failed_saves"] >= 3


def hang(workdir: str) -> None:
    def spoil(step: int) -> float:
        if step == 4:
            time.sleep(1000)
        return 1.0

    run(Path(workdir), LineTask(spoil), watchdog__step_seconds=2.0)


def test_a_run_that_hangs_is_ended_with_all_stacks(tmp_path: Path) -> None:
    hung = start(tmp_path / "log", main=hang, arguments=[str(tmp_path / "run")])
    assert hung.wait(seconds=120) == 1
    assert "Timeout (0:00:02)!" in hung.text() and hung.text().count("Thread 0x") > 2
    assert "loop.py" in hung.text() and "line_task.py" in hung.text()  # who waits, and for what
    assert steps(tmp_path / "run")[-1:] in ([], [2])
