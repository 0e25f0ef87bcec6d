"""The console scripts: help, completion, exit codes, where an error came from; quiet bars off a terminal."""

import argparse
import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from clip_jax import cli as clip_cli
from clip_jax.command_line import Parser, run
from clip_jax.errors import DataError
from flamingo_jax import cli as flamingo_cli

SCRIPTS = {"clip-jax": clip_cli, "flamingo-jax": flamingo_cli}


def commands_of(parser: Parser) -> dict[str, argparse.ArgumentParser]:
    return dict(parser.commands.choices)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_has_an_example_that_parses(script: str, tmp_path: Path) -> None:
    import shlex

    parser = SCRIPTS[script].parser()
    lines = (SCRIPTS[script].__doc__ or "").partition("\n\n")[2].strip().splitlines()
    shown = set()
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == script
        shown.add(parser.parse_args(arguments).command)
    assert shown >= commands_of(parser).keys() - {"chat"}
    for name, one in commands_of(parser).items():
        text = one.format_help()
        assert f"{script} {name}" in text.partition("examples:")[2]
        assert "--debug" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_can_be_had_as_json(script: str) -> None:
    without = {"export", "chat"}  # they print no number
    for name, one in commands_of(SCRIPTS[script].parser()).items():
        assert ("--json" in one.format_help()) == (name not in without), name


@pytest.mark.parametrize(
    ("script", "line", "expected"),
    [("clip-jax", "clip-jax cl", ["classify"]), ("clip-jax", "clip-jax export m d --format ", ["hf", "open_clip"]),
     ("flamingo-jax", "flamingo-jax caption --le", ["--length-penalty"])],
)  # fmt: skip
def test_a_shell_completes(script: str, line: str, expected: list[str], tmp_path: Path) -> None:
    """As bash asks: argcomplete's protocol, with the answer in a file instead of on descriptor 8."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
             "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out")}  # fmt: skip
    subprocess.run([sys.executable, "-m", SCRIPTS[script].__name__], env=os.environ | asked, check=True)
    assert [word.strip() for word in (tmp_path / "out").read_text().splitlines()] == expected


def program(function: Callable[[argparse.Namespace], None]) -> Parser:
    parser = Parser("program", "What it is.\n\nprogram go\n")
    parser.command("go", function, "Goes.")
    return parser


def fail(_: argparse.Namespace) -> None:
    raise DataError("photos: no such folder")


def interrupt(_: argparse.Namespace) -> None:
    raise KeyboardInterrupt


def test_an_error_is_one_line_and_exits_with_1() -> None:
    with pytest.raises(SystemExit) as exited:
        run(program(fail), ["go"])
    assert exited.value.code == "error: photos: no such folder"


def test_debug_shows_where_it_came_from() -> None:
    with pytest.raises(DataError):
        run(program(fail), ["go", "--debug"])


def test_what_the_system_refuses_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    def write(_: argparse.Namespace) -> None:
        (tmp_path / "none" / "page.html").write_text("a page")

    with pytest.raises(SystemExit) as exited:
        run(program(write), ["go"])
    assert exited.value.code == f"error: {tmp_path}/none/page.html: No such file or directory"
    with pytest.raises(FileNotFoundError):
        run(program(write), ["go", "--debug"])


@pytest.mark.parametrize("lines", [1, 100_000])  # held back until the end; and written on the way
def test_a_reader_that_has_enough_is_no_error(lines: int) -> None:
    code = f"""
import argparse
from clip_jax.command_line import Parser, run
top = Parser("p", "What it is.")
top.command("go", lambda arguments: print("word\\n" * {lines}), "Goes.")
input()
run(top, ["go"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 1 and process.stderr.read() == b""


def test_ctrl_c_exits_as_shells_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        run(program(interrupt), ["go"])
    assert exited.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        run(program(fail), ["run"])
    assert exited.value.code == 2 and "invalid choice: 'run'" in capsys.readouterr().err


def test_bars_are_quiet_off_a_terminal_and_what_is_written_beside_them_has_a_stream() -> None:
    bars, written = 0, 0
    for path in (path for folder in ("clip_jax", "flamingo_jax", "launch") for path in (ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            named, where = {keyword.arg for keyword in call.keywords}, f"{path.relative_to(ROOT)}:{call.lineno}"
            called = ast.unparse(call.func)
            if called == "partial" and call.args:
                called = ast.unparse(call.args[0])
            if called in ("tqdm", "tqdm.tqdm"):
                bars += 1
                assert "disable" in named, f"{where}: without `disable`, logs fill with the bar"
            elif called in ("tqdm.write", "bar.write"):
                written += 1
                assert "file" in named, f"{where}: without `file`, it spoils JSON on stdout"
    assert bars > 10 and written > 5


def test_a_bar_does_not_look_for_devices() -> None:
    """A command that computes nothing must not take a TPU from one that does."""
    code = (
        "from clip_jax.progress import brief; assert list(brief([1, 2], total=2, desc='a', unit='b')) == [1, 2]; "
        "import jax._src.xla_bridge as b; assert not b.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
