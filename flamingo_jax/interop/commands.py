"""What `flamingo-jax import | export | info` do: published weights as a checkpoint, a model in others' formats, what a
model is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from clip_jax.errors import ConfigError
from clip_jax.interop.mapping import Report
from flamingo_jax.data.published_tokenizers import read_tokenizer
from flamingo_jax.data.tokenizer import check_vocabulary
from flamingo_jax.interop import huggingface, published
from flamingo_jax.interop.idefics import write_idefics
from flamingo_jax.interop.open_flamingo import write_open_flamingo
from flamingo_jax.loading import Loaded, load


def import_model(spec: str, workdir: str | Path, **options: Any) -> tuple[Path, published.Published]:
    """Writes published weights as checkpoint 0 of a new workdir, which `load` then reads.

    Args:
      spec: `idefics:DIR` or `open_flamingo:CHECKPOINT.pt`.
      options: `load`'s, for published weights.

    Returns:
      The checkpoint's path, and what was read; its `model.whole_report` says what became of every tensor.

    Raises as `load` does, and ConfigError where `workdir` is not empty.
    """
    if not published.is_published(spec):
        raise ConfigError(f"{spec}: expected one of {', '.join(f'{kind}:PATH' for kind in published.KINDS)}")
    found = published.read(spec, **options)
    return published.save(found, Path(workdir)), found


def import_language_model(
    directory: str | Path, workdir: str | Path, *, allow: Sequence[str] = ()
) -> tuple[Path, Report]:
    """Writes a language model of a Hugging Face directory, with its tokenizer, as checkpoint 0 of a new workdir.

    The tokenizer may be any that `read_tokenizer` reads; in the checkpoint it is a tokenizer.json.

    A Flamingo is trained on it by `config.init.language_model`, with the checkpoint's tokenizer.json as
    `config.data.tokenizer`. Weights keep the dtype that they are stored in.

    Returns:
      The checkpoint's path, and what became of every tensor.

    Raises as `flamingo_jax.interop.huggingface.read` does; ConfigError where `workdir` is not empty, DataError where
    the tokenizer is missing or can't be read.
    """
    directory, workdir = Path(directory), Path(workdir)
    tokenizer = read_tokenizer(directory, begins=False)
    found = huggingface.read(directory, allow=allow)
    check_vocabulary(tokenizer, f"{directory}: its tokenizer", found.spec.vocab_size)
    model = {
        "family": "language_model",
        "language_model": found.fields,
        "tokenizer": {"file": published.TOKENIZER, "sha256": tokenizer.digest()},
    }
    metadata = {"model": model, "step": 0, "config": {"source": f"hf:{directory}", "family": found.family}}
    items = {"params.language_model": {"language_model": found.params}}
    return published.write(workdir, items, metadata, tokenizer.canonical()), found.report


def export_model(spec: str | Path, format: str, path: str | Path, **options: Any) -> list[Path]:
    """Writes a model as others' libraries read it.

    Args:
      spec, options: what `load` takes.
      format: a key of `WRITERS`: "idefics", a new directory, or "open_flamingo", a new file `.pt` (needs PyTorch) or
        `.safetensors`.
      path: what is written.

    Returns:
      The files.

    Raises as `load` does, and ConfigError where `path` exists or the format has no words for this model.
    """
    if format not in WRITERS:
        raise ConfigError(f"format {format!r}: expected one of {', '.join(WRITERS)}")
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path}: exists already; name a new one")
    WRITERS[format](path, load(spec, **options))
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _write_idefics(path: Path, model: Loaded) -> None:
    fields = dataclasses.asdict(model.preprocess)
    write_idefics(path, model.config, model.params, fields, model.tokenizer, model.convention)


def _write_open_flamingo(path: Path, model: Loaded) -> None:
    write_open_flamingo(path, model.config, model.params)


WRITERS: dict[str, Callable[[Path, Loaded], None]] = {"idefics": _write_idefics, "open_flamingo": _write_open_flamingo}


def info(spec: str | Path, **options: Any) -> dict[str, Any]:
    """What a model is, as JSON: family, source, numbers of parameters, sizes, preprocessing, special ids, tensors.

    Args: what `load` takes. Raises as it does.
    """
    model = load(spec, **options)
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in sorted(model.params["params"].items())
    }
    config = model.config
    return {
        "family": model.convention.family,
        "source": model.metadata.get("source", "trained here"),
        "step": model.metadata.get("step", 0),
        "parameters": {"all": sum(counts.values()), **counts},
        "vision": config["vision"],
        "resampler": config["resampler"],
        "language_model": config["language_model"],
        "gated": {key: config[key] for key in ("interval", "first_block", "heads", "head_size") if key in config}
        | dict(config.get("gated", {})),
        "preprocess": dataclasses.asdict(model.preprocess),
        "tokens": {"vocab_size": model.tokenizer.vocab_size, **dataclasses.asdict(model.convention)},
        "tensors": model.report.counts(),
    }
