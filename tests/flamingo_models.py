"""The oracles' Flamingos by name, with tokenizers made on the spot."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

ORACLES = Path(__file__).parent / "oracles"
OPEN_FLAMINGO, IDEFICS = ("of_mpt", "of_neox", "of_opt", "of_llama"), ("hf_idefics_float", "hf_idefics_vector")
IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")


def write_tokenizer(directory: Path, size: int, special: tuple[str, ...] = (), **settings: str) -> Path:
    """A tokenizer.json of the words w0, w1, …, of which 1 is <s> and 2 </s>, and of special tokens after them."""
    directory.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(size) if i not in (1, 2)} | {"<s>": 1, "</s>": 2}
    backend = Tokenizer(models.WordLevel(words, "w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", *special])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory / "tokenizer.json"


def arguments(case: str, directory: Path, **changed: Any) -> tuple[str, dict[str, Any]]:
    """What `flamingo_jax.load` is given for an oracle's model; the tokenizer is written to the directory."""
    where = ORACLES / case
    if case in IDEFICS:
        return f"idefics:{where}", {"tokenizer": write_tokenizer(directory, 90, IDEFICS_TOKENS)} | changed
    words = json.loads((where / "meta.json").read_text())["config"]["eoc_token_id"]
    given = dict(
        language_model=f"hf:{where / 'lm'}",
        vision=f"open_clip:{where / 'vision'}",
        preprocess="clip",
        tokenizer=write_tokenizer(directory, words),
    )
    return f"open_flamingo:{where / 'checkpoint.pt'}", given | changed
