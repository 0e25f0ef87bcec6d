"""The planner on a whole training step, compiled for TPUs that are not here."""

import json
from dataclasses import replace
from pathlib import Path

import ml_collections
import pytest
from absl import flags
from absl.testing import flagsaver

from clip_jax.errors import ConfigError
from configs.clip import vit_b32, vit_l14_336
from configs.flamingo import smollm2
from launch import plan as command
from launch.planning import growth, hardware, report, search, step, table
from launch.planning.stand_in import without_data
from launch.tasks import build_task

TABLE = Path(table.__file__).with_suffix(".md")
MESSAGES = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (600.00G) exceeds "
    "available HBM (15.75G).": 600 * 2**30,
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.13G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.38G.": 20.13 * 2**30,
    "INVALID_ARGUMENT: something else": None,
}


@pytest.fixture(scope="module")
def config() -> ml_collections.ConfigDict:
    config = vit_b32.get_config("debug")
    config.micro_batches = 1
    config.model.vision.width = config.model.text.width = 128  # wide enough for the matrix unit
    config.batch_size = 256
    return config


@pytest.fixture(scope="module")
def plan(config: ml_collections.ConfigDict) -> step.Plan:
    return step.compile_step(config, hardware.parse("v5litepod-4"), build_task)


def test_a_step_is_compiled_and_counted(plan: step.Plan) -> None:
    assert plan.fits and plan.costs is not None
    assert plan.mesh == {"replica": 1, "fsdp": 4, "tensor": 1} and plan.batch == {"pairs": 256}
    assert 1 <= plan.costs.flops / plan.model_flops <= 1.05  # nothing is computed twice
    assert not plan.costs.uncounted_loops
    # Adam keeps two numbers for each parameter, a quarter of both on each chip, and a count.
    assert plan.memory.optimizer_state == pytest.approx(2 * plan.memory.trained_parameters, rel=1e-3)
    assert plan.memory.trained_parameters >= plan.trained  # 4 bytes of a quarter
    assert plan.memory.batch == 256 // 4 * (32 * 32 * 3 + 16 * 4)
    purposes = {(traffic.kind, traffic.purpose) for traffic in plan.costs.traffic}
    assert ("collective-permute", "passed on in the loss") in purposes


def test_the_figures_agree(plan: step.Plan) -> None:
    figures = json.loads(json.dumps(report.to_json(plan, price=2.0)))
    assert figures["fits"] and figures["peak_bytes"] == sum(figures["memory_bytes"].values()) < figures["hbm_bytes"]
    assert figures["mfu"] == pytest.approx(figures["model_flops_per_chip"] / figures["step_seconds"] / 197e12)
    assert figures["examples_per_second"] == pytest.approx(256 / figures["step_seconds"])
    assert figures["dollars"] == pytest.approx(2 * 4 * figures["steps"] * figures["step_seconds"] / 3600)
    assert sum(figures["collective_bytes"].values()) == pytest.approx(sum(c["bytes"] for c in figures["collectives"]))
    text = report.to_text(plan)
    assert "v5e:2x2: 4 chips" in text and "fits" in text and "at $1.20" in text


def test_what_does_not_fit_exits_with_1_and_a_suggestion(
    plan: step.Plan, config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = replace(plan.topology, chip=replace(plan.topology.chip, hbm_bytes=plan.memory.peak / 1.5))
    monkeypatch.setattr(command, "compile_step", lambda *_: replace(plan, topology=small, costs=None))
    file = tmp_path / "plan.json"
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(topology="v5e:2x2", json=str(file)), pytest.raises(SystemExit) as stop:
        command.main(config)
    assert stop.value.code and "try: keep only each block's input: --config.model." in str(stop.value.code)
    figures = json.loads(file.read_text())
    assert not figures["fits"] and figures["step_seconds"] is None and figures["peak_bytes"] > figures["hbm_bytes"]


def test_suggestions(plan: step.Plan) -> None:
    memory = replace(plan.memory, temporaries=20 * hardware.GiB)  # of 15.75
    full = replace(plan, memory=memory, costs=None)
    config = vit_l14_336.get_config()
    config.model.vision.remat = "none"
    assert report.suggestion(full, config) == "keep only each block's input: --config.model.vision.remat=full"
    config.model.vision.remat, config.batch_size = "full", 256
    assert report.suggestion(full, config) == "embed the batch in more parts: --config.micro_batches=2"
    tiny = replace(full, topology=replace(plan.topology, chip=replace(plan.topology.chip, hbm_bytes=1.0)))
    assert "a larger slice" in report.suggestion(tiny, config)
    spread = replace(tiny, mesh={"replica": 2, "fsdp": 2, "tensor": 1})
    assert "--config.mesh.replica=1" in report.suggestion(spread, config)


@pytest.mark.parametrize(("message", "used"), MESSAGES.items(), ids=("argument", "program", "other"))
def test_what_xla_says_where_memory_runs_out(message: str, used: float | None) -> None:
    assert step.used_memory(message) == used


def test_a_search_ranks_what_fits(
    plan: step.Plan, config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(config: ml_collections.ConfigDict, *_: object) -> step.Plan:
        if config.mesh.tensor == 4:
            raise ConfigError("4 heads")
        if config.model.vision.remat == "none" and config.micro_batches < 4:
            return replace(plan, costs=None)
        assert plan.costs is not None
        slower = 1 + (config.model.vision.remat == "full") + config.mesh.tensor
        return replace(plan, costs=replace(plan.costs, local_seconds=slower * plan.costs.step_seconds))

    monkeypatch.setattr(search, "compile_step", compiled)
    found = search.search(config, plan.topology, build_task)
    assert [result.plan.fits for result in found] == sorted((r.plan.fits for r in found), reverse=True)
    best = found[0]
    assert best.overrides["mesh.tensor"] == 1 and best.overrides["model.vision.remat"] != "full"
    tried = [r.overrides["micro_batches"] for r in found if r.overrides["model.vision.remat"] == "none"]
    assert set(tried) == {1, 2, 4}  # no more than it takes
    assert "--config.mesh.fsdp=4" in search.to_text(found)


def test_what_a_search_tries() -> None:
    config, topology = smollm2.get_config(), hardware.parse("v5e:4x4")
    config.mesh.tensor = 8
    shapes = [tuple(shape.values()) for shape in search.mesh_shapes(config, topology)]
    assert shapes == [(1, 2, 8), (1, 16, 1), (16, 1, 1), (2, 8, 1), (1, 8, 2), (1, 4, 4)]  # its own first
    # A Flamingo keeps its blocks' inputs or all, a pair of towers has a choice more, a config without any one.
    assert [list(choice.values()) for choice in search.remat_choices(config)] == [[False], [True]]
    assert len(list(search.remat_choices(vit_b32.get_config()))) == 3
    del config.model.remat
    assert list(search.remat_choices(config)) == [{}]


def test_a_tokenizer_that_is_not_there_has_a_stand_in() -> None:
    with without_data(smollm2.get_config()) as config:
        task = build_task(config, None)  # type: ignore[arg-type]
        assert task.tokenizer.vocab_size == config.model.language_model.vocab_size  # type: ignore[attr-defined]
        element = task.streams()["pairs"].element(0)
    assert element["media"].shape == (1, 1, 32, 32, 3) and element["text"].shape == (32,)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"libtpu, the compiler for TPUs, is missing: pip install '.\[tpu\]'"):
        _ = hardware.parse("v5e:2x2").devices


def test_the_table_of_growth_goes_on_where_it_stopped(
    plan: step.Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[int] = []

    def compile_step(config: ml_collections.ConfigDict, topology: hardware.Topology, _: object) -> step.Plan:
        if topology.chips == 512:
            raise KeyboardInterrupt
        compiled.append(config.batch_size)
        return replace(plan, topology=topology)

    monkeypatch.setattr(growth, "compile_step", compile_step)
    path = tmp_path / "growth.json"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            growth.write(path)
    assert compiled == [8 * 64, 64 * 64]
    head, *lines = path.with_suffix(".md").read_text().splitlines()
    assert head == "| a step | v5p:2x2x2, 8 chips | v5p:4x4x4, 64 chips |"
    sent = [line.split(" | ")[1:] for line in lines if line.startswith("| together | ") and "MB" in line]
    assert plan.costs is not None
    assert sent == [[f"{sum(t.bytes for t in plan.costs.traffic) / 1e6:,.0f} MB", sent[0][0] + " |"]]


def test_the_table_of_growth_is_of_the_config_that_is_there() -> None:
    done = json.loads(Path(growth.__file__).with_suffix(".json").read_text())
    assert {row.topology: row.digest() for row in growth.ROWS} == {name: plan["digest"] for name, plan in done.items()}


def test_every_row_of_the_table_of_plans_is_there_and_fits() -> None:
    done = table.read(TABLE)
    assert list(done) == [row.key for row in table.ROWS], "run make plan-table"
    assert {cells[4] for cells in done.values()} == {"yes"}


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: " ".join(row.key))
def test_no_row_of_the_table_of_plans_is_of_another_config(row: table.Row) -> None:
    assert table.read(TABLE)[row.key][-1] == row.digest(), "run make plan-table"


def test_a_digest_is_of_what_a_step_depends_on() -> None:
    row = table.Row("configs/clip/vit_b32.py", "v5e:2x4")
    same = replace(row, overrides="log_every=7 data.threads=3")
    others = [replace(row, topology="v5e:4x4"), replace(row, overrides="model.vision.remat=full"),
              replace(row, overrides="guard.spike_factor=3.0"), replace(row, overrides="batch_size=512")]  # fmt: skip
    assert same.digest() == row.digest()
    assert len({row.digest(), *(other.digest() for other in others)}) == 5


CHEAP = [row for row in table.ROWS if row.config == "configs/clip/vit_b32.py" or "remat=none" in row.overrides]
COMPILED_BY = pytest.mark.skipif(table.COLUMNS[-2] not in TABLE.read_text(), reason="the table is another JAX's")


@COMPILED_BY
@pytest.mark.slow
@pytest.mark.parametrize("row", CHEAP, ids=lambda row: " ".join(row.key))
def test_a_row_of_the_table_of_plans_is_what_its_config_compiles_to(row: table.Row) -> None:
    plan = step.compile_step(row.load(), hardware.parse(row.topology), build_task)
    *figures, _, program, _ = table.cells(row, plan)
    *there, _, same, _ = table.read(TABLE)[row.key]
    assert (figures, program) == (there, same)
    # Of pairs a step computes what their gradient asks for, and each tower's forward pass once or twice more.
    assert plan.costs is not None
    again = 1.05 if "remat=none" in row.overrides else 1.4
    assert 1 <= plan.costs.flops / plan.model_flops <= again


def test_a_program_has_its_own_digest(plan: step.Plan, config: ml_collections.ConfigDict) -> None:
    def digest(**changed: object) -> str:
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changed)
        return step.lower_step(other, plan.topology, build_task).digest()

    assert digest(log_every=7, **{"data.threads": 3}) == plan.program
    assert len({plan.program, digest(**{"guard.spike_factor": 3.0}), digest(batch_size=128)}) == 3


def test_the_table_of_plans_goes_on_where_it_stopped(
    plan: step.Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[str] = []

    def compile_step(_: object, topology: hardware.Topology, __: object) -> step.Plan:
        compiled.append(topology.name)
        if len(compiled) == 3:
            raise KeyboardInterrupt
        return replace(plan, topology=topology)

    class Lowered:
        def digest(self) -> str:
            return plan.program

    monkeypatch.setattr(table, "compile_step", compile_step)
    monkeypatch.setattr(table, "lower_step", lambda *_: Lowered())
    path = tmp_path / "table.md"
    with pytest.raises(KeyboardInterrupt):
        table.write(path)
    assert list(table.read(path)) == [row.key for row in table.ROWS[:2]]
    table.write(path)
    assert list(table.read(path)) == [row.key for row in table.ROWS]
    assert len(compiled) == len(table.ROWS) + 1
    table.write(path)
    assert len(compiled) == len(table.ROWS) + 1
    monkeypatch.setattr(Lowered, "digest", lambda _: "another program's")
    table.write(path)
    assert len(compiled) == 2 * len(table.ROWS) + 1


def test_where_streams_take_turns_a_step_asks_for_their_mean() -> None:
    with without_data(smollm2.get_config("debug")) as config:
        device = hardware.parse("v5e:1x1").devices[:1]
        streams = len(config.data.mixture)
        together = step.model_flops(config, build_task, device)
        config.data.schedule = "round_robin"
        assert streams == 3 and step.model_flops(config, build_task, device) == together // streams
