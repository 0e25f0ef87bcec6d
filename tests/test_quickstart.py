"""The whole quickstart at toy scale, as a new user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CACHE, ROOT
from test_training import environment

import flamingo_jax
from launch import quickstart

STAGES = ("train clip", "evaluate clip", "train language_model", "train flamingo", "evaluate flamingo", "report")


def run(workdir: Path, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.quickstart", "--mode", "debug", "--workdir", str(workdir), *more],
        cwd=ROOT, env=environment(1) | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_trains_evaluates_reports_and_knows_when_it_is_done(tmp_path: Path) -> None:
    printed = run(tmp_path)
    for number, stage in enumerate(STAGES, 1):
        assert re.search(rf"\[{number}/6\] {stage}: python -m launch\.{stage.split()[0]} ", printed), stage
    summary = json.loads((tmp_path / "summary.json").read_text())
    for source in ("held_out_style", "unseen_concepts", "unseen_concepts_held_out_style"):
        figures = summary["clip"][source]
        for key in ("top1", "top5", "recall_at_5", "image_to_text_recall_at_5"):
            assert 0 <= figures[key] <= 1 and 0 < figures["chance"][key] < 0.1, (source, key)
    answers, captions = summary["flamingo"]["answers"], summary["flamingo"]["captions"]
    for figures in (answers, answers["shots_0"], answers["shots_4"]):
        assert all(0 <= figures[f"{images}_images"] <= 1 for images in ("true", "shuffled", "no"))
        low, high = figures["interval"]
        assert low <= figures["true_images"] - figures["shuffled_images"] <= high
    assert 0.1 < answers["chance"]["all"] < 0.5 and {"shots_0", "shots_4"} <= captions.keys()
    assert summary["language_model"]["held_out"]["loss"] < 9 and summary["flamingo"]["loss"]["true"] < 9
    assert {*STAGES[:-1], "total"} <= set(summary["seconds"])  # the report's own are not over yet
    assert summary["clip"]["training"]["steps"] == 4

    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:image/webp;base64,") > 50 and "data:image/png;base64," in page
    assert f"{100 * summary['clip']['held_out_style']['top1']:.1f} %" in page
    assert len(page) < 3_000_000

    model = flamingo_jax.load(tmp_path / "flamingo")
    pictures = np.zeros((1, 1, *[model.preprocess.image_size] * 2, 3), np.uint8)
    batch = model.make_batch(pictures, [[*model.tokenizer.start_ids, *model.tokenizer.encode("<image>Output:")]])
    assert model.metadata["step"] == 4 and np.isfinite(model.logits(model.params, batch)).all()

    trained = (tmp_path / "clip" / "metrics.jsonl").stat().st_mtime_ns
    assert json.loads(run(tmp_path, "--json")) == summary  # and nothing else on stdout
    again = run(tmp_path)
    assert "\n".join(f"[{i}/6] {stage}: done" for i, stage in enumerate(STAGES, 1)) in again and "all done" in again
    assert (tmp_path / "clip" / "metrics.jsonl").stat().st_mtime_ns == trained

    (tmp_path / "report.html").unlink()
    third = run(tmp_path)
    assert "[5/6] evaluate flamingo: done" in third and "[6/6] report: python -m launch.report" in third
    assert json.loads((tmp_path / "summary.json").read_text())["clip"] == summary["clip"]


@pytest.mark.slow
def test_ctrl_c_is_heard_by_the_training_which_saves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.quickstart", "--mode", "debug", "--workdir", str(tmp_path)],
        cwd=ROOT, env=environment(1) | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "clip" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == quickstart.STOPPED, errors[-2000:]
    assert "[1/6] train clip: stopped with exit code 75; `make quickstart` goes on from here" in errors
    assert "Traceback" not in errors and quickstart.newest_step(tmp_path / "clip") > 0


def test_a_signal_to_the_quickstart_alone_is_passed_on(tmp_path: Path) -> None:
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    (tmp_path / "stage_that_waits.py").write_text(code)
    stage = quickstart.Stage("wait", ("stage_that_waits",), lambda: False)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert quickstart.run(stage, tmp_path / "seconds.json") == -signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_seconds_add_up_over_interrupted_runs(tmp_path: Path) -> None:
    seconds = tmp_path / "seconds.json"
    stage = quickstart.Stage("train", ("this_module_does_not_exist",), lambda: False)
    assert quickstart.run(stage, seconds) != 0
    first = json.loads(seconds.read_text())["train"]
    seconds.write_text('{"train": 100.0, "evaluate": 5.0}')
    quickstart.run(stage, seconds)
    now = json.loads(seconds.read_text())
    assert first >= 0 and now["train"] >= 100.0 and now["evaluate"] == 5.0


def test_an_unfinished_checkpoint_is_no_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"steps": 4}')
    (tmp_path / "checkpoints" / "00000004").mkdir(parents=True)
    assert not quickstart.is_trained(tmp_path)
    (tmp_path / "checkpoints" / "00000004" / "manifest.json").write_text("{}")
    assert quickstart.is_trained(tmp_path)
