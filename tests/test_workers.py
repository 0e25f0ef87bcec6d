"""Processes that read: they change how fast a batch comes, nothing of what it holds, and end with the trainer."""

import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from clip_jax.data.order import Order
from clip_jax.data.pipeline import Batches, Draws, PairElements
from clip_jax.data.sources import ASSETS, Pair, PairSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import Augmentation
from clip_jax.data.workers import Batch
from clip_jax.errors import DataError

BATCH, SIZE, ROWS = 8, 12, np.array([0, 1, 2, 5, 6, 7])
COUNT = 24


def jpeg(i: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def pairs() -> list[Pair]:
    """Good ones, and a truncated, an empty, a wordless and a false one."""
    found = [Pair(f"r{i}", jpeg(i), f"picture {i}") for i in range(COUNT)]
    found[3] = Pair("r3", found[3].image[:300], "cut")
    found[7] = Pair("r7", b"", "nothing")
    found[11] = Pair("r11", found[11].image, " ")
    found[20] = Pair("r20", b"<svg/>", "drawn")
    return found


def elements(source: PairSource) -> PairElements:
    tokenizer = Tokenizer.from_file(ASSETS / "emoji" / "tokenizer.json")
    return PairElements(Draws(source, Order(len(source), 5)), tokenizer, SIZE, 10, Augmentation())


def read(workers: int, start: int, stop: int) -> list[Batch]:
    return list(Batches(elements(pairs()), BATCH, ROWS, threads=2, workers=workers).read(start, stop))


def assert_same(some: Sequence[Batch], others: Sequence[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.skips == other.skips and one.arrays.keys() == other.arrays.keys()
        for name, values in one.arrays.items():
            assert values.dtype == other.arrays[name].dtype
            np.testing.assert_array_equal(values, other.arrays[name])


@pytest.fixture(scope="module")
def by_threads() -> list[Batch]:
    return read(0, 0, 7)


@pytest.mark.parametrize("workers", [1, 2])
def test_content_does_not_depend_on_the_number_of_processes(by_threads: list[Batch], workers: int) -> None:
    assert_same(read(workers, 0, 7), by_threads)


def test_processes_start_in_the_middle_as_well(by_threads: list[Batch]) -> None:
    assert_same(read(2, 4, 7), by_threads[4:])


def test_every_skipped_record_is_counted_by_its_reason(by_threads: list[Batch]) -> None:
    order, bad = Order(COUNT, 5), {3: "truncated_image", 7: "empty_image", 11: "empty_caption", 20: "not_an_image"}
    for step, batch in enumerate(by_threads):
        expected: Counter[str] = Counter()
        for row in ROWS.tolist():
            attempt = 0
            while (index := order.index(step * BATCH + row, attempt)) in bad:
                expected[bad[index]] += 1
                attempt += 1
        found = Counter({reason: count for (reason, _), count in batch.skips.items()})
        assert found == expected and sum(expected.values()) == batch.arrays["rejected"].sum()
    assert sum(sum(batch.skips.values()) for batch in by_threads) > 4


class Dies(list[Pair]):
    """Records of which reading one ends the process that reads, in the way that it is told."""

    how = "kill"

    def __getitem__(self, index):
        if index == 0 and os.environ.get("TOKENIZERS_PARALLELISM") == "false":  # in a worker only
            os.kill(os.getpid(), signal.SIGKILL) if self.how == "kill" else os._exit(7)
        return super().__getitem__(index)


class Exits(Dies):
    how = "exit"


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Dies, "was killed, as Linux does where memory runs out"), (Exits, "ended with exit status 7")],
    ids=["killed", "exits"],
)
def test_a_process_that_ends_is_an_error_and_no_hang(
    kind: type[Dies], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    batches = Batches(elements(kind(pairs())), BATCH, ROWS, workers=2)
    with pytest.raises(DataError, match=said):
        list(batches.read(0, 20))


def test_an_error_in_a_process_is_raised_here() -> None:
    bad = [Pair(f"r{i}", b"no picture", "text") for i in range(60)]
    source = [*bad, Pair("good", jpeg(0), "text")]
    place = next(p for p in range(len(source)) if Order(len(source), 5).index(p) == 60)  # the trainer reads one itself
    with pytest.raises(DataError, match="32 bad records in a row at position") as caught:
        list(Batches(elements(source), 1, np.array([0]), workers=1).read(place, place + 20))
    assert "In a worker that reads data" in caught.value.__notes__[0]


PARENT = """
import sys
import numpy as np
from clip_jax.data.pipeline import Batches

def element(position):  # of the program that runs, so it goes over by value
    return {"x": np.full((4,), position, np.int32)}

batches = Batches(element, 8, np.arange(8), workers=2).read(0, 10**6)
print(next(batches).arrays["x"][:, 0].tolist(), flush=True)
sys.stdin.read()
"""


def test_processes_end_with_a_trainer_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"  # without `if __name__ == "__main__"`: the processes don't run it again
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == f"{list(range(8))}\n"
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) == 2
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < end, "they live on"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
