"""The command line: configs, overrides, and one clear line for what is wrong."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from clip_jax.errors import ConfigError
from launch import command

CONFIG = "configs/clip/quickstart.py"


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    nearest = {
        "optimizer.ler": "optimizer.lr",
        "batchsize": "batch_size",
        "model.vision.widht": "model.vision.width",
    }
    for key, near in nearest.items():
        with pytest.raises(SystemExit, match="2"):
            command.check_overrides(["train", "--config", CONFIG, f"--config.{key}=1"])
        expected = f"error: --config.{key}: {CONFIG} has no such key; did you mean --config.{near}?\n"
        assert capsys.readouterr().err == expected


def test_known_keys_pass() -> None:
    command.check_overrides(["train", f"--config={CONFIG}:debug", "--config.optimizer.lr=1", "--config.init.vision=x"])


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.check_overrides(["train", "--config", "nowhere.py", "--config.seed=1"])
    assert "nowhere.py: no such file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no such file"):
        command.load_config("nowhere.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch.train", "--config", CONFIG], "error: --workdir is missing: name a directory for the run"),
        (["launch.train", "--config", CONFIG, "--workdir", "gs://b/x"], "error: --workdir gs://b/x: a directory is"),
        (["launch.train", "--workdir", "x"], "error: --config is missing: name a file such as"),
        (["launch.train", "--config", f"{CONFIG}:debug", "--workdir", "x", "--config.steps=many"], "error: "),
        (["launch.train", "--config", f"{CONFIG}:debug", "--workdir", "x", "--config.mesh.tensor=3"],
         "error: mesh {'replica': 1, 'fsdp': -1, 'tensor': 3} needs 3 devices or a multiple; there are 8"),
        (["launch.train", "--config", f"{CONFIG}:debug", "--workdir", "x", "--config.batch_size=12"],
         "error: batch_size 12 is not divisible by the 8 data-parallel parts"),
        (["launch.train", "--config", f"{CONFIG}:debug", "--workdir", "x", "--config.data.train=tfds:nowhere#train"],
         "error: nowhere/dataset_info.json: not found; expected a TFDS data set"),
        (["launch.evaluate", "--workdir", "nowhere"], "nowhere: no finished checkpoint there"),
        (["launch.evaluate", "--workdir", "x", "--data", "y:z"], "error: data source 'y:z': expected KIND:WHERE with"),
        (["launch.plan", "--config", CONFIG, "--topology", "v9:2x2"],
         "error: --topology v9:2x2: unknown chip v9; expected one of v4, v5e, v5p, v6e, tpu7x"),
        (["launch.report", "--workdir", "nowhere"], "error: nowhere/clip/evaluation.json: not found; `python"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments: list[str], expected: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (2 if "--config.steps=many" in arguments else 1)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and expected in line, done.stderr[-1000:]
    assert "Traceback" not in done.stderr
    assert not (ROOT / "x").exists()


def test_overrides_change_a_config_as_the_flags_do(capsys: pytest.CaptureFixture[str]) -> None:
    file = "configs/flamingo/instruct.py:debug"
    config = command.config_with(file, ["--config.data.mixture.chats.source=json:a#b", "--config.frozen=('vision/',)"])
    assert config.data.mixture.chats.source == "json:a#b" and config.frozen == ("vision/",)
    with pytest.raises(ConfigError, match=r"'--stepz=3': expected --config.KEY=VALUE"):
        command.config_with(file, ["--stepz=3"])
    with pytest.raises(ConfigError, match="--config.steps=many: "):
        command.config_with(file, ["--config.steps=many"])
    with pytest.raises(SystemExit, match="2"):
        command.config_with(file, ["--config.stepz=3"])
    assert "did you mean --config.steps" in capsys.readouterr().err


@pytest.mark.slow
def test_help_says_what_can_be_trained_and_exits_with_0() -> None:
    done = subprocess.run([sys.executable, "-m", "launch.train", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--workdir: " in done.stdout and "--debug: " in done.stdout
    listed = [line.split()[0] for line in done.stdout.partition("configs:")[2].strip().splitlines()]
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*/*.py")}
    assert set(listed) == {path for path in there if not path.endswith(("__init__.py", "common.py"))}


def test_a_flag_that_two_commands_define_is_the_same_flag() -> None:
    """Where one process imports both, absl keeps a single definition of the name (the tests are such a process)."""
    definition = re.compile(r'flags\.(DEFINE_\w+)\(\s*"([\w-]+)",\s*([^,]+),')
    found: dict[str, set[tuple[str, str]]] = {}
    for file in (ROOT / "launch").rglob("*.py"):
        for kind, name, default in definition.findall(file.read_text()):
            found.setdefault(name, set()).add((kind, default))
    assert {"json", "workdir", "debug"} <= found.keys()
    assert all(len(kinds) == 1 for kinds in found.values()), found
