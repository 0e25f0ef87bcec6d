"""Pairs, clips, interleaved pages and chats: what is read of them, where images stand, what is learned."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.order import Order
from clip_jax.errors import ConfigError, DataError, RecordError
from flamingo_jax.data.documents import END, Shape, Text, tokenise, window
from flamingo_jax.data.json_records import JsonRecords
from flamingo_jax.data.mixture import PageElements
from flamingo_jax.data.pages import Raw, decode, open_pages
from flamingo_jax.data.tokenizer import TextTokenizer, open_tokenizer

SIZE, EOC = 16, 4096
COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}
PLAIN = transforms.Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return open_tokenizer("wordnet/tokenizer.json", "<|bos|>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIZE, SIZE), colour).save(tmp_path / name)
    frames = [Image.new("RGB", (SIZE, SIZE), (28 * i, 0, 0)) for i in range(9)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    return tmp_path


def write(folder: Path, *records: Any) -> str:
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return f"json:{folder / 'data.jsonl'}"


def elements(kind: str, source: str, tokenizer: TextTokenizer, **more: Any) -> PageElements:
    pages = open_pages(kind, source)
    shape = more.pop("shape", Shape(images=2, frames=4, image_size=SIZE, tokens=48))
    return PageElements(pages, Order(len(pages), 0), tokenizer, shape, EOC, more.pop("augment", PLAIN), **more)


def said(element: dict[str, np.ndarray], tokenizer: TextTokenizer, name: str = "text_mask") -> str:
    ids = element["text"][element[name]]
    return "".join("<end>" if i == EOC else tokenizer.decode([i]) for i in ids.tolist())


def test_lines_are_read_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "é"}\n\n[1]\n{"b": \n{"c": 3}'.encode())
    records = JsonRecords(path)
    assert len(records) == 4 and records[0] == (f"{path}:1", {"a": "é"}) and records[3] == (f"{path}:5", {"c": 3})
    with pytest.raises(RecordError, match=r"a.jsonl:3: list; expected a JSON object"):
        records[1]
    with pytest.raises(RecordError, match=r"a.jsonl:4: not JSON"):
        records[2]
    path.write_text(' [{"a": 1}, {"a": 2}]')
    assert JsonRecords(path)[1] == (f"{path}:[1]", {"a": 2})
    for text, message in (
        ("[1", "not a JSON array"),
        ("[" * 100_000, "not a JSON array"),
        ("\n", "empty; expected a JSON object a line"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            JsonRecords(path)
    with pytest.raises(DataError, match="can't be read"):
        JsonRecords(tmp_path / "none")


def test_an_interleaved_page(folder: Path, tokenizer: TextTokenizer) -> None:
    source = write(folder, {"text": "a red<image>one, then<image> a green one", "images": ["red.png", "green.png"]})
    page = elements("interleaved", source, tokenizer)(0)
    assert said(page, tokenizer).removeprefix("<|bos|>") == "a red<end><image>one, then<end><image> a green one<end>"
    assert said(page, tokenizer, "loss_mask") == "a red<end>one, then<end> a green one<end>"  # no tag, no padding
    assert [tuple(page["media"][i, 0, 3, 3]) for i in (0, 1)] == [COLOURS["red.png"], COLOURS["green.png"]]
    np.testing.assert_array_equal(page["frame_mask"], [[True, False, False, False]] * 2)
    tag = tokenizer.encode("<image>")[0]
    first, second = np.flatnonzero(page["text"] == tag)
    count = int(page["text_mask"].sum())
    expected = np.zeros((48, 2), bool)
    expected[first:second, 0] = expected[second:count, 1] = True
    np.testing.assert_array_equal(page["media_mask"], expected)

    following = elements("interleaved", source, tokenizer, next_rate=1.0)(0)
    expected = np.zeros((48, 2), bool)
    expected[: first + 1, 0] = expected[first + 1 : second + 1, 1] = True
    np.testing.assert_array_equal(following["media_mask"], expected)
    everything = elements("interleaved", source, tokenizer, attend="all")(0)
    np.testing.assert_array_equal(everything["media_mask"].sum(axis=0), [count - first, count - second])


def test_the_rates_are_those_of_the_config(folder: Path, tokenizer: TextTokenizer) -> None:
    made = elements(
        "interleaved", write(folder, {"text": "<image>cat", "images": ["red.png"]}), tokenizer,
        next_rate=0.5, space_rate=0.5,
    )  # fmt: skip
    pages = [made(i) for i in range(200)]
    following = np.array([page["media_mask"][0, 0] for page in pages])  # the bos sees the image after it
    spaced = np.array([said(page, tokenizer, "loss_mask").startswith(" ") for page in pages])
    for chosen in (following, spaced, following & spaced):
        assert abs(chosen.mean() - (0.25 if chosen is not following and chosen is not spaced else 0.5)) < 0.12


def test_windows_are_random_and_hold_an_image(tokenizer: TextTokenizer) -> None:
    page = tokenise([Text("a b c d e f g h " * 8), "image", Text(" x y" * 20), "image", END], tokenizer, EOC)
    (first, end), (second, _) = page.tags
    starts = set()
    rng = np.random.default_rng(0)
    for _ in range(300):
        cut, kept = window(page, 24, rng)
        assert 1 < len(cut.ids) <= 24 and cut.ids[0] == tokenizer.bos_id and len(cut.learned) == len(cut.ids)
        assert len(kept) == len(cut.tags) >= 1
        tag = tokenizer.encode("<image>")
        for a, b in cut.tags:
            assert cut.ids[a:b] == tag
        assert sum(cut.ids.count(i) for i in tag) >= len(tag) * len(kept)
        starts.add((kept[0], cut.tags[0][0]))
    assert {kept for kept, _ in starts} == {0, 1}
    assert len({place for kept, place in starts if kept == 0}) == 24 - (end - first)  # everywhere in the window
    whole, kept = window(page, len(page.ids))
    assert whole == page and kept == [0, 1]
    start, kept = window(page, first + 3)  # the tag that this would cut is left out
    assert start.ids == page.ids[:first] and kept == [] and second > first


def test_images_beyond_the_room_are_seen_by_no_token(folder: Path, tokenizer: TextTokenizer) -> None:
    names = list(COLOURS)
    source = write(folder, {"text": "<image>a<image>b<image>c", "images": names})
    page = elements("interleaved", source, tokenizer)(0)
    last = np.flatnonzero(page["text"] == tokenizer.encode("<image>")[0])[-1]
    assert page["media_mask"][last - 1, 1] and not page["media_mask"][last:].any()
    assert said(page, tokenizer, "loss_mask").endswith("c<end>")


def test_clips_have_frames_and_pairs_one(folder: Path, tokenizer: TextTokenizer) -> None:
    clip = elements("clips", write(folder, {"video": "clip.webp", "text": "it reddens"}), tokenizer)(0)
    assert said(clip, tokenizer, "loss_mask") == "it reddens<end>"
    np.testing.assert_array_equal(clip["media"][0, :, 3, 3, 0], 28 * np.array([0, 3, 5, 8]))  # from first to last
    np.testing.assert_array_equal(clip["frame_mask"], [[True] * 4, [False] * 4])
    assert len(decode(Raw(folder / "clip.webp"), 1, "")) == len(decode(Raw(folder / "red.png"), 4, "")) == 1

    pair = elements("pairs", "emoji:unseen_concepts", tokenizer, shape=Shape(1, 1, SIZE, 32))(3)
    assert said(pair, tokenizer).removeprefix("<|bos|>").startswith("<image>") and pair["media"].any()
    assert said(pair, tokenizer, "loss_mask").endswith("<end>") and "<image>" not in said(pair, tokenizer, "loss_mask")
    short = elements("pairs", "emoji:unseen_concepts", tokenizer, shape=Shape(1, 1, SIZE, 8))(3)
    np.testing.assert_array_equal(short["text"], pair["text"][:8])  # too long: its beginning

    changed = transforms.Augmentation(scale=(0.3, 0.5), jitter=0.4, saturation=0.9, flip=0.5)
    one = elements("clips", write(folder, {"video": "clip.webp", "text": "a"}), tokenizer, augment=changed)
    assert any(not np.array_equal(one(i)["media"], clip["media"]) for i in range(4))
    frames = []
    for i in range(4):
        frames.append(Image.new("RGB", (SIZE, SIZE), (100 + 40 * i, 0, 0)))
        frames[-1].paste((0, 0, 0), (0, 0, SIZE // 2, SIZE))
    frames[0].save(folder / "half.webp", save_all=True, append_images=frames[1:], lossless=True)
    turned = transforms.Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5)
    half = elements("clips", write(folder, {"video": "half.webp", "text": "a"}), tokenizer, augment=turned)
    dark = np.array([half(i)["media"][0, :, 3, 3, 0] == 0 for i in range(30)])  # [30, F]
    assert (dark.all(axis=1) == dark.any(axis=1)).all() and 0.2 < dark.mean() < 0.8  # all frames are changed alike


OURS = {"images": ["red.png"], "conversation": [{"user": "what?"}, {"assistant": "red"}, {"user": "and?"},
                                                {"assistant": "no more"}]}  # fmt: skip
LLAVA = {"id": "7", "image": "red.png", "conversations": [
    {"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "red"},
    {"from": "human", "value": "and?"}, {"from": "gpt", "value": "no more"}]}  # fmt: skip


@pytest.mark.parametrize("record", [OURS, LLAVA], ids=["ours", "llava"])
def test_of_a_chat_only_answers_are_learned(record: Any, folder: Path, tokenizer: TextTokenizer) -> None:
    (folder / "chats.json").write_text(json.dumps([record]))
    (folder / "elsewhere").mkdir()
    (folder / "red.png").rename(folder / "elsewhere" / "red.png")
    chat = elements("chats", f"json:{folder / 'chats.json'}#{folder / 'elsewhere'}", tokenizer)(0)
    text = said(chat, tokenizer).removeprefix("<|bos|>")
    assert text == "<image>question: what? answer: red<end>question: and? answer: no more<end>"
    assert said(chat, tokenizer, "loss_mask") == " red<end> no more<end>"
    assert tuple(chat["media"][0, 0, 0, 0]) == COLOURS["red.png"]


def test_images_of_a_chat_keep_their_order(folder: Path) -> None:
    def parts(*texts: str, images: int) -> list[str]:
        turns = [{role: text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]
        record = {"images": list(COLOURS)[:images], "conversation": turns}
        page = open_pages("chats", write(folder, record))[0]
        shown = {Raw(folder / name): name[0] for name in COLOURS}
        return ["|" if p is END else p.text if isinstance(p, Text) else shown[p] for p in page.parts]  # type: ignore[index]

    assert parts("<image> a <image>", "b", images=2) == ["r", "g", "Question: a Answer:", " b", "|"]
    assert parts("<image>a<image>c<image>", "b", images=3)[1:4] == ["Question: a", "g", "c"]
    assert parts("a", "b", "<image>c", "d", images=1)[-4:] == ["r", "Question: c Answer:", " d", "|"]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("interleaved", {"text": "<image>", "images": []}, "0 images for 1 places <image>"),
        ("interleaved", {"text": "a", "images": ["red.png"]}, "1 images for 0 places <image>"),
        ("interleaved", {"images": []}, "no text; expected str text"),
        ("interleaved", {"text": "a", "images": [3]}, r"images is \[3\]; expected a list of file names"),
        ("clips", {"video": "clip.webp", "text": " "}, "the text is empty"),
        ("clips", {"text": "a"}, "no video; expected str video"),
        ("chats", {"conversation": [{"user": "a"}]}, "expected a question first, and an answer"),
        ("chats", {"conversation": [{"system": "a"}]}, "a turn of 'system'; expected a text of one of user, assistant"),
        ("chats", {"conversation": ["a"]}, "turn 'a'; expected"),
        ("chats", {"conversation": [{"user": "<image>"}, {"assistant": "b"}]}, "0 images for 1 places <image>"),
        (
            "chats",
            {"image": "red.png", "conversation": [{"user": "a"}, {"assistant": "<image>"}]},
            "<image> in an answer",
        ),
        ("chats", {"images": []}, "no conversation; expected list conversation"),
    ],
)
def test_a_record_that_does_not_fit_is_named(kind: str, record: Any, message: str, folder: Path) -> None:
    with pytest.raises(RecordError, match=rf"data.jsonl:1: {message}"):
        open_pages(kind, write(folder, record))[0]


def test_what_cannot_be_opened_or_decoded_is_named(folder: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="data of kind 'chat': expected one of .*; did you mean chats"):
        open_pages("chat", "json:x")
    with pytest.raises(DataError, match="chats 'llava:x': expected KIND:WHERE with KIND one of json"):
        open_pages("chats", "llava:x")
    with pytest.raises(RecordError, match=r"none.png: can't be read"):
        decode(Raw(folder / "none.png"), 1, "")
    with (folder / "large.png").open("wb") as file:
        file.truncate((1 << 28) + 1)  # of holes: it takes no place
    with pytest.raises(RecordError, match=r"large.png: 268,435,457 bytes; at most 268,435,456 expected") as caught:
        decode(Raw(folder / "large.png"), 1, "")
    assert caught.value.reason == "large_image"
    with pytest.raises(RecordError, match=r"^/dev/zero: can't be read \(no file\)"):
        decode(Raw(Path("/dev/zero")), 1, "")
    data = io.BytesIO((folder / "clip.webp").read_bytes()[:-200])
    with pytest.raises(RecordError, match=r"cut: "):
        transforms.decode_frames(data.getvalue(), 4, "cut")
    long = {"conversation": [{"user": "a " * 99}, {"assistant": "b"}]}
    bad, good = {"text": "<image>a", "images": ["none.png"]}, {"text": "<image>a", "images": ["red.png"]}
    made = elements("interleaved", write(folder, bad, good), tokenizer)
    assert {int(made(i)["rejected"]) > 0 for i in range(2)} == {False, True} and made(0)["media"].any()
    with pytest.raises(DataError, match="32 bad records in a row"):
        elements("chats", write(folder, long), tokenizer)(0)  # of it nothing would be learned
