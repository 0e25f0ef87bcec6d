"""Published weights by one name, and as a checkpoint of this project's own: of a whole model or of one tower."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.data.tokenizer import FILES, Tokenizer, load_tokenizer
from clip_jax.errors import ConfigError
from clip_jax.interop.huggingface import read_directory, write_directory
from clip_jax.interop.imported import Imported
from clip_jax.interop.open_clip import read_open_clip, read_openai, write_open_clip
from clip_jax.interop.towers import read_bert, read_timm
from clip_jax.training.checkpoint import Checkpointer
from clip_jax.training.state import TrainState

KINDS = ("hf", "openai", "open_clip", "timm", "bert")
WRITERS = {"hf": write_directory, "open_clip": write_open_clip}


def is_published(spec: str) -> bool:
    """Whether a model's name is one of others' formats: KIND:PATH."""
    return spec.split(":")[0] in KINDS and ":" in spec


def read(
    spec: str,
    *,
    image_size: int | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    embed_dim: int | None = None,
    allow: Sequence[str] = (),
) -> Imported:
    """`hf:DIR`, `openai:FILE`, `open_clip:FILE,CONFIG.json` or `open_clip:DIR` (with an open_clip_config.json);
    a tower by itself: `timm:FILE` (NFNet) or `bert:DIR`.

    Args: see `huggingface.read_directory` and, for `embed_dim`, `towers.read_timm`; so for what is raised.
    """
    kind, _, where = spec.partition(":")
    if not where:
        raise ConfigError(f"{spec}: a path after the colon expected")
    options: dict[str, Any] = dict(image_size=image_size, preprocess=preprocess, allow=allow)
    if kind == "timm":
        return read_timm(where, embed_dim=embed_dim, **options)
    if kind == "bert":
        if image_size or preprocess:
            raise ConfigError(f"{spec}: a text tower has no image_size and no preprocess")
        return read_bert(where, embed_dim=embed_dim, allow=allow)
    if embed_dim:
        raise ConfigError(f"{spec}: embed_dim is for a tower by itself, timm:FILE or bert:DIR")
    if kind == "hf":
        return read_directory(where, **options)
    if kind == "openai":
        return read_openai(where, **options)
    path, _, config = where.partition(",")
    return read_open_clip(path, config or None, **options)


def find_tokenizer(model: Imported, path: Path, given: str | None) -> str:
    """The tokenizer given, else the one beside the weights, else OpenAI's where the vocabulary has its size.

    Raises ConfigError where there is none of them.
    """
    if given:
        return given
    if path.is_dir() and any((path / name).is_file() for name in FILES):
        return str(path)
    text = model.config["text"]
    if model.family == "clip" and text["vocab_size"] == 49408:
        return "openai"
    raise ConfigError(f"{path}: no tokenizer there ({', '.join(FILES)}); name one: tokenizer=PATH or --tokenizer PATH")


def open_tokenizer(spec: str, model: Imported) -> Tokenizer:
    """Raises ConfigError where the tokenizer has more ids than the model, DataError where it can't be read."""
    tokenizer, text = load_tokenizer(spec), model.config["text"]
    if tokenizer.vocab_size > text["vocab_size"]:
        raise ConfigError(f"{spec} has {tokenizer.vocab_size} ids; this model has {text['vocab_size']}")
    tokenizer.context_length = text["context_length"]
    return tokenizer


def metadata(model: Imported, tokenizer: Tokenizer | None, tokenizer_path: str) -> dict[str, Any]:
    """What a checkpoint of a run says about itself, as far as it goes for a model that was not trained here.

    A vision tower by itself has no tokenizer, a text tower no preprocessing; neither is then mentioned.
    """
    config = {key: dict(value) if isinstance(value, Mapping) else value for key, value in model.config.items()}
    about: dict[str, Any] = {
        "family": model.family,
        "towers": {name: config[name] for name in model.towers},
        "embed_dim": config["embed_dim"],
        "activation": config["activation"],
    }
    if tokenizer is not None:
        about["tokenizer"] = {"file": tokenizer_path, "sha256": tokenizer.digest()}
    if model.preprocess:
        about["preprocess"] = model.preprocess
    return {
        "config": {"model": config, "data": {"tokenizer": tokenizer_path}},
        "model": about,
        "source": model.source,
        "imported": model.report.summary(),
    }


def save(model: Imported, tokenizer: Tokenizer | None, tokenizer_path: str, workdir: Path) -> Path:
    """Writes an imported model as checkpoint 0 of a new workdir, the tokenizer's files beside it. Returns its path.

    Every tower of it can then be started from (`config.init.vision=WORKDIR`). A vision tower by itself has no
    tokenizer.

    Raises ConfigError where there is something already.
    """
    if workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir}: not empty; name a new directory")
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        if tokenizer is not None and tokenizer_path != "openai":
            tokenizer_path = _copy_tokenizer(Path(tokenizer_path), workdir)
        params = jax.tree.map(jnp.asarray, model.variables["params"])
        state = {key: jax.tree.map(jnp.asarray, value) for key, value in model.variables.items() if key != "params"}
        checkpointer = Checkpointer(workdir / "checkpoints", keep=1)
        step = jnp.zeros((), jnp.int32)
        checkpointer.save(
            TrainState(step, params, {}, state, ()), 0, metadata(model, tokenizer, tokenizer_path) | {"step": 0}
        )
        checkpointer.wait()
    except BaseException:
        shutil.rmtree(workdir)
        raise
    return checkpointer.path(0)


def _copy_tokenizer(source: Path, workdir: Path) -> str:
    """Copies a tokenizer's files. Returns their path relative to the workdir, where `load` looks first."""
    found = [source] if source.is_file() else [source / name for name in FILES if (source / name).is_file()][:1]
    target = workdir / "tokenizer"
    target.mkdir()
    for file in (*found, found[0].parent / "tokenizer_config.json"):
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return str(Path("tokenizer") / found[0].name)
