"""What a run tells of itself: figures, curves, goodput across restarts, a profile, the plan beside the measurement."""

import gzip
import json
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from line_task import BATCH, run
from tensorboardX.proto.event_pb2 import Event

from clip_jax.errors import ConfigError
from clip_jax.training import goodput, meter
from clip_jax.training.goodput import Goodput
from clip_jax.training.meter import Meter
from clip_jax.training.metrics import read_metrics
from configs.clip import emoji_vit
from launch.planning import ideal
from launch.planning.hardware import CHIPS
from launch.tasks import build_task

PLAN = {"topology": "v5p:2x2x1", "chips": 1, "batch": {"points": BATCH}, "step_seconds": 1.25, "mfu": 0.5,
        "examples_per_second": 3.2, "peak_bytes": 1e9, "fits": True}  # fmt: skip


def events(workdir: Path) -> Iterator[Event]:
    """TensorBoard's records: length, its checksum, an event, its checksum."""
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_a_row_says_how_fast_and_what_was_predicted(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    run(tmp_path, steps=3, ideal_seconds=1e-6)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["examples_per_second"] == pytest.approx(BATCH / row["step_seconds"])
        assert row["mfu"] == pytest.approx(1e-6 / row["step_seconds"])
        assert 0 <= row["data_wait_share"] <= 1 and 0 < row["goodput"] <= 1 and row["restarts"] == 0
        assert row["memory_bytes"] > 0  # the program's: a CPU doesn't tell
        assert (row["plan/step_seconds"], row["plan/mfu"], row["plan/memory_bytes"]) == (1.25, 0.5, 1e9)
    shown = capsys.readouterr().out
    assert "(plan 1.25)" in shown and "failed_saves" not in shown

    curves = {
        (value.tag, event.step): value.simple_value for event in events(tmp_path) for value in event.summary.value
    }
    for row in rows:
        for name in ("loss", "step_seconds", "plan/mfu"):
            assert curves[name, int(row["step"])] == pytest.approx(row[name])


def test_a_plan_of_something_else_is_not_compared(tmp_path: Path, caplog: Any) -> None:
    other = tmp_path / "other.json"
    wrong = [PLAN | {"chips": 0}, PLAN | {"batch": None}, {key: PLAN[key] for key in PLAN if key != "topology"}]
    for content in ("[]", "{", '{"step_seconds": null}', *map(json.dumps, wrong)):
        other.write_text(content)
        with pytest.raises(ConfigError, match=r"plan .*other.json: "):
            run(tmp_path / "run", plan=str(other))
    with pytest.raises(ConfigError, match=r"plan .*missing.json: .*No such file"):
        run(tmp_path / "run", plan=str(tmp_path / "missing.json"))
    other.write_text(json.dumps(PLAN | {"batch": {"points": 8}}))
    run(tmp_path / "run", plan=str(other), steps=1)
    assert "not compared" in caplog.text and "plan/mfu" not in read_metrics(tmp_path / "run")[0]


def test_goodput_counts_what_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    first = Goodput(tmp_path, 0)
    first.add(30.0)
    first.saved(10, [])
    first.add(20.0)  # after the last save: a kill undoes it
    now[0] += 100
    assert first.figures() == {"goodput": 0.5, "restarts": 0.0}

    second = Goodput(tmp_path, 10)
    assert second.figures() == {"goodput": 0.3, "restarts": 1.0}
    second.add(20.0)
    second.saved(20, [10])
    now[0] += 100
    assert Goodput(tmp_path, 20).figures() == {"goodput": 0.25, "restarts": 2.0}
    assert Goodput(tmp_path, 10).figures()["goodput"] == 0.15  # the newest checkpoint was damaged
    (tmp_path / goodput.FILE).write_text("{")
    assert Goodput(tmp_path, 10).figures() == {"goodput": 0.0, "restarts": 0.0}


def test_pauses_and_waiting_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    watch = Meter(10, 8, Goodput(tmp_path, 0), None)
    with watch.waiting():
        now[0] += 1
    now[0] += 7
    with watch.pause():
        now[0] += 100
    watch.lap()  # a save between the rows
    now[0] += 2
    found = watch.figures(12)
    assert (found["step_seconds"], found["examples_per_second"], found["data_wait_share"]) == (5.0, 1.6, 0.1)
    assert found["goodput"] == pytest.approx(9 / 110) and "mfu" not in found


def test_a_profile_opens_in_perfetto_and_xprof(tmp_path: Path) -> None:
    run(tmp_path, steps=5, profile__steps="3:4", evaluate_every=0)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert rows and all(
        "mfu" not in row and row["memory_bytes"] > 0 for row in rows
    )  # a CPU has no peak to compare with
    (directory,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    (plane,) = directory.glob("*.xplane.pb")
    events = [e for p in ProfileData.from_file(str(plane)).planes for line in p.lines for e in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [3, 4]
    assert any("train_step" in event.name for event in events)
    trace = json.loads(gzip.decompress((directory / "perfetto_trace.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert any("train_step" in name for name in names), names[:100]
    for spec in ("3", "4:3", "0:2", "a:b"):
        with pytest.raises(ConfigError, match=r"profile.steps .*expected FIRST:LAST"):
            run(tmp_path / "other", profile__steps=spec)


def test_weights_and_biases_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    opened: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**arguments: Any) -> Run:
        opened.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run(tmp_path, steps=2, wandb__project="emoji")
    assert [step for step, _ in logged] == [1, 1, 2, 2, -1]
    assert logged[0][1]["loss"] == read_metrics(tmp_path)[0]["loss"]
    assert opened[0]["project"] == "emoji" and opened[0]["config"]["steps"] == 2
    run(tmp_path, steps=2, wandb__project="emoji")
    assert opened[1]["id"] == opened[0]["id"] and opened[1]["resume"] == "allow"
    run(tmp_path / "other" / tmp_path.name, steps=2, wandb__project="emoji")
    assert opened[2]["id"] != opened[0]["id"]

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install '.\[wandb\]'"):
        run(tmp_path, steps=2, wandb__project="emoji")


def test_the_ideal_step_is_that_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ideal.peak_flops("cpu") is None
    assert ideal.peak_flops("TPU v5 lite") == CHIPS["v5e"].flops
    assert ideal.peak_flops("TPU7x") == CHIPS["tpu7x"].flops / 2
    assert ideal.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert set(ideal.TPUS.values()) == set(CHIPS)

    config = emoji_vit.get_config("debug")
    assert ideal.ideal_seconds(config, build_task, jax.devices()) is None
    monkeypatch.setattr(ideal, "peak_flops", lambda kind: 1e12)
    eight = ideal.ideal_seconds(config, build_task, jax.devices())
    assert eight is not None
    # About 6 operations for each parameter and token (less for the text embedding, which is looked up).
    vision, text = config.model.vision, config.model.text
    tokens = config.batch_size * ((vision.image_size // vision.patch_size) ** 2 + text.context_length)
    assert 0.1 < eight * 8e12 / (6 * tokens * 80_000) < 1.5


def test_memory_is_what_the_device_or_the_program_says() -> None:
    compiled = jax.jit(lambda x: x @ x).lower(jnp.zeros((64, 64))).compile()
    assert meter.program_bytes(compiled) >= 2 * 64 * 64 * 4
    assert meter.peak_bytes(jax.devices()) == 0  # CPUs don't tell
    told = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (3, 5)]
    assert meter.peak_bytes(told) == 5
