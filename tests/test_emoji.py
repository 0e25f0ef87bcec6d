"""The builder of the embedded data set, on a few invented drawings."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from clip_jax.data import emoji
from clip_jax.data.sources import ASSETS, TfdsSource

CIRCLE = '<circle cx="8" cy="8" r="6" fill="#c00"/>'
SQUARE = '<path fill="#00c" d="M3 3h10v10H3z"/>'
NAMES = {"1F600": "grinning face", "1F34E": "red apple", "2764": "red heart", "1F697": "automobile"}


def data() -> list[dict[str, Any]]:
    """Four concepts out of order, and a regional indicator, which is no concept."""
    entries = [
        {
            "hexcode": code,
            "emoji": chr(int(code, 16)),
            "label": name,
            "group": 0,
            "order": order,
            "tags": ["Tag"],
        }
        for order, (code, name) in enumerate(NAMES.items())
    ]
    entries[2] |= {"hexcode": "2764-FE0F", "emoji": "\u2764\ufe0f"}
    return [{"hexcode": "1F1E6", "emoji": "🇦", "label": "regional indicator A"}, *reversed(entries)]


def dot(i: int) -> str:
    """What tells the drawings of one style apart."""
    return f'<rect x="{4 * i}" y="0" width="4" height="2" fill="#000"/>'


def read(package: str, member: str) -> Any:
    """What the packages would hold: by code points everywhere but in fxemoji, which goes by Unicode names."""
    heart = {"default": ["heart", "love", "red heart"]}
    files: dict[tuple[str, str], Any] = {
        ("emojibase-data", "meta/groups.json"): {"groups": {"0": "objects"}},
        ("emojibase-data", "meta/unicode-names.json"): {"1F600": "GRINNING FACE", "1F34E": "RED APPLE"},
        ("emojibase-data", "en/data.json"): data(),
        ("cldr-annotations-full", "annotations/en/annotations.json"): {
            "annotations": {"annotations": {"\u2764": heart, "🍎": {}}}
        },
    }
    if (package, member) in files:
        return files[package, member]
    style = package.removeprefix("@iconify-json/")
    body = CIRCLE if "fluent" in style else SQUARE
    if style == "fxemoji":
        icons, characters = {"grinningface": {"body": body}, "redapple": {"body": "<g/>"}}, {}
    else:
        icons = {name.replace(" ", "-"): {"body": body + dot(i)} for i, name in enumerate(NAMES.values())}
        characters = {code.lower(): name.replace(" ", "-") for code, name in NAMES.items()}
    if style == "emojione":
        del icons["red-heart"]
    return {"icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": characters}[member]


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(emoji, "HELD_OUT_CONCEPTS", 1)
    return emoji.examples(read, 16)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F600", "1f600"),
        ("2764-FE0F", "2764"),
        ("0023-FE0F-20E3", "0023-20e3"),
        ("1f1e6-1F1E7", "1f1e6-1f1e7"),
    ],
)
def test_canonical_codes(code: str, expected: str) -> None:
    assert emoji.canonical(code) == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("grinning face", "grinning-face"),
        ("woman’s hat", "womans-hat"),
        ("woman's hat", "womans-hat"),
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("Japanese “here” button", "japanese-here-button"),
        ("flag: Trinidad & Tobago", "flag-trinidad-and-tobago"),
        ("keycap: #", "keycap"),
    ],
)
def test_slugs(label: str, expected: str) -> None:
    assert emoji.slug(label) == expected


def test_concepts_are_in_unicode_order_with_their_keywords() -> None:
    found = emoji.concepts(read)
    assert [c.label for c in found] == list(NAMES.values())
    assert [c.code for c in found] == ["1f600", "1f34e", "2764", "1f697"]
    heart = found[2]
    assert heart.keywords == ("heart", "love", "tag")  # the name itself is no keyword
    assert heart.emoji == "\u2764\ufe0f" and heart.group == "objects"


def test_drawings_are_found_by_code_or_by_name() -> None:
    wanted = emoji.concepts(read)
    assert set(emoji.svg_of(read, "noto", wanted)) == {c.code for c in wanted}
    assert set(emoji.svg_of(read, "emojione", wanted)) == {"1f600", "1f34e", "1f697"}
    drawings = emoji.svg_of(read, "fxemoji", wanted)
    assert set(drawings) == {"1f600", "1f34e"}
    assert SQUARE in drawings["1f600"] and 'viewBox="0 0 16 16"' in drawings["1f600"]


def test_rasterise_centres_on_white_and_refuses_blanks() -> None:
    pytest.importorskip("resvg_py")
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="16" viewBox="0 0 32 16">'
    picture = emoji.rasterise(f'{head}<path d="M0 0h32v16H0z"/></svg>', 16)
    assert picture is not None and picture.size == (16, 16) and picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels[5:11] < 5).all() and (pixels[[0, 1, 2, -3, -2, -1]] > 250).all()
    assert emoji.rasterise(f"{head}</svg>", 16) is None


def test_examples_hold_out_styles_and_concepts(splits: dict[str, list[dict[str, Any]]]) -> None:
    (unseen,) = {record["label"] for record in splits["unseen_concepts"]}
    assert {record["label"] for record in splits["unseen_concepts_held_out_style"]} == {unseen}
    for name in ("train", "held_out_style"):
        assert {record["label"] for record in splits[name]} == set(NAMES.values()) - {unseen}
    for name, styles in (
        ("train", emoji.SEEN_STYLES),
        ("unseen_concepts", emoji.SEEN_STYLES),
        ("held_out_style", emoji.HELD_OUT_STYLES),
        ("unseen_concepts_held_out_style", emoji.HELD_OUT_STYLES),
    ):
        assert {record["style"] for record in splits[name]} <= set(styles)
    # 9 styles of 4, less emojione's heart, and of fxemoji's only the face: its apple is blank.
    assert sum(map(len, splits.values())) == 8 * 4 - 1 + 1


def test_a_drawing_used_for_two_concepts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(emoji, "HELD_OUT_CONCEPTS", 1)

    def ambiguous(package: str, member: str) -> Any:
        found = read(package, member)
        if (package, member) == ("@iconify-json/noto-v1", "icons.json"):
            found["icons"]["red-heart"] = found["icons"]["grinning-face"]
        return found

    splits = emoji.examples(ambiguous, 16)
    kept = [record["label"] for records in splits.values() for record in records if record["style"] == "noto-v1"]
    assert len(kept) == 2 and not {"red heart", "grinning face"} & set(kept)


def test_examples_are_small_webp_pictures(splits: dict[str, list[dict[str, Any]]]) -> None:
    for record in (record for records in splits.values() for record in records):
        with Image.open(io.BytesIO(record["image"])) as image:
            assert (image.format, image.size) == ("WEBP", (16, 16))
            red, _, blue = np.asarray(image.convert("RGB"))[8, 8]
        assert (red > blue) == (record["style"] in emoji.HELD_OUT_STYLES)


def test_examples_are_deterministic(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert emoji.examples(read, 16) == splits


def test_written_records_are_read_back_in_order(splits: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    directory = tmp_path / "emoji" / emoji.VERSION
    for _ in range(2):  # the second time over the first
        emoji.write(splits, directory, 16)
    for name, records in splits.items():
        source = TfdsSource(directory, name)
        assert len(source) == len(records)
        for i, record in enumerate(records):
            pair = source[i]
            assert (pair.key, pair.image, pair.text) == (record["key"], record["image"], record["label"])
            assert (pair.keywords, pair.group) == (tuple(record["keywords"]), record["group"])
            assert pair.style == record["style"]
    assert [path.name for path in directory.parent.iterdir()] == [emoji.VERSION]


def test_written_files_are_the_same_bytes_in_every_build(
    splits: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    builds = [tmp_path / name / emoji.VERSION for name in ("one", "two")]
    for directory in builds:
        emoji.write(splits, directory, 16)
    one, two = ({path.name: path.read_bytes() for path in directory.iterdir()} for directory in builds)
    assert one == two
    # One process has one order of protobuf's maps, so that alone would hold by chance: look at the order too.
    for path in builds[0].glob("*.array_record-*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        assert records
        for record in records:
            assert tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True) == record


def test_notice_names_every_package_and_licence() -> None:
    notice = (ASSETS / "emoji" / "NOTICE").read_text()
    for package, (version, _) in emoji.PACKAGES.items():
        assert f"{package} {version}" in notice
    licences = dict.fromkeys(("noto", "noto-v1", "fxemoji"), "Apache-2.0")
    licences |= dict.fromkeys(("twemoji", "emojione", "emojione-monotone", "streamline-emojis"), "CC-BY-4.0")
    licences |= dict.fromkeys(("fluent-emoji", "fluent-emoji-flat"), "MIT")
    assert set(licences) == {*emoji.SEEN_STYLES, *emoji.HELD_OUT_STYLES}
    for style, licence in licences.items():
        entry = notice.split(f"\n  {style}\n")[1].split("\n\n")[0]
        assert entry.endswith(f"Licence: {licence}")
    for text in (
        "Permission is hereby granted",
        "UNICODE LICENSE V3",
        "Microsoft Corporation",
        "Miles Johnson",
    ):
        assert text in notice
