"""Whole runs: killed and resumed to the same bits, stopped by what is wrong."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
from conftest import DEVICES
from processes import Running

CONFIG = "configs/clip/quickstart.py:debug"
STEPS = 12
RUN = ("--config.steps=12", "--config.checkpoint_every=3", "--config.optimizer.warmup_steps=2")
MESH_OF_8 = ("--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def environment(devices: int) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"count={DEVICES}", f"count={devices}")}


@dataclass(frozen=True)
class Done:
    """What a process left, as `subprocess.run` says it; its two outputs are one."""

    returncode: int
    stderr: str


def begin(workdir: Path, *flags: str, devices: int, config: str) -> Running:
    workdir.parent.mkdir(parents=True, exist_ok=True)
    flags = ("--config", config, "--workdir", str(workdir), *flags)
    return processes.start(workdir.with_name(f"{workdir.name}.log"), *flags, devices=devices)


def train(workdir: Path, *flags: str, devices: int = 1, config: str = CONFIG) -> Done:
    running = begin(workdir, *flags, devices=devices, config=config)
    return Done(running.wait(), running.text())


def rows(
    workdir: Path, keys: tuple[str, ...] = ("step", "loss", "gradient_norm", "logit_scale")
) -> list[dict[str, float]]:
    """Figures of every step, as written: float32 values survive JSON exactly."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: row[k] for k in keys} for row in parsed if "loss" in row]


def kill_after(workdir: Path, step: int, devices: int, *flags: str, config: str = CONFIG) -> None:
    """SIGKILL as soon as a step is logged."""
    running = begin(workdir, *flags, devices=devices, config=config)
    deadline = time.monotonic() + 300
    while running.process.is_alive() and time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(workdir, ("step",))):
            running.send(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert running.wait() == -signal.SIGKILL, "the run ended before it was killed"


@pytest.mark.slow
def test_killed_and_resumed_the_losses_are_the_same_bits(tmp_path: Path) -> None:
    """On one device: tests/multiprocess/test_kills.py."""
    devices, flags = 8, RUN + MESH_OF_8
    whole = train(tmp_path / "whole", *flags, devices=devices)
    assert whole.returncode == 0, whole.stderr[-2000:]
    expected = rows(tmp_path / "whole")
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))

    killed = tmp_path / "killed"
    kill_after(killed, 4, devices, *flags)
    kill_after(killed, 7, devices, *flags)  # around the second checkpoint: finished or half-written
    last = train(killed, *flags, devices=devices)
    assert last.returncode == 0, last.stderr[-2000:]
    assert "resuming at step" in last.stderr
    assert rows(killed) == expected

    again = train(killed, *flags, devices=devices)
    assert again.returncode == 0 and f"all {STEPS} steps are done" in again.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    done = train(tmp_path, *RUN, "--config.optimizer.lr=1e38", "--config.optimizer.clip_norm=0.0",
                 "--config.optimizer.warmup_steps=7", "--config.checkpoint_every=1",
                 "--config.guard.stop_after=3")  # fmt: skip
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: step ") and "training stopped, the last good checkpoint is" in line, line
    assert "Traceback" not in done.stderr
    kept = Path(line.rsplit(" ", 1)[1])
    assert (kept / "manifest.json").is_file()
    assert int(kept.name) < int(line.split("step ")[1].split(":")[0])


@pytest.mark.slow
def test_a_second_run_in_the_same_place_is_refused_what_does_not_fit(tmp_path: Path) -> None:
    assert train(tmp_path).returncode == 0
    other = train(tmp_path, "--config.optimizer.lr=0.5")
    assert other.returncode == 1
    lr = json.loads((tmp_path / "config.json").read_text())["optimizer"]["lr"]
    assert f"trained with another config: optimizer.lr is {lr!r} there and 0.5 here" in other.stderr
    assert train(tmp_path, "--config.log_every=7").returncode == 0  # nothing that is computed depends on it

    (tmp_path / "config.json").unlink()
    vit = train(tmp_path, config="configs/clip/emoji_vit.py:debug")
    assert vit.returncode == 1
    assert "error: " in vit.stderr.splitlines()[-1] and "a checkpoint of another architecture" in vit.stderr


@pytest.mark.slow
def test_a_tower_moves_into_a_new_run(tmp_path: Path) -> None:
    import numpy as np

    from clip_jax.training import checkpoint

    assert train(tmp_path / "first").returncode == 0
    second = train(tmp_path / "second", f"--config.init.vision={tmp_path / 'first'}", "--config.frozen=('vision/',)")
    assert second.returncode == 0, second.stderr[-2000:]
    a, b = (checkpoint.load(tmp_path / run, "params/vision/stem_conv1/kernel") for run in ("first", "second"))
    np.testing.assert_array_equal(a, b)  # frozen, so it never changed
