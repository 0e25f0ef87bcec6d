"""What the tasks on image–text pairs share: data, the tower `vision`, micro-batches. The loss is each task's."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.order import Order, group_by
from clip_jax.data.pipeline import Draws, PairElements, Stream
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.sources import PairSource, open_source, texts_of
from clip_jax.data.tokenizer import load_tokenizer
from clip_jax.errors import ConfigError
from clip_jax.evaluation.encoder import Encoder, nothing
from clip_jax.evaluation.label_scores import LabelScores
from clip_jax.evaluation.pairs import Evaluation, evaluate_scores
from clip_jax.evaluation.prompts import get_templates
from clip_jax.training.micro_batches import in_micro_batches
from clip_jax.training.starting_points import check_text, check_vision
from clip_jax.training.state import matches_any, merge, partition

PyTree = Any
Batch = Mapping[str, jax.Array]


class PairTask(ABC):
    """A task whose model takes `{"image": [B,S,S,3] float, "text": [B,L] int32}`; a subclass adds the loss.

    A tower of which nothing is trained (`config.frozen`) is as in evaluation, in training, too: locked, as in LiT
    (arXiv 2111.07991), it keeps its BatchNorm statistics and drops nothing.

    Raises ConfigError where the tokenizer does not fit the text tower or `data.mixture` or `micro_batches` cannot
    be, DataError where data are missing.
    """

    family: str  # what its checkpoints are called

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, model: nn.Module):
        self.config, self.mesh, self.model = config, mesh, model
        self.schedule = config.data.get("schedule", "accumulate")  # checkpoints older than the field have configs, too
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        text = config.model.text
        end_id = text.get("end_id", self.tokenizer.end_id)  # a tower that pools at the last place has none
        pad_id = text.get("pad_id", self.tokenizer.pad_id)
        if pad_id != self.tokenizer.pad_id:
            raise ConfigError(
                f"{config.data.tokenizer} pads with id {self.tokenizer.pad_id}; model.text expects {pad_id}"
            )
        if (self.tokenizer.vocab_size, self.tokenizer.end_id) != (text.vocab_size, end_id):
            raise ConfigError(
                f"{config.data.tokenizer} has {self.tokenizer.vocab_size} ids and end id {self.tokenizer.end_id}; "
                f"model.text expects {text.vocab_size} and {end_id}"
            )
        if config.micro_batches > 1:
            self._check_micro_batches()
        self._streams = {
            name: Stream(self._elements(part.source, config.seed + number), part.batch_size, part.weight)
            for number, (name, part) in enumerate(mixture(config).items())
        }

    def _elements(self, spec: str, seed: int) -> PairElements:
        data, source = self.config.data, open_source(spec)
        groups = group_by(texts_of(source)) if data.group_by_text else None
        return PairElements(
            Draws(source, Order(len(source), seed, groups), {} if data.cache else None),
            tokenizer=self.tokenizer,
            image_size=self.config.model.vision.image_size,
            context_length=self.config.model.text.context_length,
            augment=transforms.Augmentation(**data.augment),
            keyword_rate=data.keyword_rate,
        )

    def _check_micro_batches(self) -> None:
        """Raises ConfigError where an example's output depends on its micro-batch, before anything is computed."""
        params, state = jax.eval_shape(self.init, jax.random.key(0))
        locked = locked_towers(*partition(params, matches_any(self.config.frozen)))

        def output(variables: PyTree, batch: Batch) -> PyTree:
            return self.model.apply(variables, batch, train=True, locked=locked)

        what = f"micro_batches {self.config.micro_batches}"
        try:
            jax.eval_shape(output, {"params": params, **state}, self._example())
        except flax.errors.InvalidRngError:
            raise ConfigError(
                f"{what} with dropout: every micro-batch would draw the same; expected micro_batches 1 or none "
                "(model.vision.patch_dropout 0, drop_path 0)"
            ) from None
        except flax.errors.ModifyScopeVariableError:
            raise ConfigError(
                f"{what} with a ResNet: BatchNorm statistics would be those of a micro-batch; expected "
                "micro_batches 1, a ViT or a frozen ResNet"
            ) from None

    def _example(self) -> dict[str, jax.Array]:
        """A batch of one, normalised: what a model's parameters are made from."""
        size, length = self.config.model.vision.image_size, self.config.model.text.context_length
        return {"image": jnp.zeros((1, size, size, 3), jnp.float32), "text": jnp.zeros((1, length), jnp.int32)}

    def streams(self) -> Mapping[str, Stream]:
        """A stream for each data set of the mixture; the pairs of one are no negatives of another's."""
        return self._streams

    def init(self, rng: jax.Array) -> tuple[PyTree, PyTree]:
        variables = dict(self.model.init(rng, self._example()))
        return variables.pop("params"), variables

    def abstract_variables(self) -> tuple[PyTree, PyTree]:
        """(params, state) as shapes with their shardings on the task's mesh; nothing is allocated."""
        boxed = jax.eval_shape(self.init, jax.random.key(0))
        rules = sharding.rules_of(self.config.sharding_rules)
        params, state = sharding.abstract(boxed, self.mesh, rules)
        return params, state

    def sources(self) -> Mapping[str, str]:
        """Where towers come from that are not initialised; what their checkpoints say is compared with the config.

        `init.clip` gives all of them and the temperature; the others replace their parts.
        """
        init = {name: path for name, path in self.config.init.items() if path}
        params, _ = jax.eval_shape(self.init, jax.random.key(0))
        whole = init.pop("clip", "")
        found = (dict.fromkeys(params, whole) if whole else {}) | init
        for name in locked_towers(*partition(params, matches_any(self.config.frozen))):
            if name in self.config.init and name not in found:
                raise ConfigError(f"init.{name} is empty, and the tower is frozen: name what it is taken from")
        if "vision" in found:
            check_vision(self.config, found["vision"])
        if "text" in found:
            check_text(self.config, found["text"], self.tokenizer)
        return found

    def outputs(
        self,
        trainable: PyTree,
        frozen: PyTree,
        state: PyTree,
        batch: Batch,
        rng: jax.Array,
        use: Callable[[PyTree, Batch], PyTree],
    ) -> tuple[PyTree, PyTree]:
        """(`use(output, batch)` of the model's output in training, new state), one micro-batch after the other.

        `use` returns arrays of a leading axis B, each row of its own example only.
        """
        variables = {"params": merge(trainable, frozen), **state}
        locked = locked_towers(trainable, frozen)

        def part(batch: Batch) -> tuple[PyTree, PyTree]:
            inputs = {"image": self.normalize(batch["image"]), "text": batch["text"]}
            output, new_state = self.model.apply(
                variables, inputs, train=True, locked=locked, mutable=list(state), rngs={"dropout": rng}
            )
            return use(output, batch), state | new_state

        if self.config.micro_batches == 1:
            return part(batch)
        examples = {key: batch[key] for key in ("image", "text")}
        return in_micro_batches(lambda b: part(b)[0], examples, self.config.micro_batches, self.mesh), state

    @abstractmethod
    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]: ...

    @abstractmethod
    def evaluator(
        self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None] = nothing
    ) -> Callable[[PairSource], Evaluation]:
        """Zero-shot classification and retrieval on a source; `between` is called before every batch."""

    def evaluate(self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None]) -> dict[str, float]:
        """The headline figures of each split named in `config.data.evaluate`."""
        evaluation = self.evaluator(params, state, mesh, between)
        results: dict[str, float] = {}
        for name, spec in self.config.data.evaluate.items():
            figures = evaluation(open_source(spec)).figures
            results |= {f"{name}.{key}": figures[key] for key in ("top1", "top5", "recall_at_5")}
        return results

    def encoder_of(
        self,
        function: Callable[..., jax.Array],
        params: PyTree,
        state: PyTree,
        mesh: Mesh,
        between: Callable[[], None] = nothing,
    ) -> Encoder:
        """`function(params, state, batch)` → rows, in batches over the mesh."""
        return Encoder(
            function=jax.jit(function, out_shardings=sharding.replicated(mesh)),
            params=params,
            state=state,
            mesh=mesh,
            preprocess=Preprocess(self.config.model.vision.image_size),
            tokenize=self.tokenize,
            batch_size=max(self.config.evaluation_batch_size, sharding.batch_shards(mesh)),
            between=between,
        )

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        return self.tokenizer(texts, self.config.model.text.context_length)

    def metadata(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "family": self.family,
            "towers": {"vision": model.vision.to_dict()},
            "embed_dim": model.embed_dim,
            "activation": model.activation,
            "tokenizer": {"file": Path(self.config.data.tokenizer).name, "sha256": self.tokenizer.digest()},
            "preprocess": {
                "image_size": model.vision.image_size,
                "resize": "shorter side, bicubic, centre crop",
                "mean": list(self.config.data.mean),
                "std": list(self.config.data.std),
            },
        }

    def normalize(self, image: jax.Array) -> jax.Array:
        return transforms.normalize(image, self.config.data.mean, self.config.data.std)


class LabelTask(PairTask):
    """A task whose model has no embedding of texts: it scores each label for each image (CLIP's figure 2)."""

    values_per_token: int  # see LabelScores

    @abstractmethod
    def rows(self, variables: PyTree, images: Mapping[str, jax.Array]) -> jax.Array:
        """What `scores` needs to know of a batch `{"image"}` of normalised images. [B, …]"""

    @abstractmethod
    def scores(self, variables: PyTree, rows: jax.Array, ids: jax.Array) -> jax.Array:
        """How probable the labels of `ids` [C, L] are. [B, C]"""

    def evaluator(
        self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None] = nothing
    ) -> Callable[[PairSource], Evaluation]:
        def rows(params: PyTree, state: PyTree, batch: Batch) -> jax.Array:
            return self.rows({"params": params, **state}, {"image": self.normalize(batch["image"])})

        def scores(params: PyTree, state: PyTree, rows: jax.Array, ids: jax.Array) -> jax.Array:
            return self.scores({"params": params, **state}, rows, ids)

        encoder = self.encoder_of(rows, params, state, mesh, between)
        score = LabelScores(
            function=jax.jit(scores, out_shardings=sharding.replicated(mesh)),
            params=params,
            state=state,
            mesh=mesh,
            tokenize=self.tokenize,
            end_id=self.tokenizer.end_id,
            batch_size=encoder.batch_size,
            values_per_token=self.values_per_token,
            between=between,
        )
        templates = get_templates(self.config.data.templates)
        return lambda source: evaluate_scores(encoder, source, lambda found, names: score(found, names, templates))


def mixture(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """Name → (source, batch_size, weight) of the data sets that a step draws from: `data.mixture`, or `data.train`.

    Raises ConfigError where both or neither are given, or a data set lacks a field or has another.
    """
    parts = dict(config.data.get("mixture", {}))
    if bool(parts) == bool(config.data.train):
        given = f"data.train {config.data.train!r} and data.mixture of {', '.join(parts) or 'nothing'}"
        raise ConfigError(f"{given}: expected one of them")
    if not parts:
        one = dict(source=config.data.train, batch_size=config.batch_size, weight=1.0)
        return {"pairs": ml_collections.ConfigDict(one)}
    fields = {"source", "batch_size", "weight"}
    for name, part in parts.items():
        if wrong := sorted(fields ^ set(part)):
            raise ConfigError(f"data.mixture.{name}: {wrong[0]}; expected the fields {', '.join(sorted(fields))}")
    return parts


def locked_towers(trainable: PyTree, frozen: PyTree) -> tuple[str, ...]:
    """The top-level subtrees of which nothing is trained."""
    return tuple(name for name in frozen if name not in trainable)
