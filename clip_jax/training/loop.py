"""The trainer: one loop for every task. It knows a task's contract, no model."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import ml_collections
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.pipeline import Batches
from clip_jax.errors import ConfigError, TrainingError
from clip_jax.files import write_atomically
from clip_jax.training import checkpoint
from clip_jax.training import state as train_state
from clip_jax.training.goodput import Goodput
from clip_jax.training.meter import Meter, program_bytes
from clip_jax.training.metrics import Log, MetricsWriter
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.prediction import read_prediction
from clip_jax.training.preemption import Preemption, StoppedError
from clip_jax.training.profile import Profile
from clip_jax.training.reading import Reading, ReadingSoFar
from clip_jax.training.state import TrainState
from clip_jax.training.task import Task
from clip_jax.training.watchdog import Watchdog

# A run may go on with other values of these; all the others decide what is computed.
MAY_CHANGE = ("log_every", "evaluate_every", "checkpoint_every", "keep", "keep_every", "mesh", "data.workers",
              "data.threads", "data.prefetch", "data.cache", "guard.stop_after", "watchdog", "profile", "plan",
              "wandb")  # fmt: skip


def train(
    config: ml_collections.ConfigDict, task: Task, workdir: Path, mesh: Mesh, ideal_seconds: float | None = None
) -> TrainState:
    """Trains until `config.steps`, from the workdir's newest checkpoint if it has one, and returns the state.

    Asked to stop, by SIGTERM to any process or by Ctrl-C, it saves and returns the state of an earlier step. An
    evaluation that this cuts short is begun again by the next start.

    Writes config.json, metrics.jsonl, tensorboard/, goodput.json and checkpoints/ to the workdir. The losses are the
    same bits whether or not the run was killed on the way.

    Args:
      ideal_seconds: of a step, at the devices' peak: what MFU is measured by.

    Raises:
      TrainingError: a workdir of another config, too many skipped updates in a row, too many bad records.
      CheckpointError: checkpoints that are damaged or do not fit the model, or a last one that can't be saved.
      StoppedError: asked to stop in the evaluation after the last step, which is saved.
    """
    streams = task.streams()
    for stream in streams.values():
        sharding.check_batch(stream.batch_size, mesh)
    profile = Profile(config.profile.steps, workdir)
    batch = {name: stream.batch_size for name, stream in streams.items()}
    predicted = read_prediction(config.plan, workdir, batch, mesh.size)
    claim_workdir(workdir, config)
    rules = sharding.rules_of(config.sharding_rules)
    with Preemption() as preemption, Watchdog(config.watchdog) as watchdog, sharding.use_mesh(mesh, rules):
        axes = sharding.logical_axes(jax.eval_shape(task.init, jax.random.key(0))[0])
        optimizer = make_optimizer(config.optimizer, config.steps, axes)
        create = train_state.create_fn(task, optimizer, config.frozen)
        abstract, shardings = train_state.abstract_state(create, mesh, rules)
        checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", config.keep, config.keep_every)
        checkpointer.clean()
        state = checkpointer.restore_latest(abstract)
        if state is None:
            state = first_state(task, create, abstract, shardings, config.seed)
        start = int(state.step)
        count = {name: parameter_count(tree) for name, tree in state.params.items()}
        logging.info("%s parameters (%s) on mesh %s; %s step %d of %d",
                     f"{sum(count.values()):,}", ", ".join(f"{k} {v:,}" for k, v in count.items()),
                     dict(mesh.shape), "resuming at" if start else "starting at", start, config.steps)  # fmt: skip
        step_fn = train_state.train_step_fn(task, optimizer, config.seed, config.guard.spike_factor)
        metadata = run_metadata(config, task)
        writer = None
        if jax.process_index() == 0:
            writer = MetricsWriter(workdir, start, config.wandb.project, metadata["config"])
        run = _Run(
            config=config,
            task=task,
            mesh=mesh,
            metadata=metadata,
            checkpointer=checkpointer,
            log=Log(writer, config.steps, start, predicted),
            meter=Meter(start, train_state.examples_of_a_step(task), Goodput(workdir, start), ideal_seconds),
            watchdog=watchdog,
            preemption=preemption,
            profile=profile,
            read=ReadingSoFar(config.data.max_rejected_share, config.data.threads, config.data.get("workers", 0)),
        )
        try:
            state = run.steps(state, train_state.jit_train_step(step_fn, shardings, mesh), start)
            watchdog.other()
            checkpointer.wait()
            run.read.report()
            if run.cut_short and int(state.step) == config.steps:
                raise StoppedError
            return state
        finally:
            profile.close()
            run.log.close()


@dataclass
class _Run:
    """The loop, and its surroundings: what is logged, evaluated and saved, and when."""

    config: ml_collections.ConfigDict
    task: Task
    mesh: Mesh
    metadata: dict[str, Any]
    checkpointer: checkpoint.Checkpointer
    log: Log
    meter: Meter
    watchdog: Watchdog
    preemption: Preemption
    profile: Profile
    read: ReadingSoFar
    saved: int = 0  # the last step that was
    cut_short: bool = False  # an evaluation was

    def batches(self, start: int) -> Iterator[tuple[train_state.Batches, Reading]]:
        """A batch of every stream on the devices, one step transferred ahead, and what its reading was like here.

        Where streams take turns, a batch stays until its stream had its turn: nothing is read in vain.
        """
        data, where, streams = self.config.data, sharding.batch_sharding(self.mesh), self.task.streams()
        sizes = {name: stream.batch_size for name, stream in streams.items()}
        period = train_state.period(self.task)

        def turns(number: int, step: int) -> int:
            """Of that stream, before `step`."""
            return (step + period - 1 - number % period) // period

        read = {
            name: Batches(
                stream.element,
                sizes[name],
                sharding.local_rows(where, sizes[name]),
                data.threads,
                data.prefetch,
                data.get("workers", 0),
            ).read(first := turns(number, start), max(turns(number, self.config.steps), first + 1))
            for number, (name, stream) in enumerate(streams.items())
        }

        def placed() -> Iterator[tuple[train_state.Batches, Reading]]:
            batches: dict[str, Mapping[str, jax.Array]] = {}
            for step in range(start, self.config.steps):
                parts = []
                for number, name in enumerate(read):
                    used = name not in batches or (step - 1 - number) % period == 0  # by the step before
                    if not used or (part := next(read[name], None)) is None:  # or it has no turn any more
                        continue
                    parts.append(part)
                    arrays = {key: value for key, value in part.arrays.items() if key != "rejected"}
                    batches[name] = sharding.put_batch(arrays, where, sizes[name])
                yield dict(batches), Reading.of(parts)
            read.clear()  # what reads ends before the last evaluation begins

        ahead = None
        for current in placed():
            if ahead is not None:
                yield ahead
            ahead = current
        if ahead is not None:
            yield ahead

    def steps(self, state: TrainState, step_fn: Any, start: int) -> TrainState:
        config, meter = self.config, self.meter
        if start and self.due("evaluate", start) and not self.log.evaluated(start):
            self.evaluate(state, start)  # a kill came between save and evaluation
        if start >= config.steps:
            logging.info("all %d steps are done: nothing to train", config.steps)
            return state
        if self.cut_short or self.preemption.reached():
            logging.warning("stopped before step %d; the same command goes on from there", start + 1)
            return state
        batches = self.batches(start)
        pending: tuple[int, Mapping[str, jax.Array]] | None = None
        unsaved = False  # a save is due, and waits for an update that is not skipped
        for step in range(start + 1, config.steps + 1):
            self.watchdog.step()
            with meter.waiting(pending and pending[1]):
                batch, reading = next(batches)
            self.read.add(reading)
            if step == start + 1:
                self.watchdog.other()
                with meter.pause():
                    step_fn = step_fn.lower(state, batch).compile()
                meter.program_bytes = program_bytes(step_fn)
                self.watchdog.step()
            with self.profile.step(step):
                state, metrics = step_fn(state, batch)
            self.profile.after(step, metrics)
            if pending is not None:  # one step late: the device is busy with the next by now
                self.check(*pending)
            pending = (step, metrics)
            last, stop = step == config.steps, self.preemption.reached()
            log = last or step % config.log_every == 0 or step == 1
            unsaved |= self.due("checkpoint", step) or stop
            if log or unsaved or self.due("evaluate", step):
                values, skipped = self.check(*pending)
                pending = None
                if log:
                    figures, saves = meter.figures(step), {"failed_saves": self.checkpointer.failed}
                    self.log.write(step, values | figures | self.read.counts() | saves)
                    self.read.warn(figures["data_wait_share"] if step > start + 1 else 0.0)  # the first is always late
                if unsaved and (last or stop or not skipped):  # only after the check: what is saved is always good
                    self.save(state, step)
                    unsaved = False
                if self.due("evaluate", step) and not stop:
                    stop = not self.evaluate(state, step)
                    if stop and self.saved != step:
                        self.save(state, step)
            self.log.progress()
            if stop:
                logging.warning("stopped at step %d of %d; the same command goes on from there", step, config.steps)
                break
        return state

    def due(self, what: str, step: int) -> bool:
        """Whether `what`_every says so, or it is the last step."""
        every = self.config[f"{what}_every"]
        return step == self.config.steps or bool(every and step % every == 0)

    def save(self, state: TrainState, step: int) -> None:
        self.saved = step
        self.watchdog.other()
        self.meter.lap()
        with self.meter.pause():
            self.checkpointer.save(state, step, self.metadata | {"step": step})
            self.meter.goodput.saved(step, self.checkpointer.steps())

    def evaluate(self, state: TrainState, step: int) -> bool:
        """Whether it came to its end: it stops between two batches when the run is to stop."""

        def between() -> None:
            self.watchdog.other()
            if self.preemption.reached():
                raise StoppedError

        self.watchdog.other()
        with self.meter.pause():
            try:
                results = self.task.evaluate(state.params, state.model_state, self.mesh, between)
            except StoppedError:
                logging.warning("the evaluation of step %d is cut short", step)
                self.cut_short = True
                return False
            if results:
                self.log.write(step, {f"evaluation/{name}": value for name, value in results.items()})
        return True

    def check(self, step: int, metrics: Mapping[str, jax.Array]) -> tuple[dict[str, float], bool]:
        """(a step's metrics on the host, whether its update was skipped).

        Raises TrainingError where too many were, one after the other.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        in_a_row = int(values.pop("skipped_in_a_row"))
        self.log.show_loss(values["loss"])
        if in_a_row:
            what = f"step {step}: loss {values['loss']:g}, gradient norm {values['gradient_norm']:g}"
            logging.warning("%s: update skipped, %d in a row", what, in_a_row)
            if in_a_row >= self.config.guard.stop_after:
                self.checkpointer.wait()
                kept = self.checkpointer.steps()
                good = f"the last good checkpoint is {self.checkpointer.path(kept[-1])}" if kept else "none was saved"
                raise TrainingError(f"{what}: {in_a_row} updates skipped in a row; training stopped, {good}")
        return values, in_a_row > 0


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
        checkpoint.verify(where, [item], together=True)
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
