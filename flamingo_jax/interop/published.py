"""Published Flamingos by one name, and as a checkpoint of this project's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.errors import ConfigError
from clip_jax.training import checkpoint
from flamingo_jax.data.conventions import SPECIAL_TOKENS, Convention, open_convention
from flamingo_jax.data.published_tokenizers import read_tokenizer
from flamingo_jax.data.tokenizer import TextTokenizer
from flamingo_jax.interop.idefics import read_config, read_idefics
from flamingo_jax.interop.imported import ImportedFlamingo
from flamingo_jax.interop.open_flamingo import read_open_flamingo

KINDS = ("idefics", "open_flamingo")
PyTree = Any
TOKENIZER = "tokenizer.json"  # in a checkpoint


class Published(NamedTuple):
    """A model with what its texts are written in. `source`: the name it was read by, without its directory."""

    model: ImportedFlamingo
    tokenizer: TextTokenizer
    convention: Convention
    source: str


def is_published(spec: str) -> bool:
    """Whether a model's name is one of others' formats: KIND:PATH."""
    return spec.split(":")[0] in KINDS and ":" in spec


def read(
    spec: str,
    *,
    language_model: str | None = None,
    vision: str | None = None,
    norm_tokens: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
) -> Published:
    """`idefics:DIR`, or `open_flamingo:CHECKPOINT.pt` with a language model `hf:DIR` and a vision tower.

    Args: see `flamingo_jax.loading.load`; so for what is raised. The tokenizer is read, and compared with the model's
    config, before any weights are.
    """
    kind, _, where = spec.partition(":")
    if not where:
        raise ConfigError(f"{spec}: a path after the colon expected")
    source = f"{kind}:{Path(where).name}"
    options: dict[str, Any] = dict(preprocess=preprocess, allow=allow, allow_nan=allow_nan)
    if kind == "idefics":
        if language_model or vision or norm_tokens:
            raise ConfigError(f"{spec}: language_model, vision and norm_tokens are for open_flamingo:CHECKPOINT.pt")
        words = read_tokenizer(tokenizer or where, begins=True)  # the processor writes <s>, not the tokenizer
        convention = _convention("idefics", words, read_config(where), where)
        return Published(read_idefics(where, **options), words, convention, source)

    forms = {"language_model": (language_model, "hf:DIR"), "vision": (vision, "open_clip:FILE,CONFIG.json")}
    for name, (given, form) in forms.items():
        if not given:
            raise ConfigError(f"{spec}: pass {name}={form}; the checkpoint holds only what was trained")
    assert language_model and vision  # as was just seen
    lm_kind, _, lm = language_model.partition(":")
    if lm_kind != "hf" or not lm:
        raise ConfigError(f"language_model={language_model}: expected hf:DIR")
    base = read_tokenizer(tokenizer or lm)
    tokens = SPECIAL_TOKENS["open_flamingo"]
    known = base.special_id(tokens["end"]) if tokens["end"] in base else base.vocab_size
    model = read_open_flamingo(where, vision, lm, known_tokens=known, norm_tokens=norm_tokens, **options)
    words = base.with_tokens([tokens["end"], tokens["image"]])
    if model.config["extra_tokens"] == 3:
        words = words.with_tokens([tokens["pad"]], pad=tokens["pad"])
    return Published(model, words, _convention("open_flamingo", words, model.config, lm), source)


def _convention(family: str, tokenizer: TextTokenizer, config: Mapping[str, Any], label: str) -> Convention:
    try:
        return open_convention(family, tokenizer, config["language_model"]["vocab_size"], config["extra_tokens"])
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None


def metadata(published: Published) -> dict[str, Any]:
    """What a checkpoint of a run says about itself, as far as it goes for a model that was not trained here."""
    model, tokenizer = published.model, published.tokenizer
    return {
        "config": {
            "model": model.config,
            "data": {"tokenizer": TOKENIZER, "bos": tokenizer.bos, "pad": tokenizer.pad},
        },
        "model": {
            "family": "flamingo",
            "flamingo": model.config,
            "convention": model.family,
            "tokenizer": {"file": TOKENIZER, "sha256": tokenizer.digest()},
            "preprocess": model.preprocess,
        },
        "source": published.source,
        "imported": model.whole_report.summary(),
    }


def save(published: Published, workdir: Path) -> Path:
    """Writes checkpoint 0 of a new workdir, complete or not at all. Returns its path.

    Raises ConfigError where there is something already.
    """
    variables = dict(published.model.variables)
    items = {f"params.{name}": {name: tree} for name, tree in variables.pop("params").items()}
    items |= {"state": variables} if variables else {}
    return write(workdir, items, metadata(published) | {"step": 0}, published.tokenizer.canonical())


def write(workdir: Path, items: Mapping[str, PyTree], metadata: Mapping[str, Any], tokenizer: str) -> Path:
    """The same of what `clip_jax.training.checkpoint.write` takes, and of a tokenizer.json's text."""
    if workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir}: not empty; name a new directory")
    path = workdir / "checkpoints" / f"{0:08d}"
    made = not workdir.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint.write(path, items, metadata, {TOKENIZER: tokenizer})
    except BaseException:
        path.parent.rmdir()
        if made:
            workdir.rmdir()
        raise
    return path
