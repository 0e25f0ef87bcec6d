"""A Flamingo by its name: model, parameters, preprocessing and tokenizer as one value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.preprocess import Preprocess
from clip_jax.errors import CheckpointError, ConfigError, DataError
from clip_jax.interop.mapping import Report
from clip_jax.loading import check_finite, preprocess_of
from clip_jax.training import checkpoint
from flamingo_jax import adapters
from flamingo_jax.data.batches import make_batch
from flamingo_jax.data.conventions import Convention, open_convention
from flamingo_jax.data.tokenizer import BOS, TextTokenizer, open_tokenizer
from flamingo_jax.decoding import generate
from flamingo_jax.decoding.generation import sharding_rules
from flamingo_jax.interop import published
from flamingo_jax.interop.imported import initial_variables
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.variants import build_flamingo
from flamingo_jax.quantization import quantize

Batch = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Loaded:
    """`params` are all the variables: the parameters and, where there are any, BatchNorm statistics.

    `convention` says how the model's family writes images into ids. `metadata` is what the checkpoint says about
    itself; for published weights what one of ours would say. `report`, which can be printed, says what became of
    every tensor. A batch is what `make_batch` makes.
    """

    model: Flamingo
    params: Mapping[str, Any]
    tokenizer: TextTokenizer
    preprocess: Preprocess
    convention: Convention
    metadata: Mapping[str, Any]
    report: Report = field(repr=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model, in `flamingo_jax.models.variants.get_variant`'s shape."""
        return self.metadata["model"]["flamingo"]

    @cached_property
    def logits(self) -> Callable[[Mapping[str, Any], Batch], jax.Array]:
        """(params, batch) → the next token's logits at every place, [B, L, V + extra tokens]. Pure and jitted."""
        apply = jax.jit(lambda rules, params, batch: self.model.apply(params, batch), static_argnums=0)
        return lambda params, batch: apply(sharding_rules(), params, batch)

    def generate(
        self, params: Mapping[str, Any], batch: Batch, *, max_new_tokens: int = 20, num_beams: int = 1, **options: Any
    ) -> jax.Array:
        """What the model goes on with, [B, max_new_tokens] int32; after a row's end nothing but `end_id`.

        Pure, and compiled once for every shape of batch. `options`, and what is raised: see
        `flamingo_jax.decoding.generate`, which also returns lengths and scores.
        """
        chosen: dict[str, Any] = {"stop_ids": self.stop_ids, "decode": self.tokenizer.decode} | options
        return generate(self.model, params, batch, max_new_tokens=max_new_tokens, num_beams=num_beams, **chosen).tokens

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens at which an answer ends: `end_id` and, in a chat, the end of a turn."""
        return tuple(i for i in (self.convention.end_id, self.convention.turn_id) if i is not None)

    def make_batch(self, images: Any, text_ids: Any, text_mask: Any = None) -> dict[str, np.ndarray]:
        """A batch from what users of the model's family pass it; see `flamingo_jax.data.batches.make_batch`."""
        ids = self.model.language_model.vocab_size + self.model.extra_tokens
        return make_batch(images, text_ids, text_mask, self.convention, self.preprocess, ids)


def load(
    spec: str | Path,
    *,
    language_model: str | None = None,
    vision: str | None = None,
    norm_tokens: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
    dtype: Any = None,
    int8: bool = False,
    mesh: Mesh | None = None,
) -> Loaded:
    """A Flamingo, ready for prompts.

    Args:
      spec: a checkpoint or a run's workdir (then its newest checkpoint); or published weights: `idefics:DIR` or
        `open_flamingo:CHECKPOINT.pt`.
      tokenizer: its file or directory, where it is not beside the weights, or no longer where the run had it.
      dtype: what is computed in; by default what the checkpoint says, for published weights float32. Parameters
        keep the dtype they are stored in.
      int8: whether the frozen parts are held in int8 (`flamingo_jax.quantization`), a quarter of float32's memory.
      mesh: over which parameters are sharded, by the default rules, on every process alike; by default they are
        on the first device.

    A run's low-rank adapters are merged into what they adapt.

    The others are for published weights:
      language_model: what OpenFlamingo's checkpoint was trained around, `hf:DIR`; its tokenizer is read there, too.
      vision: its tower, as `clip_jax.load` takes it: `open_clip:FILE,CONFIG.json`, `openai:FILE`, `hf:DIR`, …
      norm_tokens: whether the resampler sees the tower's tokens after `ln_post`, as a fresh install of OpenFlamingo
        has it. The released checkpoints were trained on those before, the default.
      preprocess: "clip", "siglip" or the fields of `Preprocess`, instead of what the files say.
      allow: regular expressions for the start of names of tensors that may be missing (they are then initialised)
        or unused.
      allow_nan: whether weights that are no numbers are let through.

    Raises:
      CheckpointError: nothing there, damaged, of another architecture, or with another tokenizer than at training.
      ConfigError: the tokenizer does not fit the model, or something that the weights don't say is missing.
      DataError: no tokenizer, or none that can be read.
    """
    spec = str(spec)
    if not published.is_published(spec):
        if language_model or vision or norm_tokens or preprocess or allow or allow_nan:
            raise ConfigError(
                f"{spec}: language_model, vision, norm_tokens, preprocess, allow and allow_nan are for published "
                f"weights only ({', '.join(f'{kind}:PATH' for kind in published.KINDS)})"
            )
        loaded = _load_checkpoint(checkpoint.latest(Path(spec)), tokenizer, dtype, mesh)
        return _in_int8(loaded) if int8 else loaded
    found = published.read(
        spec, language_model=language_model, vision=vision, norm_tokens=norm_tokens, preprocess=preprocess,
        tokenizer=tokenizer, allow=allow, allow_nan=allow_nan,
    )  # fmt: skip
    config = _with_dtype(found.model.config, dtype)
    loaded = Loaded(
        model=build_flamingo(config),
        params=sharding.put_tree(found.model.variables, _shardings(config, mesh)),
        tokenizer=found.tokenizer,
        preprocess=Preprocess(**found.model.preprocess),
        convention=found.convention,
        metadata=published.metadata(found),
        report=found.model.whole_report,
    )
    return _in_int8(loaded) if int8 else loaded


def _in_int8(loaded: Loaded) -> Loaded:
    params = quantize(loaded.params["params"], loaded.config)
    return replace(loaded, params={**loaded.params, "params": params})


def _with_dtype(config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    if dtype is None:
        return dict(config)
    try:
        return {**config, "dtype": jnp.dtype(dtype).name}
    except TypeError:
        raise ConfigError(f"dtype {dtype!r}: expected float32, bfloat16 or another of numpy's names") from None


def _shardings(config: Mapping[str, Any], mesh: Mesh | None) -> Any:
    """Of every variable; nothing is allocated."""
    if mesh is None:
        return None
    return sharding.tree_shardings(jax.eval_shape(lambda: initial_variables(config)), mesh)


def _load_checkpoint(path: Path, tokenizer: str | Path | None, dtype: Any, mesh: Mesh | None) -> Loaded:
    metadata = checkpoint.metadata(path)
    about = metadata["model"]
    if "flamingo" not in about:
        raise CheckpointError(f"{path}: a {about.get('family', 'foreign')} checkpoint; expected one of a Flamingo")
    config = _with_dtype(about["flamingo"], dtype)
    words = _tokenizer(path, metadata, tokenizer)
    convention = open_convention(
        about.get("convention", "flamingo"), words, config["language_model"]["vocab_size"],
        config.get("extra_tokens", 1),
    )  # fmt: skip
    where, adapted = _shardings(config, mesh), about.get("adapters")
    parts = {**where["params"], adapters.NAME: sharding.replicated(mesh)} if mesh else None
    params = checkpoint.load(path, "params", parts)
    variables = {"params": adapters.merge(params, adapted["alpha"] / adapted["rank"]) if adapted else params}
    if (path / "state").is_dir():
        state = where and {key: value for key, value in where.items() if key != "params"}
        variables |= checkpoint.load(path, "state", state)
    report = _compared(config, variables)
    report.check(str(path), ())
    check_finite(variables, path)
    return Loaded(
        model=build_flamingo(config),
        params=variables,
        tokenizer=words,
        preprocess=preprocess_of(about),
        convention=convention,
        metadata=metadata,
        report=report,
    )


def _tokenizer(path: Path, metadata: Mapping[str, Any], given: str | Path | None) -> TextTokenizer:
    """The one given, else the one in the checkpoint or in its workdir, else the one that the run's config names."""
    data = metadata["config"]["data"]
    name = data["tokenizer"]
    if given and Path(given).is_dir():
        given = Path(given) / published.TOKENIZER
    places = [given] if given else [path / name, path.parent.parent / name, name]
    found = next((place for place in places[:-1] if Path(place).is_file()), places[-1])
    try:
        tokenizer = open_tokenizer(found, data.get("bos", BOS), data.get("pad"))
    except DataError as error:
        raise DataError(f"{path}: its tokenizer: {error}; name one: tokenizer=PATH or --tokenizer PATH") from None
    if tokenizer.digest() != metadata["model"]["tokenizer"]["sha256"]:
        raise CheckpointError(f"{path}: {found} is not the tokenizer that it was trained with")
    return tokenizer


def _compared(config: Mapping[str, Any], variables: Mapping[str, Any]) -> Report:
    """A checkpoint of ours beside the model that it says it is."""
    expected = sharding.unbox(jax.eval_shape(lambda: initial_variables(config)))
    shapes, found = ({k: x.shape for k, x in traverse_util.flatten_dict(tree, sep="/").items()}
                     for tree in (expected, variables))  # fmt: skip
    return Report(
        used={path: [path] for path in found if shapes.get(path) == found[path]},
        missing=[path for path in shapes if path not in found],
        unused=[path for path in found if path not in shapes],
        wrong_shape={k: (found[k], shapes[k]) for k in found if k in shapes and shapes[k] != found[k]},
    )
