"""The benchmark's figures, table and refusals; what it measures is measured by running it."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_jax.errors import UserError
from launch import benchmark
from launch.benchmarking import compile_time, flamingo_3b, start
from launch.benchmarking.clip import check_gradients, check_same, turn_of
from launch.benchmarking.peers import NEW, Watch
from launch.benchmarking.rows import Result, Row, Settings, Skipped, interleave, read_json, to_json, to_markdown, write
from launch.benchmarking.turns import program, resident_mib

ABOUT = {"machine": "two cores", "python": "3", "versions": {"jax": "1"}, "commit": "abc", "command": "python -m x"}
ROWS: list[Result] = [
    Row("embedding", "open_clip", [1.0, 2.0, 4.0], [3.0, 3.0, 9.0], 1.5, limit=0.5, limit_name="products"),
    Row("loss: memory", "dense", [150.0], [300.0], 10.0, unit="MiB"),
    Skipped("step", "no GPU"),
]


def test_a_ratio_is_of_turns_taken_side_by_side_and_the_median_counts() -> None:
    row = ROWS[0]
    assert isinstance(row, Row)
    assert row.ratios == [3.0, 1.5, 2.25] and row.met
    assert row.ratio == 2.25  # of medians it would be 3 / 2, of means 15 / 7
    assert not Row("a", "b", [1.0], [1.4], 1.5).met
    with pytest.raises(UserError, match="embedding: 2 turns of ours, 1 of open_clip's"):
        Row("embedding", "open_clip", [1.0, 1.0], [1.0], 1.0)


def test_the_table_says_what_was_met_what_was_not_run_and_on_what() -> None:
    lines = to_markdown(ROWS, ABOUT).splitlines()
    assert lines[2] == (
        "| embedding | open_clip | 2 s | 3 s | 2.25× (1.50 to 3.00) | 500 ms: products | ≥ 1.5× | met |"
    )  # fmt: skip
    assert lines[3] == "| loss: memory | dense | 150 MiB | 300 MiB | 2.00× (2.00 to 2.00) |  | ≥ 10× | missed |"
    assert "- step: not run: no GPU" in lines
    assert "two cores; Python 3, jax 1; commit abc;" in lines and "    python -m x" in lines
    assert {line.count("|") for line in lines[:4]} == {9}


def test_files_hold_every_turn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(ROWS, ABOUT, str(tmp_path / "a.json"), str(tmp_path / "a.png"), str(tmp_path / "a.md"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == json.loads(to_json(ROWS, ABOUT))
    assert found["commit"] == "abc" and found["rows"][0]["theirs"] == [3.0, 3.0, 9.0]
    assert found["rows"][0]["met"] and not found["rows"][1]["met"] and found["rows"][2]["why"] == "no GPU"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = interleave({"a": lambda: side("a"), "b": lambda: side("b")}, 2)
    assert calls == ["a", "b"] * 3 and found == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_of_a_turn_the_last_batches_are_timed_and_all_outputs_kept() -> None:
    waits = iter([0.2, 0.2, 0.2, 0.01, 0.03])

    def step() -> float:
        time.sleep(wait := next(waits))
        return wait

    ran = turn_of(step)
    assert 0.02 <= ran.seconds < 0.1 and ran.output.tolist() == [0.2, 0.2, 0.2, 0.01, 0.03]


def test_what_differs_is_not_compared() -> None:
    one = np.array([0.5, -0.5])
    check_same("row", {"ours": [one, one], "peer": [one + 1e-4, one]})
    for wrong in (one + 0.01, one * np.nan, -one):
        with pytest.raises(UserError, match="row: ours and peer are .* apart in turn 1; nothing is compared"):
            check_same("row", {"ours": [one, one], "peer": [one, wrong]})


def test_steps_with_other_gradients_are_not_compared() -> None:
    theirs = {"weight": np.array([3.0, 4.0]), "key.bias": np.array([1e-7])}
    check_gradients("row", {"weight": np.array([3.0, 4.01]), "key.bias": np.array([-2e-7])}, theirs)
    for wrong in ([3.0, 4.1], [-3.0, -4.0], [np.nan, 4.0]):
        with pytest.raises(UserError, match="row: the gradients of weight are .* apart; nothing is compared"):
            check_gradients("row", {"weight": np.array(wrong), "key.bias": theirs["key.bias"]}, theirs)


def broken(what: str) -> Callable[[], int]:
    if what == "make":
        raise ValueError("no weights")
    return lambda: os._exit(3)


def test_a_side_whose_process_ends_is_an_error_not_a_wait() -> None:
    for what, status in (("make", 1), ("run", 3)):
        with pytest.raises(UserError, match=f"process ended with status {status}"), program(broken, what) as run:
            run()


def test_one_row_that_fails_leaves_the_others_and_each_is_saved_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "a.md"
    seen: list[str] = []

    def breaks(settings: Settings) -> Iterator[Result]:
        yield ROWS[0]
        seen.append(table.read_text())
        raise KeyError("a peer's")

    def works(settings: Settings) -> Iterator[Result]:
        seen.append(table.read_text())
        yield ROWS[1]

    monkeypatch.setattr(benchmark, "ROWS", {"breaks": breaks, "works": works})
    monkeypatch.setattr("sys.argv", ["benchmark", "breaks", "works", "--table", str(table)])
    with pytest.raises(SystemExit, match="1"):
        benchmark.main()
    assert "| embedding |" in seen[0] and "failed" not in seen[0]
    assert '- breaks: not run: failed: KeyError("a peer\'s")' in seen[1]
    assert "| loss: memory |" in table.read_text() and "| embedding |" in table.read_text()
    assert table.read_text() in capsys.readouterr().out


def test_rows_measured_anew_take_the_place_of_the_old_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, (first, second, third) = tmp_path / "a.json", ROWS
    assert isinstance(first, Row) and isinstance(second, Row)
    earlier = [first, replace(second, commit="old"), third, Skipped("row", "failed: once", "row")]
    write(earlier, ABOUT, str(file), None, None)
    assert read_json(file) == earlier

    def row(settings: Settings) -> Iterator[Result]:
        yield replace(first, ours=[1.0, 1.0, 1.0])
        yield replace(first, peer="another")

    monkeypatch.setattr(benchmark, "ROWS", {"row": row})
    monkeypatch.setattr(benchmark, "about_this_run", lambda arguments: {**ABOUT, "commit": "new"})
    monkeypatch.setattr("sys.argv", ["benchmark", "row", "--add", "--json", str(file)])
    benchmark.main()
    found = read_json(file)
    assert [(one.name, getattr(one, "commit", None)) for one in found] == [
        ("embedding", "new"), ("loss: memory", "old"), ("step", None), ("embedding", "new")]  # fmt: skip
    assert isinstance(found[0], Row) and found[0].ours == [1.0, 1.0, 1.0]
    assert "- by commit old: loss: memory (dense)\n" in capsys.readouterr().out
    file.write_text("{}")
    with pytest.raises(SystemExit, match="error: .*a.json: not what --json wrote"):
        benchmark.main()


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").mkdir()
    monkeypatch.setattr(benchmark, "ROWS", {"row": lambda settings: pytest.fail("measured")})
    monkeypatch.setattr("sys.argv", ["benchmark", "row", "--json", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match="error: .*a.json"):
        benchmark.main()


def test_a_peers_prefill_counts_what_it_does_before_it_reads_the_prompt() -> None:
    watch = Watch()
    time.sleep(0.05)  # the images
    for _ in range(NEW + 1):
        watch.put(None)
    said = watch.said(np.zeros(NEW))
    assert said.prefill >= 0.05 > said.decode


def test_memory_that_a_turn_takes_is_seen() -> None:
    before = resident_mib()
    held = np.ones(2**24)
    assert before > 0 and resident_mib() - before > 100 and held.nbytes == 2**27
    assert resident_mib(peak=True) >= resident_mib() - 1


@pytest.mark.slow
def test_flamingo_alone_is_measured_by_what_the_device_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows for a GPU, shrunk, on a CPU; where there is no GPU they are named."""
    rates = {"gpu_peak": 1e12, "matmul_rate": 1e11, "reading_rate": 1e10}
    for name, rate in rates.items():
        monkeypatch.setattr(flamingo_3b, name, lambda *_, rate=rate: rate)
    step, prefill, decode = list(flamingo_3b.rows(Settings(2, quick=True), "cpu"))
    assert [step.name, prefill.name, decode.name] == [
        "Flamingo-3B, bf16: training step, 2 pages: MFU",
        "Flamingo-3B, bf16: prefill, 4 shots, batch 1",
        "Flamingo-3B, bf16: decode, 4 shots, batch 1",
    ]
    for row in (step, prefill, decode):
        assert len(row.ours) == 2 and 0 < row.ratio < 1, row
    monkeypatch.setattr("shutil.which", lambda name: None)
    skipped = list(benchmark.ROWS["gpu"](Settings(1)))
    assert len(skipped) == 6 and all(isinstance(row, Skipped) and row.why == "no GPU" for row in skipped)


def test_absent_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    quick = Settings(1, quick=True)
    for rows, what in (
        (benchmark.ROWS["embed"], "torch, open_clip not installed"),
        (benchmark.ROWS["flamingo"], "transformers, torch not installed"),
        (start.rows, "torch, open_clip not installed"),
        (lambda s: compile_time.rows("compile", s), "libtpu not installed"),
    ):
        found = list(rows(quick))
        assert found
        for row in found:
            assert isinstance(row, Skipped) and what.split(" not ")[0] in row.why and "not installed" in row.why


def test_a_side_that_fails_from_the_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="KeyError: 'nobody'"):
        start.from_start("nobody", tmp_path)


def test_the_command_lists_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    for row in benchmark.ROWS:
        assert benchmark.parser().parse_args([row, "--quick"]).row == [row]
    assert benchmark.parser().parse_args([]).row == []
    with pytest.raises(SystemExit):
        benchmark.parser().parse_args(["nothing"])
    assert "'nothing': no such row; expected embed, " in capsys.readouterr().err


def test_steps_whose_compile_time_is_taken_differ_in_depth_alone() -> None:
    for model in compile_time.MODELS.values():
        few, many = (compile_time.step_config(model, depth).to_dict() for depth in (6, 24))
        assert few != many
        parts = ("vision", "text") if model == "ViT-L/14" else ("language_model",)
        for part in parts:
            assert (few["model"][part].pop("layers"), many["model"][part].pop("layers")) == (6, 24)
        assert few == many
