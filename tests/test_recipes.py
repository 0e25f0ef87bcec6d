"""The configs that train a published model: each says its command and its cost, and runs, shrunk."""

import re
from pathlib import Path

import jax
import ml_collections
import pytest
from conftest import ROOT
from test_flamingo_task import digest, save
from test_lit import one

from clip_jax.training import checkpoint
from clip_jax.training.clip_task import ClipTask
from clip_jax.training.loop import train
from configs.clip import nfnet_f6_bert, quickstart, vit_b32
from configs.flamingo import quickstart as flamingo_quickstart
from configs.flamingo.common import language_model_config
from flamingo_jax.training.flamingo_task import FlamingoTask
from flamingo_jax.training.language_model_task import LanguageModelTask
from launch.command import load_config
from launch.planning.report import dollars, duration
from launch.planning.table import COLUMNS, ROWS, Row, read
from launch.tasks import build_task

TABLE = ROOT / "launch" / "planning" / "table.md"
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").glob("*/*.py")
    if path.name not in ("__init__.py", "common.py")
)
# Those that no other test runs. Many shrink to the same programs, which are compiled once.
RUN = ("clip/vit_b32", "clip/vit_b16", "clip/vit_l14", "clip/vit_l14_336", "clip/rn50", "clip/siglip_b16",
       "clip/nfnet_f6_bert", "clip/finetune", "flamingo/flamingo_3b", "flamingo/flamingo_9b", "flamingo/flamingo_80b",
       "flamingo/open_flamingo_3b", "flamingo/open_flamingo_9b", "flamingo/idefics_9b", "flamingo/smollm2")  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_config_opens_with_its_command_and_its_cost(file: str) -> None:
    text = (ROOT / file).read_text().split('"""')[1]
    assert f"python -m launch.train --config {file}" in text
    assert re.search(r"\$\d|\b(minutes|hours)\b|\bCost: ", text)  # `:debug` takes seconds, which says nothing of it


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdirs of untrained towers and, by the name of the recipe that freezes it, language models."""
    root = tmp_path_factory.mktemp("runs")
    for name, module in (("vit", vit_b32), ("nfnet", nfnet_f6_bert), ("resnet", quickstart)):
        config = module.get_config("debug")
        config.optimizer.agc.pattern = ""  # nothing is trained
        save(ClipTask(config, one()), config, root / name, one())
    for name in ("flamingo_3b", "open_flamingo_3b", "open_flamingo_9b", "idefics_9b", "smollm2"):
        config = language_model_config("debug")
        config.model = load_config(f"configs/flamingo/{name}.py:debug").model.language_model
        save(LanguageModelTask(config, one()), config, root / name, one())
    for name in ("flamingo_9b", "flamingo_80b"):  # of one kind, and shrunk to one size
        (root / name).symlink_to(root / "flamingo_3b")
    config = flamingo_quickstart.get_config("debug")  # whose resampler smollm2 starts from
    save(FlamingoTask(config, one()), config, root / "flamingo", one())
    return root


def started(name: str, runs: Path) -> ml_collections.ConfigDict:
    config = load_config(f"configs/{name}.py:debug")
    config.steps = 2
    if name == "clip/finetune":
        config.init.clip = str(runs / "vit")
    if config.task == "flamingo":
        config.init.vision = str(runs / config.model.vision.kind)
        config.init.language_model = str(runs / name.split("/")[1])
        if config.init.resampler:
            config.init.resampler = str(runs / "flamingo")
    else:
        config.data.evaluate = {}
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_recipe_runs_shrunk(name: str, runs: Path, tmp_path: Path) -> None:
    config = started(name, runs)
    state = train(config, build_task(config, one()), tmp_path, one())
    assert int(state.step) == 2
    whole = load_config(f"configs/{name}.py")
    assert config.frozen == whole.frozen and set(state.frozen) == {pattern.strip("/") for pattern in whole.frozen}
    before, after = (checkpoint.load(run, "params/vision") for run in (runs / "vit", tmp_path))
    if name == "clip/finetune":
        # It began where the other ended, temperature and all, and went on.
        assert digest(before) != digest(after)
        assert max(abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)) < 1e-4


# Those whose `debug` is the quickstart's, or another's model altogether.
OTHERS = ("quickstart", "emoji", "lit", "bag_of_words", "captioning", "instruct", "ablations")


@pytest.mark.parametrize("file", [file for file in FILES if not any(word in file for word in OTHERS)])
def test_a_shrunk_recipe_is_the_same_model(file: str) -> None:
    """What `debug` changes of a model are sizes; which parts there are, and of which kind, stays."""
    whole, small = (load_config(f"{file}{arg}") for arg in ("", ":debug"))
    assert whole.task == small.task
    kinds = ("kind", "pool", "causal", "positions", "norm", "activation", "cross_attention", "parallel_residual")
    for part in ("vision", "language_model", "resampler", "gated"):
        if part in whole.model:
            a, b = ({key: side.model[part].get(key) for key in kinds} for side in (whole, small))
            assert a == b or (part == "vision" and a["kind"] == b["kind"])


def test_every_recipe_has_a_row_in_the_table_of_plans() -> None:
    minutes = ("quickstart", "emoji", "ablations", "bag_of_words", "captioning")  # on a CPU, or another's sizes
    assert {row.config.split(":")[0] for row in ROWS} == {
        file for file in FILES if not any(word in file for word in minutes)
    }


@pytest.mark.parametrize("row", [row for row in ROWS if not row.overrides], ids=lambda row: " ".join(row.key))
def test_a_recipe_says_what_the_table_says(row: Row) -> None:
    """Where its first lines name a topology, the days and dollars are those of the table."""
    text = " ".join((ROOT / row.config.split(":")[0]).read_text().split('"""')[1].split())
    cells = dict(zip(COLUMNS, read(TABLE)[row.key], strict=True))
    assert f"On {row.topology}" in text and cells["run at best"] in text


def test_the_readme_of_the_configs_says_what_the_table_says() -> None:
    table, shown = read(TABLE), set()
    for line in (ROOT / "configs" / "README.md").read_text().splitlines():
        if match := re.fullmatch(r"\| \[(\S+)\]\(\S+\.py\) \| .* \| (.*) \| (.*) \| (.*) \| (.*) \|", line):
            name, topology, step, memory, cost = match.groups()
            cells = dict(zip(COLUMNS, table[name, topology], strict=True))
            assert [step, memory] == [cells["batch"], f"{cells['memory on each chip']} of {cells['of']}"], line
            assert cost == cells["run at best"], line
            shown.add((name, topology))
    assert shown == {row.key for row in ROWS if not row.overrides}


def test_costs_are_said_in_units_that_suit_them() -> None:
    assert [duration(x) for x in (11.6, 163, 6000, 86400 * 2.14)] == ["12 s", "2.7 min", "1.7 h", "2.1 d"]
    assert [dollars(x) for x in (0.004, 0.054, 9.994, 92161.2)] == ["less than $0.01", "$0.05", "$9.99", "$92,161"]
