"""The trainer: one loop for every task. It knows a task's contract, no model."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import ml_collections
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data.pipeline import Batches
from clip_jax.errors import ConfigError, TrainingError
from clip_jax.files import write_atomically
from clip_jax.training import checkpoint
from clip_jax.training import state as train_state
from clip_jax.training.metrics import MetricsWriter
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import TrainState
from clip_jax.training.task import Task

# A run may go on with other values of these; all the others decide what is computed.
MAY_CHANGE = ("log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "mesh", "data.threads",
              "data.prefetch", "data.cache")  # fmt: skip


def train(config: ml_collections.ConfigDict, task: Task, workdir: Path, mesh: Mesh) -> TrainState:
    """Trains until `config.steps`, from the workdir's newest checkpoint if it has one, and returns the state.

    Writes config.json, metrics.jsonl, tensorboard/ and checkpoints/ to the workdir. The losses are the same
    bits whether or not the run was killed on the way.

    Raises:
      TrainingError: a workdir of another config, a non-finite loss, too many bad records.
      CheckpointError: checkpoints that are damaged or do not fit the model.
    """
    for stream in task.streams().values():
        sharding.check_batch(stream.batch_size, mesh)
    claim_workdir(workdir, config)
    rules = sharding.rules_of(config.sharding_rules)
    with sharding.use_mesh(mesh, rules):
        axes = sharding.logical_axes(jax.eval_shape(task.init, jax.random.key(0))[0])
        optimizer = make_optimizer(config.optimizer, config.steps, axes)
        create = train_state.create_fn(task, optimizer, config.frozen)
        abstract, shardings = train_state.abstract_state(create, mesh, rules)
        checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", config.keep_checkpoints)
        checkpointer.clean()
        state = checkpointer.restore_latest(abstract)
        if state is None:
            state = first_state(task, create, abstract, shardings, config.seed)
        start = int(state.step)
        count = {name: parameter_count(tree) for name, tree in state.params.items()}
        logging.info("%s parameters (%s) on mesh %s; %s step %d of %d",
                     f"{sum(count.values()):,}", ", ".join(f"{k} {v:,}" for k, v in count.items()),
                     dict(mesh.shape), "resuming at" if start else "starting at", start, config.steps)  # fmt: skip
        if start >= config.steps:
            logging.info("all %d steps are done: nothing to train in %s", config.steps, workdir)
            return state
        step_fn = train_state.jit_train_step(train_state.train_step_fn(task, optimizer, config.seed), shardings, mesh)
        writer = MetricsWriter(workdir, start) if jax.process_index() == 0 else None
        run = _Run(config, task, workdir, mesh, checkpointer, writer)
        try:
            return run.steps(state, step_fn, start)
        finally:
            run.bar.close()
            checkpointer.wait()
            if writer is not None:
                writer.close()


class _Run:
    """The loop's surroundings: what is logged, evaluated and saved, and when."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        task: Task,
        workdir: Path,
        mesh: Mesh,
        checkpointer: checkpoint.Checkpointer,
        writer: MetricsWriter | None,
    ):
        self.config, self.task, self.mesh = config, task, mesh
        self.streams = task.streams()
        self.batch_size = sum(stream.batch_size for stream in self.streams.values())
        self.checkpointer, self.writer = checkpointer, writer
        self.metadata = run_metadata(config, task)
        self.workdir = workdir
        self.bar = tqdm(total=config.steps, desc="train", unit="step", dynamic_ncols=True,
                        disable=jax.process_index() > 0)  # fmt: skip
        self.drawn = self.rejected = 0
        self.waited = 0.0

    def batches(self, start: int) -> Iterator[tuple[train_state.Batches, int]]:
        """A batch of every stream on the devices, one step transferred ahead, with their count of bad records here."""
        data, where = self.config.data, sharding.batch_sharding(self.mesh)
        sizes = {name: stream.batch_size for name, stream in self.streams.items()}
        read = {
            name: Batches(
                stream.element, sizes[name], sharding.local_rows(where, sizes[name]), data.threads, data.prefetch
            )
            for name, stream in self.streams.items()
        }

        def placed() -> Iterator[tuple[train_state.Batches, int]]:
            for parts in zip(*(batches(start, self.config.steps) for batches in read.values()), strict=True):
                arrays = {name: dict(part) for name, part in zip(read, parts, strict=True)}
                rejected = sum(int(np.sum(part.pop("rejected", 0))) for part in arrays.values())
                yield {name: sharding.put_batch(part, where, sizes[name]) for name, part in arrays.items()}, rejected

        ahead = None
        for current in placed():
            if ahead is not None:
                yield ahead
            ahead = current
        if ahead is not None:
            yield ahead

    def steps(self, state: TrainState, step_fn: Any, start: int) -> TrainState:
        config = self.config
        self.bar.update(start)
        batches = self.batches(start)
        window_start, window_step = time.perf_counter(), start
        pending: tuple[int, Mapping[str, jax.Array]] | None = None
        for step in range(start + 1, config.steps + 1):
            before = time.perf_counter()
            batch, rejected = next(batches)
            self.waited += time.perf_counter() - before
            self.count_rejected(rejected)
            state, metrics = step_fn(state, batch)
            if pending is not None:  # one step late: the device is busy with the next by now
                self.check(*pending)
            pending = (step, metrics)
            last = step == config.steps
            log = step % config.log_every == 0 or step == 1
            evaluate = last or (config.evaluate_every and step % config.evaluate_every == 0)
            save = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if log or evaluate or save:
                values = self.check(*pending)
                pending = None
                if log or last:
                    elapsed = time.perf_counter() - window_start
                    examples = (step - window_step) * self.batch_size
                    values |= {
                        "examples_per_second": examples / elapsed,
                        "data_wait_share": self.waited / elapsed,
                        "rejected_records": float(self.rejected),
                    }
                    self.write(step, values)
                    self.waited, window_step, window_start = 0.0, step, time.perf_counter()
                paused = time.perf_counter()
                if save:  # only after the check: the last checkpoint is always a good one
                    self.checkpointer.save(state, step, self.metadata | {"step": step})
                if evaluate:
                    results = self.task.evaluate(state.params, state.model_state, self.mesh)
                    if results:
                        self.write(step, {f"evaluation/{name}": value for name, value in results.items()})
                window_start += time.perf_counter() - paused  # speed is that of training alone
            self.bar.update(1)
        return state

    def check(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """A step's metrics on the host; raises TrainingError where loss or gradient is not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                self.checkpointer.wait()
                kept = self.checkpointer.steps()
                good = f"the last good checkpoint is {self.checkpointer.path(kept[-1])}" if kept else "none was saved"
                raise TrainingError(f"step {step}: {name} is {values[name]}; training stopped, {good}")
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        return values

    def count_rejected(self, rejected: int) -> None:
        """Raises TrainingError when the share of bad records among those drawn passes the limit."""
        self.drawn += self.batch_size
        self.rejected += rejected
        limit = self.config.data.max_rejected_share
        if self.drawn >= 1000 and self.rejected > limit * self.drawn:
            raise TrainingError(
                f"{self.rejected} of {self.drawn} records drawn were bad, more than data.max_rejected_share "
                f"{limit:g}; the warnings above name them"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, values)
            shown = "  ".join(f"{name.removeprefix('evaluation/')} {value:.4g}" for name, value in values.items())
            tqdm.write(f"step {step:>6}  {shown}")


def first_state(task: Task, create: Any, abstract: TrainState, shardings: TrainState, seed: int) -> TrainState:
    """Step 0, born sharded: subtrees with a source are read from it and never initialised."""
    sources = task.sources()
    for name in sources:
        if name not in abstract.params:
            raise ConfigError(f"init.{name}: the model has no such subtree; it has {', '.join(abstract.params)}")

    def drop(tree: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in tree.items() if key not in sources}

    def without_sources(state: TrainState) -> TrainState:
        return replace(state, trainable=drop(state.trainable), frozen=drop(state.frozen))

    # Read first: what does not fit is said before anything is computed.
    read: dict[str, Any] = {}
    statistics: dict[str, dict[str, Any]] = {}
    for name, path in sources.items():
        where, item = checkpoint.latest(Path(path)), f"params.{name}"
        logging.info("%s: parameters from %s", name, where)
        checkpoint.verify(where, [item])
        read |= checkpoint.restore(where, {item: {name: abstract.params[name]}}, cast=True)[item]
        for collection, towers in abstract.model_state.items():
            if name in towers:  # BatchNorm statistics belong to the tower
                placed = jax.tree.map(lambda leaf: leaf.sharding, towers[name])
                statistics.setdefault(collection, {})[name] = checkpoint.load(
                    where, f"state/{collection}/{name}", placed
                )

    # What is dropped from the output is dead code to XLA: a tower that is read is never drawn at random.
    state = jax.jit(lambda rng: without_sources(sharding.unbox(create(rng))), out_shardings=without_sources(shardings))(
        jax.random.key(seed)
    )
    params = state.params | read
    model_state = {key: towers | statistics.get(key, {}) for key, towers in state.model_state.items()}
    trainable, frozen = train_state.partition(params, train_state.leaf_paths(abstract.frozen).__contains__)
    return replace(state, trainable=trainable, frozen=frozen, model_state=model_state)


def run_metadata(config: ml_collections.ConfigDict, task: Task) -> dict[str, Any]:
    """What every checkpoint of a run says about itself."""
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    return {
        "config": json.loads(config.to_json_best_effort()),
        "model": task.metadata(),
        "versions": versions,
    }


def parameter_count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def claim_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json to a new workdir; compares it in an old one.

    Raises TrainingError, naming the first key that differs.
    """
    path = workdir / "config.json"
    mine = flatten(json.loads(config.to_json_best_effort()))
    if path.exists():
        try:
            theirs = flatten(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise TrainingError(f"{path}: not JSON ({error}); expected the config of this run") from None
        for key in sorted(mine.keys() | theirs.keys()):
            if any(key == k or key.startswith(k + ".") for k in MAY_CHANGE):
                continue
            if mine.get(key) != theirs.get(key):
                raise TrainingError(
                    f"{workdir} was trained with another config: {key} is {theirs.get(key)!r} there and "
                    f"{mine.get(key)!r} here; name another --workdir"
                )
    elif jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, config.to_json_best_effort(indent=1) + "\n")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
