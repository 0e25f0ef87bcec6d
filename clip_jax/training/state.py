"""The training state: what it is, how it is born sharded, and the step that turns it into the next."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.training.guard import Guard, judge, new_guard, select
from clip_jax.training.task import Task

PyTree = Any
Metrics = dict[str, jax.Array]
SCHEDULES = ("accumulate", "round_robin")  # of the streams that a step draws from


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters are split: gradients and optimiser state exist for the trainable ones only."""

    step: jax.Array
    trainable: PyTree
    frozen: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    guard: Guard | None = None  # of a run; None where there is none to count for

    @property
    def params(self) -> PyTree:
        return merge(self.trainable, self.frozen)


def partition(params: PyTree, is_frozen: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """(trainable, frozen), told apart by each leaf's path "vision/…"."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        parts[is_frozen(path)][path] = leaf
    trainable, frozen = (traverse_util.unflatten_dict(part, sep="/") for part in parts)
    return trainable, frozen


def leaf_paths(tree: PyTree) -> set[str]:
    """The paths "vision/…" of a nested dict's leaves."""
    return set(traverse_util.flatten_dict(tree, sep="/"))


def matches_any(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path's start matches the regular expressions; of several that do the last one counts.

    One after a "!" takes back: ("language_model/", "!language_model/final_norm") is all but the last norm.
    Raises ConfigError for one that is no regular expression.
    """
    compiled = [(_compile(pattern), not pattern.startswith("!")) for pattern in patterns]
    return lambda path: next((chosen for pattern, chosen in reversed(compiled) if pattern.match(path)), False)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("!"))
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r}: not a regular expression ({error})") from None


def check_patterns(what: str, patterns: Sequence[str], paths: Collection[str]) -> None:
    """Raises ConfigError for a pattern that is no regular expression or matches the start of no path."""
    for pattern in patterns:
        if not any(map(_compile(pattern).match, paths)):
            near = difflib.get_close_matches(pattern.removeprefix("!"), paths, n=1, cutoff=0.0)
            raise ConfigError(f"{what} {pattern!r} matches no parameter; the nearest is {near[0] if near else 'none'}")


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `partition`."""
    flat = traverse_util.flatten_dict(trainable, sep="/") | traverse_util.flatten_dict(frozen, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def create_fn(
    task: Task, optimizer: optax.GradientTransformation, frozen: Sequence[str]
) -> Callable[[jax.Array], TrainState]:
    """A pure function rng → boxed TrainState, to be traced abstractly or jitted.

    `frozen`: regular expressions for the start of the paths that are not trained (see `matches_any`).
    Raises ConfigError, when traced, for one that matches none.
    """

    def create(rng: jax.Array) -> TrainState:
        params, model_state = task.init(rng)
        check_patterns("frozen", frozen, leaf_paths(params))
        trainable, kept = partition(params, matches_any(frozen))
        step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(trainable)
        return TrainState(step, trainable, kept, model_state, opt_state, new_guard())

    return create


def abstract_state(
    create: Callable[[jax.Array], TrainState], mesh: Mesh, rules: sharding.Rules
) -> tuple[TrainState, TrainState]:
    """(shapes with shardings, shardings) of the state, without allocating anything."""
    # The key is abstract, too: devices that are only described, as launch.plan's are, can't make one.
    boxed = jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)))
    shapes = sharding.abstract(boxed, mesh, rules)
    sharding.warn_of_whole((shapes.trainable, shapes.frozen), mesh)
    return shapes, jax.tree.map(lambda leaf: leaf.sharding, shapes)


Batches = Mapping[str, Mapping[str, jax.Array]]  # stream → its batch
Step = Callable[[TrainState, Batches], tuple[TrainState, Metrics]]


def train_step_fn(task: Task, optimizer: optax.GradientTransformation, seed: int, spike_factor: float = 0.0) -> Step:
    """The step, a pure function of state and batches: randomness is a function of (seed, step, stream).

    Gradients of the streams are accumulated with their weights, as Flamingo's were (arXiv 2204.14198 §2.4), or each
    step is one stream's, in turn (`task.schedule` "round_robin", the paper's ablation). An update that is not finite,
    or a spike (`guard.judge`), is skipped; the step counts, its data are not seen again.

    Raises ConfigError for another schedule.
    """
    weights = {name: stream.weight for name, stream in task.streams().items()}
    if task.schedule not in SCHEDULES:
        raise ConfigError(f"data.schedule {task.schedule!r}: expected one of {', '.join(SCHEDULES)}")
    in_turn = task.schedule == "round_robin"

    def train_step(state: TrainState, batches: Batches) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def weighted_loss(
            trainable: PyTree, model_state: PyTree, name: str, key: jax.Array
        ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
            loss, (metrics, new) = task.loss(trainable, state.frozen, model_state, batches[name], key)
            return weights[name] * loss, ({"loss": loss} | metrics, new)

        def one(number: int, name: str, model_state: PyTree) -> tuple[Any, PyTree]:
            """((weighted loss, (metrics, new state)), gradients) of a stream."""
            key = jax.random.fold_in(rng, number)
            return jax.value_and_grad(weighted_loss, has_aux=True)(state.trainable, model_state, name, key)

        gradients = jax.tree.map(jnp.zeros_like, state.trainable)
        total, model_state = jnp.zeros(()), state.model_state
        metrics: Metrics = {}
        if in_turn:
            turn = state.step % len(weights)
            branches = [partial(one, number, name) for number, name in enumerate(weights)]
            (total, (metrics, model_state)), gradients = jax.lax.switch(turn, branches, model_state)
            metrics = metrics | {"stream": turn}
        else:
            for number, name in enumerate(weights):
                (loss, (shown, model_state)), part = one(number, name, model_state)
                total, gradients = total + loss, jax.tree.map(jnp.add, gradients, part)
                metrics |= shown if len(weights) == 1 else {f"{name}/{k}": value for k, value in shown.items()}
        norm = optax.tree.norm(gradients)
        good, guard = judge(state.guard or new_guard(), total, norm, spike_factor)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        return replace(
            state,
            step=state.step + 1,
            trainable=select(good, optax.apply_updates(state.trainable, updates), state.trainable),
            model_state=select(good, model_state, state.model_state),
            opt_state=select(good, opt_state, state.opt_state),
            guard=guard,
        ), metrics | {"loss": total, "gradient_norm": norm,
                      "skipped_updates": guard.skipped, "skipped_in_a_row": guard.in_a_row}  # fmt: skip

    return train_step


def examples_of_a_step(task: Task) -> float:
    """How many a step trains on, all streams together; where they take turns, the mean over a round."""
    return sum(stream.batch_size for stream in task.streams().values()) / period(task)


def period(task: Task) -> int:
    """After how many steps a stream has its turn again: 1 where every step draws from all."""
    return len(task.streams()) if task.schedule == "round_robin" else 1


def jit_train_step(step: Step, shardings: TrainState, mesh: Mesh) -> Step:
    """The step jitted and donated, its outputs pinned: left to XLA, a restored run would not be bit-identical."""
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
