"""What a run survives in one process: updates that are not finite, signals, full disks, damaged checkpoints."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from line_task import BATCH, LineTask, config_of, run

from clip_jax.data.pipeline import Stream
from clip_jax.errors import CheckpointError, TrainingError
from clip_jax.training import checkpoint
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.guard import SPIKES_FROM, judge, new_guard
from clip_jax.training.metrics import MetricsWriter, read_metrics
from clip_jax.training.preemption import StoppedError

TIMED = {"step_seconds", "examples_per_second", "data_wait_share", "memory_bytes", "goodput", "restarts"}


def facts(workdir: Path) -> list[dict[str, float]]:
    """The rows without what depends on time."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(workdir)]


def steps(workdir: Path) -> list[int]:
    return Checkpointer(workdir / "checkpoints", 0).steps()


def weights(state: Any) -> np.ndarray:
    return np.asarray(state.params["line"]["w"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir


class TwoInTurn(LineTask):
    """Two streams that take turns, the second with the first's examples negated."""

    schedule = "round_robin"

    def __init__(self, during: Callable[[int], None] = lambda n: None) -> None:
        super().__init__(during=during)
        self.read: dict[str, set[int]] = {"a": set(), "b": set()}

    def streams(self) -> Mapping[str, Stream]:
        line = super().streams()["points"].element

        def stream(name: str, sign: float) -> Stream:
            def element(position: int) -> dict[str, np.ndarray]:
                self.read[name].add(position // BATCH)
                return {key: sign * value for key, value in line(position).items()}

            return Stream(element, BATCH)

        return {"a": stream("a", 1.0), "b": stream("b", -1.0)}


def test_streams_in_turn_read_only_what_they_train_on(tmp_path: Path) -> None:
    task, prefetch = TwoInTurn(), 2
    run(tmp_path / "whole", task, steps=11, data__prefetch=prefetch)
    assert set(range(6)) <= task.read["a"] <= set(range(6 + prefetch + 1))
    assert set(range(5)) <= task.read["b"] <= set(range(5 + prefetch + 1))
    for cut in (3, 8):

        def stops(step: int, cut: int = cut) -> None:
            if step == cut:
                os.kill(os.getpid(), signal.SIGTERM)

        workdir = tmp_path / str(cut)
        assert int(run(workdir, TwoInTurn(stops), steps=11).step) == cut + 1
        run(workdir, TwoInTurn(), steps=11)
        assert facts(workdir) == facts(tmp_path / "whole")


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e30])
def test_an_update_that_is_not_finite_is_skipped(tmp_path: Path, factor: float, caplog: Any) -> None:
    spoilt = run(tmp_path, LineTask(lambda step: factor if step == 3 else 1.0), steps=4, checkpoint_every=3)
    # As if the third update had never been: Adam and the learning rate have counted three of them.
    assert int(spoilt.guard.skipped) == 1 and int(spoilt.guard.accepted) == 3  # type: ignore[union-attr]
    assert int(spoilt.opt_state[1].count) == 3 and np.isfinite(weights(spoilt)).all()
    rows = {int(row["step"]): row for row in read_metrics(tmp_path) if "evaluation/w0" not in row}
    assert "loss" not in rows[3] and [rows[s]["skipped_updates"] for s in (2, 3, 4)] == [0, 1, 1]
    assert "update skipped, 1 in a row" in caplog.text
    assert steps(tmp_path) == [4]  # the save of step 3 waited for a good update
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_too_many_in_a_row_stop_the_run_and_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 5: loss nan.*3 updates skipped in a row; .*00000002$"):
        run(tmp_path, LineTask(lambda step: np.nan if step > 2 else 1.0), checkpoint_every=1, guard__stop_after=3)
    assert steps(tmp_path) == [1, 2]


def test_a_spike_is_skipped_where_that_is_asked_for() -> None:
    guard, norms = new_guard(), [*np.linspace(1.0, 2.0, SPIKES_FROM + 5), 5.0, 100.0, 4.0]
    step = jax.jit(judge, static_argnums=3)
    goods = {}
    for factor in (0.0, 3.0):
        guard, found = new_guard(), []
        for norm in norms:
            good, guard = step(guard, jnp.float32(1), jnp.float32(norm), factor)
            found.append(bool(good))
        goods[factor] = found
    assert all(goods[0.0])
    assert all(goods[3.0][:-3]) and goods[3.0][-3:] == [False, False, True]  # the mean is about 1.6
    assert int(guard.skipped) == 2 and int(guard.in_a_row) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    def signalled(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a second one changes nothing

    before = signal.getsignal(number)
    stopped = run(tmp_path, LineTask(during=signalled), checkpoint_every=100)
    assert int(stopped.step) == 4 and steps(tmp_path) == [4]
    assert signal.getsignal(number) == before
    run(tmp_path, checkpoint_every=100)
    assert facts(tmp_path) == facts(whole)


class LongEvaluation(LineTask):
    """Whose evaluation is asked to stop after `batch` batches of ten."""

    def __init__(self, step: int, batch: int = 3):
        super().__init__()
        self.step, self.batch, self.embedded = step, batch, 0

    def evaluate(self, params: Any, state: Any, mesh: Any, between: Callable[[], None]) -> dict[str, float]:
        for number in range(1, 11):
            between()
            self.embedded += 1
            if (self.evaluations + 1, number) == (self.step, self.batch):
                os.kill(os.getpid(), signal.SIGTERM)
        return super().evaluate(params, state, mesh, between)


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_a_signal_during_an_evaluation_is_not_made_to_wait_for_its_end(
    tmp_path: Path, whole: Path, checkpoint_every: int
) -> None:
    task = LongEvaluation(step=3)
    stopped = run(tmp_path, task, checkpoint_every=checkpoint_every)
    assert int(stopped.step) == 3 and task.embedded == 2 * 10 + 3 and steps(tmp_path)[-1] == 3
    run(tmp_path, checkpoint_every=100)
    assert facts(tmp_path) == facts(whole)


def test_a_signal_during_the_last_evaluation_leaves_it_to_the_next_start(tmp_path: Path, whole: Path) -> None:
    for _ in range(2):  # the second is stopped while it makes up for what the first left
        with pytest.raises(StoppedError):
            run(tmp_path, LongEvaluation(step=6 if not steps(tmp_path) else 1))
        assert steps(tmp_path)[-1] == 6 and "evaluation/w0" not in read_metrics(tmp_path)[-1]
    run(tmp_path)
    assert facts(tmp_path) == facts(whole)


@pytest.fixture
def limit() -> Iterator[Callable[[int | None], None]]:
    """Sets how long a file can get, as a full disk does to every writer; None: as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    set_limit(None)


def test_on_a_full_disk_the_run_goes_on_and_says_so(tmp_path: Path, limit: Callable, caplog: Any) -> None:
    sizes = {3: 1000, 7: None}
    during = LineTask(during=lambda step: limit(sizes[step]) if step in sizes else None)
    run(tmp_path, during, steps=9, checkpoint_every=1, keep=100)
    assert "NOT SAVED" in caplog.text and "The run goes on; finished checkpoints: 1, 2" in caplog.text
    found = steps(tmp_path)
    assert set(found) - {3, 7} == {1, 2, 8, 9}  # those in between failed
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {f"{step:08d}" for step in found}
    for step in found:
        checkpoint.verify(tmp_path / "checkpoints" / f"{step:08d}")
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]  # none is missing, none is cut off
    assert [row["step"] for row in rows] == list(range(1, 10)) and rows[-1]["failed_saves"] >= 3


def test_a_last_save_that_fails_is_an_error(tmp_path: Path, limit: Callable) -> None:
    limit(1000)
    with pytest.raises(CheckpointError, match="saving a checkpoint failed"):
        run(tmp_path, steps=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_metrics_and_curves_wait_for_room(tmp_path: Path, limit: Callable, caplog: Any) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    for size, step in ((40, 2), (40, 3), (None, 4)):
        limit(size)
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert "kept until it can" in caplog.text and "tensorboard can't be written" in caplog.text
    assert len(list((tmp_path / "tensorboard").iterdir())) > 1


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def test_processes_share_out_the_verification(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest, read = checkpoint.latest(whole), checkpoint._digest, dict[int, list[Path]]()
    files = [path / name for name in json.loads((path / checkpoint.MANIFEST).read_text())["files"]]
    others = len(files)  # what the other process found: nothing
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", lambda mine: np.array([mine, others]))
    for index in (0, 1):
        mine = read[index] = []
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(checkpoint, "_digest", lambda file, mine=mine: (mine.append(file), digest(file))[1])
        checkpoint.verify(path, together=True)
    assert sorted(read[0] + read[1]) == sorted(files) and abs(len(read[0]) - len(read[1])) <= 1
    others = 3
    with pytest.raises(CheckpointError, match=f"{files[3].name}: damaged, as another process sees it"):
        checkpoint.verify(path, together=True)


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_every_file_of_a_checkpoint_is_watched_over(whole: Path, how: str) -> None:
    path = checkpoint.latest(whole)
    files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 10
    for file in files:
        kept = file.read_bytes()
        damage(file, how)
        with pytest.raises(CheckpointError) as error:
            checkpoint.verify(path)
        assert str(file) in str(error.value) or file.name == checkpoint.MANIFEST
        file.write_bytes(kept)
    checkpoint.verify(path)


def test_no_byte_of_a_manifest_can_change_unnoticed_or_crash_the_search(whole: Path) -> None:
    path = checkpoint.latest(whole)
    manifest = path / checkpoint.MANIFEST
    kept = manifest.read_bytes()
    for i in range(0, len(kept), 7):
        manifest.write_bytes(kept[:i] + bytes([kept[i] ^ 0x10]) + kept[i + 1 :])
        if chr(kept[i]).isspace() and i + 1 < len(kept):
            continue  # between the words of JSON
        with pytest.raises(CheckpointError):
            checkpoint.verify(path)
    for text in ("", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {}, "frozen": []}'):
        manifest.write_text(text)
        with pytest.raises(CheckpointError):
            checkpoint.verify(path)
    manifest.write_bytes(kept)
    checkpoint.verify(path)


def test_a_save_interrupted_at_any_byte_leaves_the_one_before_in_force(tmp_path: Path, whole: Path) -> None:
    """The newest checkpoint's files, in the order in which they were written, the last of them cut off."""
    newest = checkpoint.latest(whole)
    files = sorted((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_mtime_ns)
    assert files[-1].name == checkpoint.MANIFEST
    before = steps(whole)[-2]
    for written in range(len(files)):
        copy = tmp_path / str(written)
        shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(newest.name, "tensorboard"))
        for file in files[: written + 1]:
            where = copy / "checkpoints" / newest.name / file.relative_to(newest)
            where.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, where)
        if written < len(files) - 1:
            where.write_bytes(where.read_bytes()[: where.stat().st_size // 2])
        else:  # a manifest is renamed when it is whole
            where.rename(where.with_name(where.name + ".tmp"))
        assert steps(copy)[-1] == before
    run(copy)  # from there to the same end
    assert facts(copy) == facts(whole)


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path, whole: Path) -> None:
    def killed(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, LineTask(during=killed))
    while steps(tmp_path)[-1:] != [6]:  # saved in a thread of its own
        time.sleep(0.01)
    run(tmp_path)
    assert facts(tmp_path) == facts(whole)


def test_retention_by_count_and_by_interval(tmp_path: Path) -> None:
    run(tmp_path, steps=9, checkpoint_every=1, keep=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9]


def test_keys_that_change_nothing_may_change(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    run(tmp_path, steps=1, keep=7, keep_every=3, guard__stop_after=5, watchdog__step_seconds=1.0, profile__steps="1:1")
    with pytest.raises(TrainingError, match=r"guard.spike_factor is 0.0 there and 3.0 here"):
        run(tmp_path, steps=1, guard__spike_factor=3.0)
    assert "keep" in config_of()
