"""Compiles a config's training step for a topology, and reads its costs from the compiled program."""

import hashlib
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.progress import brief
from clip_jax.training import state as train_state
from clip_jax.training.loop import parameter_count
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.task import Task
from launch.planning.counting import Collective, collectives, operations
from launch.planning.hardware import GiB, Topology
from launch.planning.hlo import Program
from launch.planning.model_flops import gradient_flops
from launch.planning.stand_in import without_data

PyTree = Any
BuildTask = Callable[[ml_collections.ConfigDict, Mesh], Task]


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip while a step runs, by kind."""

    trained_parameters: float
    frozen_parameters: float
    optimizer_state: float
    model_state: float  # BatchNorm statistics
    batch: float
    padding: float  # what tiles make of all these
    program: float
    temporaries: float  # activations, gradients, results

    @property
    def peak(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and purpose in a step; bytes are those that one chip sends."""

    kind: str
    purpose: str
    between_slices: bool
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Of one step on one chip."""

    flops: float  # of matrix products and convolutions
    hbm_traffic: float
    compute_seconds: float  # of the matrix unit, with the passes that a product's precision takes
    hbm_seconds: float
    local_seconds: float  # operation by operation the longer of the two
    traffic: tuple[Traffic, ...]
    compiler_seconds: float  # all operations by the compiler's own estimates; 0 where its clock is not known
    uncounted_loops: int

    @property
    def interconnect_seconds(self) -> float:
        return sum(t.seconds for t in self.traffic)

    @property
    def step_seconds(self) -> float:
        """The roofline: the chip's own work and its transfers, the one hiding the other."""
        return max(self.local_seconds, self.interconnect_seconds)

    @property
    def limited_by(self) -> str:
        if self.interconnect_seconds > self.local_seconds:
            return "interconnect"
        return "compute" if self.compute_seconds > self.hbm_seconds else "memory bandwidth"


@dataclass(frozen=True)
class Plan:
    """A compiled step; `costs` is None where it does not fit."""

    topology: Topology
    mesh: dict[str, int]
    batch: dict[str, int]  # stream → examples of a step
    trained: int
    frozen: int
    memory: Memory
    model_flops: float  # of one chip
    costs: Costs | None
    steps: int
    program: str  # the digest of what was compiled
    compile_seconds: float  # of a CPU's time

    @property
    def fits(self) -> bool:
        return self.costs is not None and self.memory.peak <= self.topology.chip.hbm_bytes

    @property
    def mfu(self) -> float:
        assert self.costs is not None
        return self.model_flops / self.topology.chip.flops / self.costs.step_seconds

    @property
    def examples_per_second(self) -> float:
        assert self.costs is not None
        return sum(self.batch.values()) / self.costs.step_seconds

    @property
    def chip_hours(self) -> float:
        assert self.costs is not None
        return self.steps * self.costs.step_seconds * self.topology.chips / 3600


@dataclass(frozen=True)
class Lowered:
    """A step as JAX hands it to the compiler."""

    step: jax.stages.Lowered
    state: train_state.TrainState  # abstract, with its shardings
    batch: dict[str, dict[str, jax.ShapeDtypeStruct]]
    mesh: Mesh
    seconds: float  # of a CPU's time

    def digest(self) -> str:
        """Of the program, whatever config and code it comes of: 12 letters."""
        return hashlib.sha256(self.step.as_text().encode()).hexdigest()[:12]


def compile_step(config: ml_collections.ConfigDict, topology: Topology, build_task: BuildTask) -> Plan:
    """The plan of a config on a topology. No data are read, nothing is allocated, no TPU is touched.

    Raises ConfigError for a config, mesh or topology that can't be.
    """
    with without_data(config) as config, brief(total=3, desc="trace", unit="part") as bar:
        lowered = lower(config, topology, build_task)
        bar.update()
        ideal = model_flops(config, build_task, topology.devices[:1]) / topology.chips
        bar.set_description(f"compile for {topology.name}")
        bar.update()
        plan = compile_lowered(lowered, topology, config.steps, ideal)
        bar.update()
        return plan


def lower_step(config: ml_collections.ConfigDict, topology: Topology, build_task: BuildTask) -> Lowered:
    """The first part of `compile_step`, which takes seconds."""
    with without_data(config) as config:
        return lower(config, topology, build_task)


def lower(config: ml_collections.ConfigDict, topology: Topology, build_task: BuildTask) -> Lowered:
    mesh = sharding.make_mesh(config.mesh.to_dict(), topology.devices)
    task, rules = build_task(config, mesh), sharding.rules_of(config.sharding_rules)
    for stream in task.streams().values():
        sharding.check_batch(stream.batch_size, mesh)
    with sharding.use_mesh(mesh, rules):
        key = jax.eval_shape(lambda: jax.random.key(0))
        axes = sharding.logical_axes(jax.eval_shape(task.init, key)[0])
        optimizer = make_optimizer(config.optimizer, config.steps, axes)
        create = train_state.create_fn(task, optimizer, config.frozen)
        state, shardings = train_state.abstract_state(create, mesh, rules)
        batch = abstract_batch(task, mesh)
        function = train_state.train_step_fn(task, optimizer, config.seed, config.guard.spike_factor)
        step: Any = train_state.jit_train_step(function, shardings, mesh)
        start = time.process_time()
        return Lowered(step.lower(state, batch), state, batch, mesh, time.process_time() - start)


def compile_lowered(lowered: Lowered, topology: Topology, steps: int, ideal_flops: float) -> Plan:
    state, mesh = lowered.state, lowered.mesh
    kinds = {
        "trained_parameters": state.trainable,
        "frozen_parameters": state.frozen,
        "optimizer_state": state.opt_state,
        "model_state": state.model_state,
        "batch": lowered.batch,
    }
    arguments = {kind: sum(map(shard_bytes, jax.tree.leaves(tree))) for kind, tree in kinds.items()}
    start = time.process_time()
    try:
        compiled = lowered.step.compile()
    except jax.errors.JaxRuntimeError as error:
        used = used_memory(str(error))
        if used is None:
            raise
        memory = Memory(**arguments, padding=0, program=0, temporaries=used - sum(arguments.values()))
        costs = None
    else:
        memory = measured_memory(arguments, compiled.memory_analysis())
        text = compiled.as_text()
        assert text is not None
        costs = measured_costs(Program(text), topology, list(mesh.devices.flat))
    seconds = lowered.seconds + time.process_time() - start
    each = topology.chip.devices
    return Plan(
        topology=topology,
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        batch={name: next(iter(part.values())).shape[0] for name, part in lowered.batch.items()},
        trained=parameter_count(state.trainable),
        frozen=parameter_count(state.frozen),
        memory=Memory(**{field.name: each * getattr(memory, field.name) for field in fields(Memory)}),
        model_flops=ideal_flops,
        costs=costs,
        steps=steps,
        program=lowered.digest(),
        compile_seconds=seconds,
    )


def abstract_batch(task: Task, mesh: Mesh) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """What a step gets, as shapes with their shardings."""
    where = sharding.batch_sharding(mesh)
    return {
        name: {
            key: jax.ShapeDtypeStruct((stream.batch_size, *value.shape), value.dtype, sharding=where)
            for key, value in stream.element(0).items()
            if key != "rejected"
        }
        for name, stream in task.streams().items()
    }


def model_flops(config: ml_collections.ConfigDict, build_task: BuildTask, device: Any) -> int:
    """What a step's gradients ask for, all chips together (see `model_flops.py`): those of all streams, or, where
    streams take turns, the mean."""
    config = without_recomputation(config)
    mesh = sharding.make_mesh({}, device)
    task = build_task(config, mesh)
    with sharding.use_mesh(mesh, sharding.rules_of(config.sharding_rules)):
        key = jax.eval_shape(lambda: jax.random.key(0))
        params, model_state = sharding.unbox(jax.eval_shape(task.init, key))
        trainable, frozen = train_state.partition(params, train_state.matches_any(config.frozen))
        each = [
            gradient_flops(task.loss, trainable, frozen, model_state, batch, key)
            for batch in abstract_batch(task, mesh).values()
        ]
    return sum(each) // train_state.period(task)


def without_recomputation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config without rematerialisation and micro-batches."""

    def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
        off = {"remat": lambda value: False if isinstance(value, bool) else "none", "micro_batches": lambda _: 1}
        return {
            key: plain(value) if isinstance(value, Mapping) else off.get(key, lambda v: v)(value)
            for key, value in tree.items()
        }

    return ml_collections.ConfigDict(plain(config.to_dict()))


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of the part of an array that one device holds."""
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def used_memory(message: str) -> float | None:
    """The bytes on a device that XLA says it would need where memory runs out; None for another message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMG])", message)
    return float(found[1]) * {"K": 2**10, "M": 2**20, "G": GiB}[found[2]] if found else None


def measured_memory(arguments: Mapping[str, int], measured: Any) -> Memory:
    results = measured.output_size_in_bytes - measured.alias_size_in_bytes
    return Memory(
        **arguments,
        padding=measured.argument_size_in_bytes - sum(arguments.values()),
        program=measured.generated_code_size_in_bytes,
        temporaries=measured.temp_size_in_bytes + results,
    )


def measured_costs(program: Program, topology: Topology, devices: list[jax.Device]) -> Costs:
    """Costs of a program for `devices`, in the order of its mesh."""
    chip = topology.chip
    peak, rate = chip.flops / chip.devices, chip.hbm_rate / chip.devices
    flops = hbm = compute = local = cycles = 0.0
    for operation in operations(program):
        flops += operation.times * operation.flops
        hbm += operation.times * operation.hbm_bytes
        compute += operation.times * operation.passes / peak
        local += operation.times * max(operation.passes / peak, operation.hbm_bytes / rate)
        estimate = operation.instruction.config.get("window_config", {}).get("estimated_cycles", 0)
        cycles += operation.times * int(estimate)
    sums: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for collective in collectives(program, len(devices)):
        between, speed = topology.rate([devices[i] for i in collective.group])
        total = sums[collective.kind, purpose(collective), between]
        total[0] += collective.times * collective.bytes
        total[1] += collective.times * collective.bytes / speed
    each = chip.devices
    traffic = [Traffic(*key, each * sent, seconds) for key, (sent, seconds) in sums.items()]
    return Costs(
        flops=each * flops,
        hbm_traffic=each * hbm,
        compute_seconds=compute,
        hbm_seconds=hbm / rate,
        local_seconds=local,
        traffic=tuple(sorted(traffic, key=lambda t: -t.bytes)),
        compiler_seconds=cycles / chip.clock if chip.clock else 0.0,
        uncounted_loops=len(set(program.uncounted)),
    )


# Parts of an operation's path that are JAX's own, or the class of the whole model.
_WRAPPERS = re.compile(
    r"^([A-Z]\w*|while|body|cond|closed_call|eval_jaxpr|checkpoint|rematted_computation|shard_map|remat\w*)$"
)


def purpose(collective: Collective) -> str:
    """What is sent, and for what, by the path that JAX gives it: "summed in backward of vision/transformer"."""
    kind, parts = collective.kind, collective.scope.split("/")
    modules = "/".join([part for part in parts[:-1] if part.isidentifier() and not _WRAPPERS.match(part)][:2])
    if "shard_map" in parts and not modules:  # a look-up's or a convolution's stands in a module
        place = "the loss"
    elif "rematted_computation" in parts:
        place = "recomputation"
    elif "transpose(" in collective.scope:
        place = "backward"
    elif "jvp(" in collective.scope:
        place = "forward"
    else:
        place = "the rest of the step"
    done = {"collective-permute": "passed on in", "all-to-all": "exchanged in"}.get(
        kind, "gathered for" if collective.gathers else "summed in"
    )
    return f"{done} {place}" + (f" of {modules}" if modules and place != "the loss" else "")
