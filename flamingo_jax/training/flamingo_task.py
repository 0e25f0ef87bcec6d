"""Flamingo as a task: a frozen tower and a frozen language model from checkpoints, the parts between them trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.pipeline import Stream
from clip_jax.errors import ConfigError
from clip_jax.losses.next_token import next_token_losses
from clip_jax.training import checkpoint
from clip_jax.training.loop import flatten
from clip_jax.training.starting_points import COSTS, check_vision, compare
from clip_jax.training.state import matches_any, merge
from flamingo_jax import adapters
from flamingo_jax.data.documents import Shape
from flamingo_jax.data.features import tower_digest
from flamingo_jax.data.mixture import Mixture
from flamingo_jax.data.tokenizer import check_vocabulary, open_tokenizer
from flamingo_jax.models.variants import build_flamingo, language_model_fields, resampler_fields

PyTree = Any
REQUIRED = ("vision", "language_model")  # of config.init, unless all is another Flamingo's
# Part → where a checkpoint's metadata describe it, and what it is called.
PARTS = {
    "vision": ("towers", "tower `vision`"),
    "language_model": ("", "language model"),
    "resampler": ("flamingo", "resampler"),
}


class FlamingoTask:
    """Next-token prediction on documents with images: a mixture of any number of data sets.

    What is frozen (`config.frozen`) is held in `config.frozen_dtype`, what is trained in float32. With
    `config.adapters.patterns`, frozen linear maps have trained low-rank adapters (`flamingo_jax.adapters`).

    Raises ConfigError where the tokenizer does not fit the language model, DataError where data are missing.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = build_flamingo(config.model)
        self.tokenizer = open_tokenizer(config.data.tokenizer, config.data.bos)
        vocab_size = config.model.language_model.vocab_size
        check_vocabulary(self.tokenizer, config.data.tokenizer, vocab_size)
        self.end_id = vocab_size  # the first id beyond the language model's: <EOC>
        self.image_size = config.model.vision.image_size
        self.schedule = config.data.get("schedule", "accumulate")
        self.mixture = Mixture(config, self.tokenizer, self.image_size, self.end_id)

    def shape(self, images: int, tokens: int) -> Shape:
        """The shape of documents of so many images and tokens."""
        return Shape(images, self.config.model.resampler.frames, self.image_size, tokens)

    def streams(self) -> Mapping[str, Stream]:
        return self.mixture.streams

    def init(self, rng: jax.Array) -> tuple[PyTree, PyTree]:
        R, S = self.config.model.resampler.frames, self.image_size
        batch = {
            "media": jnp.zeros((1, 1, R, S, S, 3), jnp.float32),
            "frame_mask": jnp.ones((1, 1, R), bool),
            "text": jnp.zeros((1, 2), jnp.int32),
            "text_mask": jnp.ones((1, 2), bool),
            "media_mask": jnp.ones((1, 2, 1), bool),
        }
        variables = dict(self.model.init(rng, batch))
        params, wanted = variables.pop("params"), self.config.get("adapters", {})
        if wanted.get("patterns"):
            key = jax.random.fold_in(rng, 1)
            params = {**params, adapters.NAME: adapters.create(params, wanted.patterns, wanted.rank, key)}
        return self.cast_frozen(params), variables

    def cast_frozen(self, params: PyTree) -> PyTree:
        """Parameters, of which the frozen ones are in `config.frozen_dtype`."""
        frozen, dtype = matches_any(self.config.frozen), self.config.get("frozen_dtype", "float32")
        flat = traverse_util.flatten_dict(params, sep="/")
        cast = {
            path: jax.tree.map(lambda x: x.astype(dtype), leaf) if frozen(path) else leaf for path, leaf in flat.items()
        }
        return traverse_util.unflatten_dict(cast, sep="/")

    def variables(self, params: PyTree, state: PyTree) -> PyTree:
        """What the model is applied with: the adapters, if any, at the kernels they belong to."""
        wanted = self.config.get("adapters", {})
        scale = wanted.alpha / wanted.rank if wanted.get("patterns") else 0.0
        return {"params": adapters.attach(params, scale), **state}

    def sources(self) -> Mapping[str, str]:
        """Where what is not initialised comes from: the tower, the language model, perhaps the resampler, or all of
        another Flamingo, of which the former replace their parts.

        What their checkpoints say of themselves is compared with the config first; so are cached features.
        """
        init = {name: path for name, path in self.config.init.items() if path}
        whole = init.pop("flamingo", "")
        for name in REQUIRED:
            if not whole and name not in init:
                raise ConfigError(f"init.{name} is empty: name the run or checkpoint that it is taken from")
        described = {name: _described(path) for name, path in init.items()}
        for name, (part, what) in PARTS.items():
            if name in init and name not in (described[name].get(part, {}) if part else described[name]):
                family = described[name].get("family", "foreign")
                raise ConfigError(f"init.{name}={init[name]}: a {family} checkpoint, without a {what}")
        if "vision" in init:
            check_vision(self.config, init["vision"])
        if "language_model" in init:
            self._check_language_model(described["language_model"])
        if "resampler" in init:
            self._check_resampler(described["resampler"]["flamingo"])
        found = init if not whole else dict.fromkeys(self._parts_of(whole), whole) | init
        self._check_features(found["vision"])
        return found

    def _check_language_model(self, theirs: Mapping[str, Any]) -> None:
        # A checkpoint may be older than a field, or name only what its source says.
        fields = language_model_fields(theirs["language_model"])
        compare("init.language_model", fields, self.config.model.language_model.to_dict(), ("embedding_std",))
        self._check_tokenizer("init.language_model", theirs)

    def _check_tokenizer(self, what: str, theirs: Mapping[str, Any]) -> None:
        digests = {"tokenizer.sha256": self.tokenizer.digest()}
        compare(what, {"tokenizer.sha256": theirs["tokenizer"]["sha256"]}, digests)

    def _check_resampler(self, flamingo: Mapping[str, Any]) -> None:
        model = self.config.model
        compare("init.resampler", resampler_fields(flamingo["resampler"]), model.resampler.to_dict())
        theirs, ours = ({"norm_tokens": False, **eye} for eye in (flamingo["vision"], model.vision.to_dict()))
        compare("init.resampler", theirs, ours, tuple(key for key in COSTS if key != "norm_tokens"))

    def _parts_of(self, path: str) -> list[str]:
        """The subtrees that a Flamingo's checkpoint gives: all, and its adapters where they are this config's."""
        theirs = _described(path)
        if "flamingo" not in theirs:
            raise ConfigError(f"init.flamingo={path}: a {theirs.get('family', 'foreign')} checkpoint, not a Flamingo")
        a, b = (flatten(model) for model in (theirs["flamingo"], self.config.model.to_dict()))
        costs = tuple(key for key in a if key.split(".")[-1] in (*COSTS, "embedding_std") and "norm_tokens" not in key)
        both = a.keys() & b.keys()  # a checkpoint may be older than a field
        compare("init.flamingo", {key: a[key] for key in both}, {key: b[key] for key in both}, costs)
        self._check_tokenizer("init.flamingo", theirs)
        compare("init.flamingo", flatten(theirs["preprocess"]), flatten(self.metadata()["preprocess"]))
        names = list(jax.eval_shape(self.init, jax.random.key(0))[0])
        if theirs.get("adapters"):
            compare("init.flamingo", flatten(theirs["adapters"]), flatten(self.metadata()["adapters"] or {}))
            return names
        return [name for name in names if name != adapters.NAME]

    def _check_features(self, vision: str) -> None:
        """Raises ConfigError where cached features are not those of this tower and these data."""
        features = self.mixture.features()
        if features:
            tower = tower_digest(self.tower(vision))
            for name, cached in features.items():
                cached.check(f"data.mixture.{name}.features", {"tower": tower, **self.features_of(name)})

    def tower(self, path: str) -> PyTree:
        """The tower's variables as a run or checkpoint stores them."""
        _, state = jax.eval_shape(self.init, jax.random.key(0))
        statistics = {name: checkpoint.load(path, f"state/{name}/vision") for name in state if "vision" in state[name]}
        return {"params": checkpoint.load(path, "params/vision"), **statistics}

    def features_of(self, name: str) -> dict[str, Any]:
        """What the features of a stream depend on, beside the tower's parameters."""
        part, model = self.config.data.mixture[name], self.config.model
        return {
            "kind": part.kind,
            "source": part.source,
            "frames": part.frames,
            "preprocess": self.metadata()["preprocess"],
            "class_token": model.get("class_token", True),
            "norm_tokens": model.vision.get("norm_tokens", False),
            "precision": [model.dtype, self.config.get("frozen_dtype", "float32")],
        }

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        losses, mask = self.token_losses(self.variables(merge(trainable, frozen), state), batch)
        gated = trainable.get("gated", {})
        gates = [gated[name] for name in ("attention_gate", "mlp_gate") if name in gated]
        metrics = {"gate": jnp.abs(jnp.tanh(jnp.concatenate(gates))).mean()} if gates else {}
        return (losses * mask).sum() / jnp.maximum(mask.sum(), 1), (metrics, state)

    def token_losses(self, variables: PyTree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(losses, mask of those that count), [B, L - 1] each."""
        logits = self.model.apply(variables, self.inputs(batch))
        return next_token_losses(logits, batch["text"]), batch["loss_mask"][:, 1:].astype(logits.dtype)

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A batch as the model takes it: uint8 images, unless it holds features, normalised, on the device."""
        if "features" in batch:
            return dict(batch)
        media = transforms.normalize(batch["media"], self.config.data.mean, self.config.data.std)
        return {**batch, "media": media}

    def abstract_variables(self) -> tuple[PyTree, PyTree]:
        """(params, state) as shapes with their shardings on the task's mesh; nothing is allocated."""
        boxed = jax.eval_shape(self.init, jax.random.key(0))
        params, state = sharding.abstract(boxed, self.mesh, sharding.rules_of(self.config.sharding_rules))
        return params, state

    def evaluate(self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None]) -> dict[str, float]:
        """Answers and losses on held-out pictures, with the right images, with shuffled ones and with none.

        On `config.evaluation.quick` questions of each task; nothing where that is 0.
        """
        from flamingo_jax.evaluation.few_shot import evaluate

        quick = self.config.evaluation.quick
        if not quick:
            return {}
        return evaluate(self, params, state, mesh, quick, quick, between).headline()

    def metadata(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "family": "flamingo",
            "flamingo": model.to_dict(),
            "adapters": self.config.adapters.to_dict() if self.config.get("adapters", {}).get("patterns") else None,
            "tokenizer": {"file": Path(self.config.data.tokenizer).name, "sha256": self.tokenizer.digest()},
            "preprocess": {
                "image_size": self.image_size,
                "mean": list(self.config.data.mean),
                "std": list(self.config.data.std),
            },
        }


def _described(path: str) -> Mapping[str, Any]:
    """What a checkpoint says of its model."""
    return checkpoint.metadata(checkpoint.latest(Path(path))).get("model", {})
