"""Every command in every README: it runs, on small models, or is parsed where it needs a pod or data of elsewhere."""

import ast
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from absl import flags
from conftest import ORACLES, ROOT
from runs import write_run
from safetensors.numpy import load_file
from tars import write_shards
from test_lit import one
from test_load import written
from test_tensors import archive, tensor

from clip_jax import cli as clip_cli
from clip_jax.data.sources import open_source
from clip_jax.training.clip_task import ClipTask
from configs.clip import quickstart as clip_config
from configs.flamingo import quickstart as flamingo_config
from flamingo_jax import cli as flamingo_cli
from flamingo_jax.training.flamingo_task import FlamingoTask
from launch import command, evaluate, prepare

READMES = sorted(
    path for path in ROOT.rglob("README.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
SCRIPTS = {
    "clip-jax": clip_cli,
    "flamingo-jax": flamingo_cli,
    "clip_jax.cli": clip_cli,
    "flamingo_jax.cli": flamingo_cli,
}
# What no test has: a cluster, ImageNet, packages from the network, other programs' manuals; and a place for a name.
ELSEWHERE = re.compile(r"imagenet/val|smollm2|/usr/share|BUCKET|…|\bSPEC\b|\bFILE\b")

COMMAND = re.compile(
    r"python -m (clip_jax|flamingo_jax|launch)|(clip|flamingo)-jax [a-z]+ |make \S|sbatch |launch/tpu_vm.sh "
)


@dataclass(frozen=True)
class Line:
    """A command, as words, with where it stands."""

    words: tuple[str, ...]
    where: str

    @property
    def module(self) -> str:
        return self.words[2] if self.words[:2] == ("python", "-m") else self.words[0]

    @property
    def arguments(self) -> list[str]:
        return list(self.words[3 if self.words[:2] == ("python", "-m") else 1 :])


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fences = re.split(r"^```(\w*)\n", path.read_text(encoding="utf-8"), flags=re.M)
    opened = zip(fences[1::4], fences[2::4], strict=True)  # text, language, block, "", text, …
    return [block for name, block in opened if name == language]


def lines() -> list[Line]:
    found = []
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        inline = [found.replace("\n", " ") for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", text) if " --" in found]
        for block in [*blocks(path, ""), *inline]:
            joined = re.sub(r" *\\\n *", " ", block)
            for number, text in enumerate(joined.splitlines()):
                text = text.removeprefix("$ ").partition(" | ")[0].strip()
                if COMMAND.match(text):
                    words = tuple(word for word in shlex.split(text, comments=True))
                    found.append(Line(words, f"{path.relative_to(ROOT)}: {' '.join(words[:5])} #{number}"))
    return found


LINES = lines()


def of(*modules: str) -> list[Line]:
    return [line for line in LINES if line.module in modules]


def test_all_of_them_are_found() -> None:
    assert len(LINES) > 25
    known = {*SCRIPTS, "make", "sbatch", "launch/tpu_vm.sh"}
    assert all(line.module in known or line.module.startswith("launch.") for line in LINES)


@pytest.mark.parametrize("line", of(*SCRIPTS), ids=lambda line: line.where)
def test_a_console_scripts_line_is_one(line: Line) -> None:
    SCRIPTS[line.module].parser().parse_args(line.arguments)


@contextlib.contextmanager
def parsed(line: Line) -> Iterator[None]:
    """Within it the flags are those of the line, of a command whose flags are absl's; each must be its own."""
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[line.module]} | {"debug", "json", "workdir"}
    words = re.sub(r"--config(\.\S+|[ =]\S+)|--help", "", " ".join(line.arguments)).split()
    assert {word[2:].partition("=")[0] for word in words if word.startswith("--")} <= own
    assert flags.FLAGS(["", *words]) == [""]
    try:
        yield
    finally:
        for name in own:
            flags.FLAGS[name].unparse()


@pytest.mark.parametrize(
    "line", [line for line in LINES if line.module.startswith("launch.")], ids=lambda line: line.where
)
def test_a_launch_line_is_one(line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(line.module)
    if line.module == "launch.prepare":
        words = " ".join(line.arguments).replace(" … ", " --input SPEC --queries FILE --output DIR ").split()
        assert callable(prepare.parse(words).run)
        return
    if hasattr(module, "parser"):
        module.parser().parse_args(line.arguments)
        return
    with parsed(line):
        pass
    if "--config.optimizer.ler=1e-3" in line.arguments:  # shown to be refused
        with pytest.raises(SystemExit, match="2"):
            command.check_overrides(["", *line.arguments])
        assert "did you mean --config.optimizer.lr?" in capsys.readouterr().err
        return
    for position, word in enumerate(line.arguments):
        file = line.arguments[position + 1] if word == "--config" else ""
        if file.startswith("configs/"):
            command.config_with(file, [word for word in line.arguments if word.startswith("--config.")])


@pytest.mark.parametrize("line", of("make"), ids=lambda line: line.where)
def test_a_make_target_is_there(line: Line) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {word for word in line.arguments if re.fullmatch(r"[\w-]+", word)} <= targets


@pytest.mark.parametrize("line", of("sbatch", "launch/tpu_vm.sh", "launch.gke"), ids=lambda line: line.where)
def test_a_launcher_says_what_it_would_do(line: Line) -> None:
    words = list(line.words)
    if words[0] == "sbatch":
        words = ["bash", *words[next(i for i, word in enumerate(words) if word.endswith(".sh")) :]]
    elif words[0] == "launch/tpu_vm.sh":
        words = ["bash", words[0], *(["--dry-run"] if "--dry-run" not in words else []), *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"DRY_RUN": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-500:]


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_of_python_compile_and_import_what_there_is(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def write_published(root: Path) -> None:
    """Weights under the names of the published ones, small."""
    file = written(root / "open_clip", "openai").removeprefix("openai:")
    weights = load_file(file)
    tree = {
        name: tensor(name, value.size, value.shape, tuple(n // value.itemsize for n in value.strides))
        for name, value in weights.items()
    }
    archive(root / "ViT-B-32.pt", tree, {name: value.tobytes() for name, value in weights.items()})
    shutil.copy(ORACLES / "timm_nfnet" / "model.safetensors", root / "dm_nfnet_f6.safetensors")
    shutil.copytree(ORACLES / "hf_bert", root / "bert-base-uncased")
    (root / "bert-base-uncased" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs/quickstart as `make quickstart` leaves it, but small and untrained, and pictures."""
    root = tmp_path_factory.mktemp("sandbox")
    quickstart = root / "runs" / "quickstart"
    clip = clip_config.get_config("debug")
    for workdir in (quickstart / "clip", root / "runs" / "mine"):
        write_run(workdir, clip, ClipTask(clip, one()))
    flamingo = flamingo_config.get_config("debug")
    write_run(quickstart / "flamingo", flamingo, FlamingoTask(flamingo, one()))
    write_published(root)
    write_shards(root / "web", shards=12, rows=3)
    pictures = root / "pictures"
    pictures.mkdir()
    source = open_source("emoji:unseen_concepts_held_out_style")
    for i in range(5):
        (pictures / f"{i}.webp").write_bytes(source[i].image)
    (pictures / "broken.jpg").write_bytes(b"no picture")
    for name in ("smile.webp", "photo.jpg"):
        shutil.copy(pictures / "0.webp", root / name)
    for name in ("test.jsonl", "examples.jsonl"):
        questions = [
            {"image": f"pictures/{i}.webp", "question": f"{name}, which colour?", "answers": ["red"]} for i in range(5)
        ]
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in questions))
    return root


@pytest.mark.slow
def test_the_lines_run(sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """But for those of pods and data that are elsewhere; training, plans, benchmarks and the page have their own."""
    monkeypatch.chdir(sandbox)
    lines = {line.words: line for line in of(*SCRIPTS, "launch.prepare", "launch.evaluate")}  # some stand twice
    ran = [line for line in lines.values() if not ELSEWHERE.search(" ".join(line.words))]
    assert len(ran) > 15
    for line in ran:
        if line.module == "launch.evaluate":
            with parsed(line):
                evaluate.main()
        else:
            (prepare if line.module == "launch.prepare" else SCRIPTS[line.module]).main(line.arguments)
        assert capsys.readouterr().out.strip(), line.where
