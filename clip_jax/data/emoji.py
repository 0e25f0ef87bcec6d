"""Builds the embedded data set: emoji of many styles with their names and keywords.

Pictures come from the packages that icon sets are published in (SVG bodies in JSON), names and keywords from
emojibase and the Unicode CLDR; all of them pinned. Held out of training: every picture in the Fluent style,
and 200 concepts in all styles. A concept is one emoji without its skin tones.
"""

import collections
import functools
import hashlib
import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.data import packages
from clip_jax.data.tokenizer import train_tokenizer
from clip_jax.data.writing import write_tfds
from clip_jax.progress import brief

VERSION = "1.0.0"
SEEN_STYLES = ("noto", "noto-v1", "twemoji", "emojione", "emojione-monotone", "fxemoji", "streamline-emojis")
HELD_OUT_STYLES = ("fluent-emoji", "fluent-emoji-flat")
HELD_OUT_CONCEPTS = 200
VOCAB_SIZE = 4096

# npm package → (version, sha256 of the tarball)
PACKAGES = {
    "@iconify-json/noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "@iconify-json/fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "@iconify-json/twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "@iconify-json/emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "@iconify-json/emojione-monotone": (
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
    ),
    "@iconify-json/streamline-emojis": (
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
    "@iconify-json/fluent-emoji": (
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojibase-data": ("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "cldr-annotations-full": ("48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
}

Reader = Callable[[str, str], Any]  # (package, path in it) → parsed JSON


@dataclass(frozen=True)
class Concept:
    """One emoji: its characters' code points (lower case, without the variation selector), name, keywords."""

    code: str
    emoji: str
    label: str
    keywords: tuple[str, ...]
    group: str


def reader(cache: Path) -> Reader:
    """Fetches every package and returns a reader of its JSON files. Raises as `packages.download` does."""
    tarballs = packages.download(PACKAGES, cache)

    @functools.cache
    def read(package: str, member: str) -> Any:
        return json.loads(packages.read_member(tarballs[package], member))

    return read


def canonical(code: str) -> str:
    """ "1F1E6-FE0F" → "1f1e6": the variation selector is written by some sets only."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def concepts(read: Reader) -> list[Concept]:
    """Every emoji but skin tones, hair and regional indicators, in Unicode's order."""
    groups = read("emojibase-data", "meta/groups.json")["groups"]
    annotations = read("cldr-annotations-full", "annotations/en/annotations.json")["annotations"]["annotations"]
    keywords_of = {name.replace("\ufe0f", ""): entry.get("default", []) for name, entry in annotations.items()}
    found = []
    for entry in sorted(read("emojibase-data", "en/data.json"), key=lambda e: e.get("order", 0)):
        group = groups.get(str(entry.get("group")), "component")
        if group == "component":
            continue
        label = entry["label"]
        words = [*keywords_of.get(entry["emoji"].replace("\ufe0f", ""), []), *entry.get("tags", [])]
        keywords = dict.fromkeys(word.lower() for word in words)
        keywords.pop(label.lower(), None)
        found.append(Concept(canonical(entry["hexcode"]), entry["emoji"], label, tuple(keywords), group))
    return found


def slug(label: str) -> str:
    """ "woman’s hat" → "womans-hat", as the sets without code points name their pictures."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.replace("&", "and").replace("'", "")).strip("-")


def svg_of(read: Reader, style: str, wanted: list[Concept]) -> dict[str, str]:
    """Code → SVG of each concept that the style has a picture of."""
    package = f"@iconify-json/{style}"
    icons, characters = read(package, "icons.json"), read(package, "chars.json")
    by_code = {canonical(code): name for code, name in characters.items()}
    names = unicode_names(read) if not characters else {}
    found = {}
    for concept in wanted:
        candidates = [by_code.get(concept.code, ""), *names.get(concept.code, ())]
        if not characters:
            candidates += [slug(concept.label), slug(concept.label).replace("-", "")]
        name = next((name for name in candidates if name in icons["icons"]), None)
        if name is not None:
            icon = icons["icons"][name]
            box = [icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
            found[concept.code] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'width="{box[2]}" height="{box[3]}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
            )
    return found


def unicode_names(read: Reader) -> dict[str, tuple[str, ...]]:
    """Code → the character's Unicode name, without blanks: fxemoji's file names."""
    names: dict[str, tuple[str, ...]] = {}
    for code in read("emojibase-data", "meta/unicode-names.json").items():
        hexcode, name = canonical(code[0]), slug(code[1])
        names[hexcode] = (name.replace("-", ""),)
    return names


def rasterise(svg: str, size: int) -> Image.Image | None:
    """An RGB picture on white, size × size, the drawing centred; None for one that stays blank."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, height=4 * size))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (max(drawn.size),) * 2, (255, 255, 255, 255))
    square.alpha_composite(drawn, tuple((square.size[i] - drawn.size[i]) // 2 for i in (0, 1)))
    picture = square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return picture if np.ptp(np.asarray(picture)) > 8 else None


def held_out(wanted: list[Concept], drawings: Mapping[str, Mapping[str, str]]) -> set[str]:
    """The codes of the concepts never trained on: those of the smallest hash among the widely drawn ones."""
    everywhere = [
        c
        for c in wanted
        if c.group != "flags" and all(c.code in drawings[style] for style in ("noto", "twemoji", *HELD_OUT_STYLES))
    ]
    ordered = sorted(everywhere, key=lambda c: hashlib.sha256(f"held out: {c.label}".encode()).digest())
    return {c.code for c in ordered[:HELD_OUT_CONCEPTS]}


def examples(read: Reader, size: int) -> dict[str, list[dict[str, Any]]]:
    """Split → its records, by concept and then by style."""
    wanted = concepts(read)
    styles = (*SEEN_STYLES, *HELD_OUT_STYLES)
    drawings = {style: svg_of(read, style, wanted) for style in styles}
    unseen = held_out(wanted, drawings)
    splits: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("train", "held_out_style", "unseen_concepts", "unseen_concepts_held_out_style")
    }
    drawn_as = [(style, code, svg) for style in styles for code, svg in drawings[style].items()]
    bar = brief(drawn_as, total=len(drawn_as), desc="emoji", unit="picture")
    pictures = {(style, code): encode(svg, size) for style, code, svg in bar}
    # A drawing that a style uses for several concepts says nothing of which, and could stand on both sides.
    uses = collections.Counter((style, picture) for (style, _), picture in pictures.items())
    left_out = 0
    for concept in wanted:
        for style in styles:
            picture = pictures.get((style, concept.code))
            if picture is None or uses[style, picture] > 1:
                left_out += (style, concept.code) in pictures
                continue
            new_style, new_concept = style in HELD_OUT_STYLES, concept.code in unseen
            split = ("train", "held_out_style", "unseen_concepts", "unseen_concepts_held_out_style")[
                new_style + 2 * new_concept
            ]
            splits[split].append(
                {
                    "key": f"{style}/{concept.code}",
                    "image": picture,
                    "label": concept.label,
                    "keywords": list(concept.keywords),
                    "emoji": concept.emoji,
                    "group": concept.group,
                    "style": style,
                }
            )
    # Classified among all of them, so only in the styles that draw them all: others draw the older ones.
    drawn = collections.Counter(record["style"] for record in splits["unseen_concepts"])
    splits["unseen_concepts"] = [r for r in splits["unseen_concepts"] if drawn[r["style"]] == len(unseen)]
    logging.info("%d drawings left out: blank, unreadable, or used by their style for several concepts", left_out)
    return splits


def encode(svg: str, size: int) -> bytes | None:
    """A drawing as WebP; None for one that is blank or unreadable."""
    try:
        picture = rasterise(svg, size)
    except ValueError as error:
        logging.warning("a drawing is unreadable: %s", error)
        return None
    if picture is None:
        return None
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=80, method=6)
    return encoded.getvalue()


def build(output: Path, cache: Path, size: int = 48) -> dict[str, int]:
    """Writes `output`/VERSION (a TFDS data set) and `output`/tokenizer.json; returns the splits' sizes."""
    splits = examples(reader(cache), size)
    write(splits, output / VERSION, size)
    texts = [text for record in splits["train"] for text in (record["label"], *record["keywords"])]
    train_tokenizer(texts, VOCAB_SIZE).save(output / "tokenizer.json")
    return {name: len(records) for name, records in splits.items()}


def write(splits: Mapping[str, list[dict[str, Any]]], directory: Path, size: int) -> None:
    """Writes records in their order as a TFDS data set."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    write_tfds(
        {
            name: [record | {"image": io.BytesIO(record["image"])} for record in records]
            for name, records in splits.items()
        },
        directory,
        "emoji",
        {
            "key": text,
            "image": tfds.features.Image(shape=(size, size, 3)),
            "label": text,
            "keywords": tfds.features.Sequence(text),
            "emoji": text,
            "group": text,
            "style": text,
        },
        "Emoji in many styles with their names and keywords. See NOTICE beside it.",
    )
