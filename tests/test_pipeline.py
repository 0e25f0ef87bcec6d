"""What training is fed: batches that depend on the config, the seed and the step, on nothing else."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import pipeline
from clip_jax.data.order import Order
from clip_jax.data.pipeline import Batches, Draws, PairElements, evaluation_batches
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.sources import Pair, PairSource
from clip_jax.data.tokenizer import Tokenizer, train_tokenizer
from clip_jax.data.transforms import Augmentation, decode, evaluation_image
from clip_jax.errors import DataError, RecordError

COUNT, BATCH, SIZE, LENGTH = 21, 8, 12, 10


def pair(i: int) -> Pair:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 20, 3), np.uint8)).save(file, "PNG")
    return Pair(f"r{i}", file.getvalue(), f"picture {i}", ("red", "blue", f"n{i}"), group=f"g{i % 3}")


PAIRS = [pair(i) for i in range(COUNT)]
NO_IMAGE = replace(PAIRS[4], image=b"no picture")
NO_TEXT = replace(PAIRS[9], text=" \n")
BAD = [*PAIRS[:4], NO_IMAGE, *PAIRS[5:9], NO_TEXT, *PAIRS[10:]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([p.text for p in PAIRS], 256 + 3 + 4)


def elements(source: PairSource, tokenizer: Tokenizer, keyword_rate: float = 0.5) -> PairElements:
    draws = Draws(source, Order(len(source), 5))
    return PairElements(draws, tokenizer, SIZE, LENGTH, Augmentation(), keyword_rate)


def read(batches: Batches, start: int, stop: int) -> list[Mapping[str, np.ndarray]]:
    return list(batches(start, stop))


def assert_same(a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_batch_shapes_and_types(tokenizer: Tokenizer) -> None:
    (batch,) = read(Batches(elements(PAIRS, tokenizer), BATCH, np.arange(BATCH)), 0, 1)
    assert batch["image"].shape == (BATCH, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (BATCH, LENGTH) and batch["text"].dtype == np.int32
    assert batch["rejected"].shape == (BATCH,) and not batch["rejected"].any()


def test_batches_hold_the_elements_at_their_positions(tokenizer: Tokenizer) -> None:
    element = elements(PAIRS, tokenizer)
    batches = read(Batches(element, BATCH, np.arange(BATCH)), 0, 6)
    assert len(batches) == 6
    for step, batch in enumerate(batches):
        for row in range(BATCH):
            expected = element(step * BATCH + row)
            assert all(np.array_equal(batch[name][row], expected[name]) for name in expected)


@pytest.mark.parametrize("source", [PAIRS, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("order", ["halves", "stripes"])
def test_content_does_not_depend_on_the_split_of_rows(tokenizer: Tokenizer, source: PairSource, order: str) -> None:
    element = elements(source, tokenizer)
    rows = np.arange(BATCH) if order == "halves" else np.arange(BATCH).reshape(-1, 2).T.ravel()
    whole = read(Batches(element, BATCH, rows), 0, 5)
    first, second = (read(Batches(element, BATCH, half), 0, 5) for half in np.split(rows, 2))
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(first, second, strict=True)]
    assert_same(joined, whole)


def test_content_does_not_depend_on_threads_and_prefetching(tokenizer: Tokenizer) -> None:
    element, rows = elements(BAD, tokenizer), np.arange(BATCH)
    one = read(Batches(element, BATCH, rows, threads=1, prefetch=1), 0, 6)
    assert_same(read(Batches(element, BATCH, rows, threads=4, prefetch=3), 0, 6), one)


def test_content_does_not_depend_on_where_reading_started(tokenizer: Tokenizer) -> None:
    batches = Batches(elements(BAD, tokenizer), BATCH, np.arange(BATCH))
    assert_same(read(batches, 3, 6), read(batches, 0, 6)[3:])


def test_seeds_and_epochs_give_other_content(tokenizer: Tokenizer) -> None:
    element = elements(PAIRS, tokenizer)
    other = replace(element, draws=replace(element.draws, order=Order(COUNT, 6)))
    assert not np.array_equal(element(0)["image"], other(0)["image"])
    by_index = {element.draws.order.index(COUNT + i): COUNT + i for i in range(COUNT)}
    again = by_index[element.draws.order.index(0)]  # the same record in the next epoch is cropped anew
    assert not np.array_equal(element(0)["image"], element(again)["image"])


def test_bad_records_are_replaced_by_rule_and_counted(tokenizer: Tokenizer) -> None:
    good, bad = elements(PAIRS, tokenizer, 0.0), elements(BAD, tokenizer, 0.0)
    hit = 0
    for position in range(2 * COUNT):
        if bad.draws.order.index(position) not in (4, 9):
            assert_same([bad(position)], [good(position)])
            continue
        hit += 1
        element = bad(position)
        attempts = int(element["rejected"])
        assert attempts == next(k for k in range(1, 32) if bad.draws.order.index(position, k) not in (4, 9))
        replacement = PAIRS[bad.draws.order.index(position, attempts)]
        np.testing.assert_array_equal(element["text"], tokenizer(replacement.text, LENGTH)[0])
    assert hit == 4


def test_a_bad_record_is_reported_once(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_reported", set())
    element = elements(BAD, tokenizer)
    with caplog.at_level(logging.WARNING):
        for position in range(3 * COUNT):
            element(position)
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert "r4: the image does not decode" in messages[0] and "r9: the text is empty" in messages[1]


@pytest.mark.parametrize("threads", [1, 4])
def test_source_of_bad_records_is_given_up(tokenizer: Tokenizer, threads: int) -> None:
    batches = Batches(elements([NO_IMAGE, NO_TEXT] * 5, tokenizer), BATCH, np.arange(BATCH), threads=threads)
    with pytest.raises(DataError, match="bad records in a row at position"):
        read(batches, 0, 1)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_keywords_join_or_replace_the_text(tokenizer: Tokenizer, rate: float) -> None:
    element = replace(elements(PAIRS, tokenizer, rate), context_length=64)
    texts = [tokenizer.decode(element(position)["text"]) for position in range(COUNT)]
    names = [PAIRS[element.draws.order.index(position)].text for position in range(COUNT)]
    if rate == 0:
        assert texts == names
    else:
        joined = [text.startswith(f"{name}, ") for text, name in zip(texts, names, strict=True)]
        assert 0 < sum(joined) < COUNT
        words = {word for text in texts for word in text.split(", ")} - set(names)
        assert words <= {"red", "blue", *(f"n{i}" for i in range(COUNT))}


def test_evaluation_batches_hold_every_record_in_order() -> None:
    rows, source = np.arange(BATCH), BAD[:13]
    batches = list(evaluation_batches(source, Preprocess(SIZE), BATCH, rows))
    good = np.concatenate([ok for _, ok in batches])
    images = np.concatenate([batch["image"] for batch, _ in batches])
    assert len(batches) == 2 and images.shape == (2 * BATCH, SIZE, SIZE, 3)
    np.testing.assert_array_equal(np.flatnonzero(~good), [4, 13, 14, 15])
    for i in np.flatnonzero(good):
        np.testing.assert_array_equal(images[i], evaluation_image(decode(source[i].image, "k"), SIZE))
    assert not images[~good].any()


def test_records_that_cannot_be_read_are_left_out(tokenizer: Tokenizer) -> None:
    class Damaged(list[Pair]):
        def __getitem__(self, index):
            if index == 2:
                raise RecordError("r2: checksum")
            return super().__getitem__(index)

    source = Damaged(PAIRS)
    ((_, good), *_) = evaluation_batches(source, Preprocess(SIZE), BATCH, np.arange(BATCH))
    np.testing.assert_array_equal(np.flatnonzero(~good), [2])
    element = elements(source, tokenizer)
    positions = {element.draws.order.index(position): position for position in range(COUNT)}
    assert element(positions[2])["rejected"] == 1


def test_evaluation_batches_split_by_rows() -> None:
    whole = list(evaluation_batches(BAD, Preprocess(SIZE), BATCH, np.arange(BATCH)))
    halves = [list(evaluation_batches(BAD, Preprocess(SIZE), BATCH, rows)) for rows in np.split(np.arange(BATCH), 2)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 3
    for (batch, good), (a, good_a), (b, good_b) in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([a["image"], b["image"]]))
        np.testing.assert_array_equal(good, np.concatenate([good_a, good_b]))
