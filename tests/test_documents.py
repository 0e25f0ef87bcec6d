"""Documents: φ, the masks, what is learned; the emoji as pages, pairs and clips; questions that a text can't answer."""

import collections
import re
from typing import Any

import numpy as np
import pytest

from clip_jax.data.sources import Pair, open_source
from clip_jax.data.transforms import Augmentation
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.data import questions
from flamingo_jax.data.documents import END, Document, Media, Shape, Text, encode, interleave, length, phi
from flamingo_jax.data.emoji import MOVES, EmojiDocuments, PromptTexts, catalogue
from flamingo_jax.data.prompts import CAPTION, Shot, few_shot, question
from flamingo_jax.data.tokenizer import TextTokenizer, open_tokenizer

SIZE, EOC = 16, 4096
SHAPE = Shape(images=3, frames=2, image_size=SIZE, tokens=48)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return open_tokenizer("wordnet/tokenizer.json", "<|bos|>")


def image(value: int, frames: int = 1) -> Media:
    return Media(np.full((frames, SIZE, SIZE, 3), value, np.uint8))


def encoded(document: Document, tokenizer: TextTokenizer, **more: Any) -> dict[str, np.ndarray]:
    return encode(document, tokenizer, SHAPE, EOC, key="a document", **more)


def test_phi_by_hand() -> None:
    places, rows = [1, 3], 6
    previous = [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    following = [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0]]
    everything = [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1], [1, 1]]
    for attend, expected in (("previous", previous), ("next", following), ("all", everything)):
        np.testing.assert_array_equal(phi(places, rows, attend), np.array(expected, bool))
    assert phi([], 4, "previous").shape == (4, 0)
    with pytest.raises(ConfigError, match="attend 'last': expected one of previous, next, all"):
        phi(places, rows, "last")


def test_a_document_becomes_arrays(tokenizer: TextTokenizer) -> None:
    tag, cat, asked = (tokenizer.encode(text) for text in ("<image>", " a cat", "what?"))
    document = Document([image(1), Text(" a cat"), END, image(2, 2), Text("what?", learned=False), Text(" a cat"), END])
    got = encoded(document, tokenizer)
    ids = [tokenizer.bos_id, *tag, *cat, EOC, *tag, *asked, *cat, EOC]
    np.testing.assert_array_equal(got["text"][: len(ids)], ids)
    np.testing.assert_array_equal(got["text_mask"], np.arange(SHAPE.tokens) < len(ids))
    learned = (
        [False] * (1 + len(tag)) + [True] * (len(cat) + 1) + [False] * (len(tag) + len(asked)) + [True] * (len(cat) + 1)
    )
    np.testing.assert_array_equal(got["loss_mask"][: len(ids)], learned)
    assert not got["loss_mask"][len(ids) :].any() and not got["media_mask"][len(ids) :].any()
    second = 1 + len(tag) + len(cat) + 1
    np.testing.assert_array_equal(
        got["media_mask"][: len(ids), 0], (np.arange(len(ids)) >= 1) & (np.arange(len(ids)) < second)
    )
    np.testing.assert_array_equal(got["media_mask"][: len(ids), 1], np.arange(len(ids)) >= second)
    np.testing.assert_array_equal(got["frame_mask"], [[True, False], [True, True], [False, False]])
    assert (got["media"][0, 0] == 1).all() and (got["media"][1] == 2).all() and not got["media"][2].any()
    assert length(document.parts, tokenizer) == len(ids) - 1

    left = encoded(document, tokenizer, left=True)
    for key in ("text", "text_mask", "media_mask", "loss_mask"):
        np.testing.assert_array_equal(left[key][-len(ids) :], got[key][: len(ids)])


def test_what_does_not_fit_is_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(RecordError, match="a document: 4 images; at most 3 expected"):
        encoded(Document([image(i) for i in range(4)]), tokenizer)
    with pytest.raises(RecordError, match=r"a document: frames \(3, 16, 16, 3\); at most \(2, 16, 16, 3\)"):
        encoded(Document([image(1, 3)]), tokenizer)
    with pytest.raises(RecordError, match=r"a document: \d+ tokens; at most 48 expected"):
        encoded(Document([Text("cat " * 60)]), tokenizer)
    with pytest.raises(ConfigError, match="1 images for 2 places <image> in the text"):
        interleave("<image> a cat <image>", [image(1)])
    with pytest.raises(ConfigError, match="2 images for 0 places"):
        interleave("a cat", [image(1), image(2)])


def test_images_go_where_the_text_says() -> None:
    first, second = image(1), image(2)
    document = interleave("My pets!<image>a dog<image>", [first, second])
    assert list(document.parts) == [Text("My pets!"), END, first, Text("a dog"), END, second, END]
    assert list(interleave("<image>a dog", [first]).parts) == [first, Text("a dog"), END]


def test_a_prompt_ends_where_the_answer_begins(tokenizer: TextTokenizer) -> None:
    shots = [Shot(image(i), question("what?"), f"thing {i}") for i in range(2)]
    document = few_shot(shots, Shot(image(9), question("what?"), "secret"))
    got = encoded(document, tokenizer, left=True)
    text = tokenizer.decode(got["text"][got["text_mask"]])
    assert text.count("thing") == 2 and "secret" not in text and text.endswith("question: what? answer:")
    assert got["text"][-1] != EOC
    np.testing.assert_array_equal(got["media_mask"][-1], [False, False, True])
    assert few_shot(shots, shots[0].without_media()).media == [shot.media for shot in shots]


def documents(kind: str, tokenizer: TextTokenizer, source: Any = None, **more: Any) -> EmojiDocuments:
    shape = Shape(images=3 if kind == "pages" else 1, frames=3 if kind == "clips" else 1, image_size=SIZE, tokens=64)
    source = source or open_source("emoji:unseen_concepts")
    return EmojiDocuments(kind, source, 0, tokenizer, shape, EOC, Augmentation(), **more)


@pytest.mark.parametrize("kind", ["pages", "pairs", "clips"])
def test_a_document_is_a_pure_function_of_its_position(kind: str, tokenizer: TextTokenizer) -> None:
    one, two = documents(kind, tokenizer), documents(kind, tokenizer)
    for position in (7, 0, 7, 1234567):
        a, b = one(position), two(position)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    assert not np.array_equal(one(0)["media"], one(1)["media"])


def test_pages_hold_captions_or_questions_of_one_task(tokenizer: TextTokenizer) -> None:
    pages = documents("pages", tokenizer)
    seen: collections.Counter[str] = collections.Counter()
    for position in range(60):
        page = pages(position)
        text = tokenizer.decode(page["text"][page["text_mask"]])
        tasks = [t for t in ("output:", "what kind", "which colour", "question: is this") if t in text]
        assert len(tasks) == 1, text
        seen[tasks[0]] += 1
        images = page["frame_mask"].any(axis=1).sum()
        assert text.count("<image>") == images >= 1
        assert (page["media_mask"].sum(axis=1) <= 1).all()  # each token sees the last image only
        assert page["loss_mask"].any()
    assert len(seen) == 4 and min(seen.values()) > 5


def test_texts_before_their_images_attend_the_next(tokenizer: TextTokenizer) -> None:
    page = documents("pages", tokenizer, next_rate=1.0, tasks=("caption",))(3)
    learned = np.flatnonzero(page["loss_mask"])
    tag = tokenizer.encode("<image>")[0]
    places = np.flatnonzero(page["text"] == tag)
    for token in learned:
        np.testing.assert_array_equal(np.flatnonzero(page["media_mask"][token]), np.flatnonzero(places > token)[:1])


def test_clips_move_as_their_text_says(tokenizer: TextTokenizer) -> None:
    clips, said = documents("clips", tokenizer), set()
    for position in range(40):
        clip = clips(position)
        text = tokenizer.decode(clip["text"][clip["text_mask"]])
        move = next(move for move in MOVES if text.endswith(move))
        said.add(move)
        frames = clip["media"][0].astype(float)
        ink = 255 - frames.mean(axis=-1)
        across, down = (ink.sum(axis=axis) @ np.arange(SIZE) / ink.sum(axis=(1, 2)) for axis in (1, 2))
        if move == "standing still":
            assert (frames[0] == frames[-1]).all()
        elif move in ("moving left", "moving right"):
            assert (across[-1] < across[0]) == (move == "moving left"), (move, across)
        elif move in ("moving up", "moving down"):
            assert (down[-1] < down[0]) == (move == "moving up"), (move, down)
        elif move in ("growing", "shrinking"):
            assert (ink[-1].sum() > ink[0].sum()) == (move == "growing")
    assert said == set(MOVES)


def test_bad_records_are_replaced_and_counted(tokenizer: TextTokenizer) -> None:
    good = open_source("emoji:unseen_concepts")
    bad = {3, 10}
    pairs = [
        Pair(f"r{i}", b"no image" if i in bad else good[i].image, good[i].text, group=good[i].group) for i in range(20)
    ]
    made = documents("pairs", tokenizer, pairs)
    rejected = [int(made(position)["rejected"]) for position in range(200)]
    assert sum(rejected) > 0 and sum(r > 0 for r in rejected) < 60


def test_answers_are_balanced_so_that_a_text_alone_knows_nothing() -> None:
    _, groups, colours = catalogue(open_source("emoji:unseen_concepts_held_out_style"), 32)
    asked = questions.ask(groups, colours, 280, 0)
    assert len(asked) >= 500
    for task in ("kind", "colour", "which"):
        counts = collections.Counter(a.answer for a in asked if a.task == task)
        assert len(set(counts.values())) == 1 and len(counts) >= 5, counts
    which = [a for a in asked if a.task == "which"]
    pairs = [a.question.removeprefix("is this ").removesuffix("?").split(" or ") for a in which]
    assert all(a.answer in pair and pair[0] != pair[1] for a, pair in zip(which, pairs, strict=True))
    first = sum(pair[0] == a.answer for a, pair in zip(which, pairs, strict=True))
    assert abs(first - len(which) / 2) <= 1
    for kind in {a.answer for a in which}:  # either of two is right about as often
        shown = [a.answer == kind for a, pair in zip(which, pairs, strict=True) if kind in pair]
        assert 0.4 < np.mean(shown) < 0.6, kind
    chance = questions.chance(asked)
    assert chance["which"] == 0.5 and chance["kind"] == 1 / len({a.answer for a in asked if a.task == "kind"})
    assert asked == questions.ask(groups, colours, 280, 0)


def test_colours_are_what_one_sees() -> None:
    for rgb, name in {
        (220, 30, 30): "red", (250, 140, 20): "orange", (250, 220, 40): "yellow", (40, 160, 60): "green",
        (40, 90, 220): "blue", (130, 60, 200): "purple", (250, 90, 170): "pink", (130, 80, 40): "brown",
        (20, 20, 20): "black", (140, 140, 140): "grey",
    }.items():  # fmt: skip
        assert questions.colour_of(*rgb) == name
        picture = np.full((16, 16, 3), 255, np.uint8)
        picture[4:12, 4:12] = rgb
        assert questions.main_colour(picture) == name
    assert questions.main_colour(np.full((16, 16, 3), 255, np.uint8)) is None
    half = np.full((16, 16, 3), (220, 30, 30), np.uint8)
    half[:, :6], half[:, 6:11] = (40, 90, 220), (250, 220, 40)
    assert questions.main_colour(half) is None


def test_a_caption_prompt_is_the_papers() -> None:
    parts = Shot(image(1), CAPTION, "a cat").parts()
    assert [part.text for part in parts if isinstance(part, Text)] == ["Output:", " a cat"]


def test_blind_pages_read_like_the_real_ones(tokenizer: TextTokenizer) -> None:
    texts = PromptTexts(open_source("emoji:unseen_concepts"), pages=40)
    assert len(texts) == 40 and texts[3] == texts[3] != texts[4]
    real = documents("pages", tokenizer)
    prompts = {
        re.split("answer:|output:", shot)[0] + shot[len(re.split("answer:|output:", shot)[0]) :].split(":")[0]
        for position in range(40)
        for page in [real(position)]
        for shot in tokenizer.decode(page["text"][page["text_mask"]]).split("<image>")[1:]
        if "is this" not in shot.replace("colour is this", "").replace("thing is this", "")
    }
    for i in range(40):
        shots = texts[i].lower().split("<image>")[1:]
        assert len(shots) == 5
        for shot in shots:
            start = shot.rsplit(":", 1)[0]
            assert start in prompts or re.fullmatch(r"question: is this \w+ or \w+\? answer", start), start
