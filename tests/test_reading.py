"""What a run says of its reading: skips by reason and shard, and what limits the speed."""

import io
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.order import Order
from clip_jax.data.pipeline import Draws, _Pieces
from clip_jax.data.sources import Pair
from clip_jax.data.workers import Batch
from clip_jax.errors import TrainingError
from clip_jax.training.goodput import Goodput
from clip_jax.training.meter import Meter
from clip_jax.training.reading import Reading, ReadingSoFar


def reading(drawn: int, busy: float = 0.0, taken: float = 0.0, **skips: int) -> Reading:
    found = Counter({(name.split("_at_")[0], f"{name.split('_at_')[1]}.tar"): n for name, n in skips.items()})
    return Reading(drawn, found, busy, taken)


def test_reading_of_a_step_is_that_of_its_streams() -> None:
    one = Batch({"x": np.zeros((3, 2))}, Counter({("a", "s"): 1}), 0.5, 1.0)
    two = Batch({"y": np.zeros((5,))}, Counter({("a", "s"): 2, ("b", ""): 1}), 0.25, 0.5)
    assert Reading.of([one, two]) == Reading(8, Counter({("a", "s"): 3, ("b", ""): 1}), 0.75, 1.5)


def test_skips_are_counted_by_reason_and_too_many_stop_the_run_with_the_worst_shards() -> None:
    sofar = ReadingSoFar(0.01, threads=1, workers=0)
    sofar.add(reading(990, truncated_at_a=6, large_at_b=3))
    assert sofar.counts() == {"rejected_records": 9, "rejected/large": 3, "rejected/truncated": 6}
    sofar.add(reading(10, truncated_at_b=1))  # a hundredth, not more
    with pytest.raises(TrainingError, match=r"^16 of 1010 records .*max_rejected_share 0.01") as caught:
        sofar.add(reading(10, truncated_at_b=6))
    assert "(truncated 13, large 3); the worst shards: b.tar 10, a.tar 6;" in str(caught.value)


def test_the_first_records_alone_stop_nothing() -> None:
    sofar = ReadingSoFar(0.01, threads=1, workers=0)
    sofar.add(reading(999, truncated_at_a=500))
    with pytest.raises(TrainingError):
        sofar.add(reading(1))


@pytest.mark.parametrize(
    ("workers", "busy", "waited", "said"),
    [
        (1, 10.0, 0.5, "50% of the time was spent waiting for data: an example takes 10.0 ms of a core and 10.0 ms in "
                       "all, by 1 threads of 1 processes; data.workers may be up to this machine's 4 cores"),
        (4, 10.0, 0.06, "this machine's 4 cores are the limit"),
        (1, 1.0, 0.9, "an example takes 1.0 ms of a core and 10.0 ms in all, by 1 threads of 1 processes, which wait "
                      "for the source most of it"),
        (1, 10.0, 0.04, ""),
    ],
)  # fmt: skip
def test_what_limits_is_said_where_a_step_waits(
    workers: int, busy: float, waited: float, said: str,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    sofar = ReadingSoFar(1.0, threads=1, workers=workers)
    sofar.add(reading(1000, busy, 10.0))
    sofar.warn(waited)
    assert (said in caplog.text) if said else not caplog.records
    caplog.clear()
    sofar.warn(waited)  # of nothing read since
    assert not caplog.records


class Computation:
    """What a device is busy with for some seconds."""

    def __init__(self, seconds: float):
        self._end = time.perf_counter() + seconds

    def block_until_ready(self) -> None:
        time.sleep(max(0.0, self._end - time.perf_counter()))


@pytest.mark.parametrize("busy", [0.0, 0.3])
def test_waiting_counts_from_when_the_devices_are_idle(tmp_path: Path, busy: float) -> None:
    meter, start = Meter(0, 1, Goodput(tmp_path, 0), None), time.perf_counter()
    with meter.waiting(Computation(busy) if busy else None):
        time.sleep(0.6)
    inside, figures = time.perf_counter() - start, meter.figures(1)
    waited = figures["data_wait_share"] * figures["step_seconds"]
    assert 0.1 < waited < inside - busy + 0.01
    assert busy or waited > 0.6 - 0.01
    with meter.waiting(Computation(60.0)):
        time.sleep(0.01)
    assert meter.figures(2)["data_wait_share"] == 0.0


def test_the_file_of_a_bad_record_is_named() -> None:
    class Sharded(list[Pair]):
        files = ("a.tar", "b.tar")

        def locate(self, index: int) -> tuple[int, int]:
            return index // 2, index % 2

    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    good = Pair("good", file.getvalue(), "text")
    draws = Draws(Sharded([good, good, good, Pair("bad", b"", "text")]), Order(4, 0))

    def element(position: int) -> dict[str, np.ndarray]:
        (size, _) = draws(position, lambda pair, image, _: np.array(image.size))
        return {"x": size}

    skips = _Pieces(element, 4, [np.arange(4)])(0).skips
    assert set(skips) == {("empty_image", "b.tar")} and skips.total() >= 1
