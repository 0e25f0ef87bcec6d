"""Stand-ins for what a config names and a planner need not have: data, and a language model's tokenizer."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_collections
from tokenizers import Tokenizer, models

from clip_jax.data.tokenizer import END, PAD, START
from flamingo_jax.data.tokenizer import ASSETS

PAIRS = "emoji:unseen_concepts"  # 400 embedded pictures with names


@contextmanager
def without_data(config: ml_collections.ConfigDict) -> Iterator[ml_collections.ConfigDict]:
    """A copy of the config whose data are the embedded ones: a step's shapes are theirs as well as any others'."""
    config = ml_collections.ConfigDict(config.to_dict())
    data = config.data
    if config.task == "language_model":
        data.train, data.evaluate = ("wordnet:held_out",), "wordnet:held_out"
    else:
        data.train = PAIRS
    for part in data.get("mixture", {}).values():
        if part.get("kind", "emoji") != "emoji":
            part.kind, part.features = "pairs", ""
        if "source" in part:
            part.source = PAIRS
    if "group_by_text" in data:
        data.group_by_text = False
    with tempfile.TemporaryDirectory() as directory:
        if config.model.get("text", {}).get("kind") == "bert" and not data.tokenizer:
            data.tokenizer = str(write_vocabulary(Path(directory), config.model.text.vocab_size))
        elif "text" in config.model and not data.tokenizer:
            data.tokenizer = str(write_pieces(Path(directory), config.model.text.vocab_size))
        if "bos" in data and not any((root / data.tokenizer).is_file() for root in (Path(), ASSETS)):
            model = config.model.get("language_model", config.model)
            data.tokenizer = str(write_tokenizer(Path(directory), model.vocab_size, data.bos))
        yield config


def write_vocabulary(directory: Path, vocab_size: int) -> Path:
    """BERT's vocab.txt of so many ids, to which every text is unknown words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = directory / "vocab.txt"
    path.write_text("\n".join([*special, *(f"<{i}>" for i in range(len(special), vocab_size))]) + "\n")
    return path


def write_pieces(directory: Path, vocab_size: int) -> Path:
    """A text tower's tokenizer.json of so many ids, to which every text is one unknown word."""
    words = [PAD, *(f"<{i}>" for i in range(1, vocab_size - 2)), START, END]
    path = directory / "tokenizer.json"
    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<1>")).save(str(path))
    return path


def write_tokenizer(directory: Path, vocab_size: int, bos: str) -> Path:
    """A tokenizer.json of so many ids, to which every text is one unknown word."""
    vocabulary = {f"<{i}>": i for i in range(vocab_size - 1)} | {bos: vocab_size - 1}
    path = directory / "tokenizer.json"
    Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")).save(str(path))
    return path
