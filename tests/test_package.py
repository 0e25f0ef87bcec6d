"""What `pip wheel .` makes: the two packages, typed, with their commands, quick to import."""

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, unpacked. It is built of what git knows, or would, without the builds of before."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "clip_jax", "flamingo_jax",
         "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    source, output = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    command = ["pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(output)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (built,) = output.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(output / "content")
    return output / "content"


def test_it_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    (information,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"clip_jax", "flamingo_jax", information.name}
    for package in ("clip_jax", "flamingo_jax"):
        there, here = (
            {str(path.relative_to(root)) for path in (root / package).rglob("*") if path.suffix not in ("", ".pyc")}
            for root in (wheel, ROOT)
        )
        assert here - there <= {f"{package}/README.md"} and there <= here
        assert f"{package}/py.typed" in there
    scripts = ConfigParser()
    scripts.read(information / "entry_points.txt")
    commands = {"clip-jax": "clip_jax.cli:main", "flamingo-jax": "flamingo_jax.cli:main"}
    assert dict(scripts["console_scripts"]) == commands
    assert len(list((information / "licenses").rglob("*"))) >= 5  # and the notices of the data


def test_importing_it_imports_no_other_framework(wheel: Path) -> None:
    program = """
import sys
import clip_jax, flamingo_jax, clip_jax.cli, flamingo_jax.cli
clip_jax.cli.parser(), flamingo_jax.cli.parser()
assert "jax" not in sys.modules, "the command line's help waits for JAX"
from clip_jax import load
from flamingo_jax import load
print([name for name in ("tensorflow", "torch", "transformers", "gradio", "apache_beam") if name in sys.modules])
print(clip_jax.__file__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=wheel, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    others, place = done.stdout.splitlines()
    assert others == "[]" and Path(place).is_relative_to(wheel)


def test_importing_it_takes_below_two_seconds() -> None:
    """Of the process's own time on a CPU, which other work on the machine does not count in."""
    program = """
import sys, time
import clip_jax, flamingo_jax, clip_jax.cli, flamingo_jax.cli
assert not {"tensorflow", "torch"} & set(sys.modules)
print(time.process_time())
"""
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 2
