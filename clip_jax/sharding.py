"""The mesh, the rules from logical to mesh axes, and where arrays go: the only file that names mesh axes.

Axes of the mesh: `replica` (data parallel), `fsdp` (data parallel, parameters sharded) and `tensor`
(each layer sharded). Modules name logical axes; a table of rules, which a config may swap, maps the
one to the other.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import ConfigError

Rules = Sequence[tuple[str, Any]]

MESH_AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")  # the axes over which examples, and so embeddings, are sharded

# Earlier rules claim a mesh axis first. `residual` is the width of activations and of what is added to
# them; `embed` the width of a parameter: sharding both over `fsdp` would shard activations twice.
DEFAULT_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("channels", "tensor"),
    ("embed", "fsdp"),
    ("conv_in", "fsdp"),
    ("residual", None),
    ("features", None),
    ("length", None),
    ("head_size", None),
    ("joint", None),
    ("layers", None),
)


def rules_of(table: Sequence[Any]) -> Rules:
    """A config's table of (logical axis, mesh axis or axes); an empty one means the default rules."""
    return tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in table) or DEFAULT_RULES


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes `MESH_AXES` over all (or the given) devices; one size may be -1: what is left.

    Axes are Auto: under Explicit ones `with_logical_constraint` asserts instead of constraining.
    Raises ConfigError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": -1} if shape is None else dict(shape)
    if unknown := set(sizes) - set(MESH_AXES):
        raise ConfigError(f"mesh axis {sorted(unknown)[0]!r}: expected axes {', '.join(MESH_AXES)}")
    sizes = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    known = math.prod(n for n in sizes.values() if n != -1)
    if list(sizes.values()).count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices) or min(sizes.values()) < 1:
        raise ConfigError(f"mesh {dict(sizes)} needs {known} devices or a multiple; there are {len(devices)}")
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        lengths = tuple(sizes.values())
        try:
            return jax.make_mesh(lengths, MESH_AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # an axis is shorter than every one of the torus: 4 of 8×8×8
            grid = mesh_utils.create_device_mesh(lengths, devices, allow_split_physical_axes=True)
            return Mesh(grid, MESH_AXES, axis_types=types)
    # The slow network between slices carries the outermost axis that it can: of `replica`, gradients only.
    across = next((axis for axis in BATCH_AXES if sizes[axis] % slices == 0), None)
    if across is None:
        raise ConfigError(f"mesh {sizes} on {slices} slices: replica or fsdp must be a multiple of {slices}")
    outer = [slices if axis == across else 1 for axis in MESH_AXES]
    inner = [size // n for size, n in zip(sizes.values(), outer, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


@contextmanager
def use_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Inside, Linen's logical constraints are real: it finds the mesh through `jax.set_mesh` only.

    Rules are no part of jit's cache key: trace a fresh `jax.jit` for each table.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


@contextmanager
def examples_everywhere(count: int) -> Iterator[None]:
    """Inside, `count` examples are sharded over all axes of the mesh: no device repeats what another computes.

    For a part of a model whose layers are small enough to be used whole. Outside `use_mesh`, and where the mesh does
    not divide the examples, nothing changes.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if mesh.empty or count % mesh.size:
        yield
        return
    with nn.logical_axis_rules((("batch", MESH_AXES), *(rule for rule in rules if rule[0] != "batch"))):
        yield


def mesh_axes() -> int:
    """How many axes of the mesh in use have more than one device."""
    return sum(size > 1 for size in jax.sharding.get_abstract_mesh().shape.values())


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh divides a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def on_own_examples(function: Callable[..., jax.Array], x: jax.Array, whole: jax.Array) -> jax.Array:
    """`function(x, whole)`, where each device computes its own examples (rows of `x`) from all of `whole`.

    XLA's partitioner is not asked. A plain call outside `use_mesh`, and where the mesh does not divide the batch.
    """
    mesh, spec = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(("batch",))
    axes = (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1 or x.shape[0] % parts:
        return function(x, whole)
    return jax.shard_map(function, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, whole)


def take_rows(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """The rows of a table [V, D] of logical axes (vocab, embed) that ids [B, …] name, [B, …, D] in `dtype`.

    A table is used as any parameter is: put together over the axes that examples are parted over, as its gradient is
    summed over them: what that takes does not grow with the batch. Over other axes its rows stay apart, and what each
    device knows of its own examples' is summed. (Left to XLA's partitioner, a device looks up what all examples want in
    its part of the width, or puts the rows of the whole batch together.)

    A plain look-up outside `use_mesh`, and where the mesh does not divide the batch. Ids outside the table mean its
    nearest row.
    """
    ids = jnp.clip(ids, 0, table.shape[0] - 1)
    mesh, batch = jax.sharding.get_abstract_mesh(), _mesh_axes("batch")
    if mesh.empty or ids.shape[0] % math.prod(mesh.shape[axis] for axis in batch):
        return table[ids].astype(dtype)
    axes = tuple(axis for axis in _mesh_axes("vocab") if axis not in batch)
    spec = divisible(table.shape, (axes, None), mesh)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        if not spec[0]:
            return table[ids].astype(dtype)
        ids = ids - jax.lax.axis_index(axes) * table.shape[0]
        found = table[jnp.clip(ids, 0, table.shape[0] - 1)].astype(dtype)
        known = (ids >= 0) & (ids < table.shape[0])  # on one of the devices along `axes`
        return jax.lax.psum(jnp.where(known[..., None], found, 0), axes)

    with jax.named_scope("look_up"):
        return jax.shard_map(local, in_specs=(spec, PartitionSpec(batch)), out_specs=PartitionSpec(batch))(table, ids)


def _mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the mesh over which the rules lay a logical axis."""
    (axes,) = nn.logical_to_mesh_axes((name,))
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError where the mesh does not divide the batch."""
    if batch_size % batch_shards(mesh):
        raise ConfigError(
            f"batch_size {batch_size} is not divisible by the {batch_shards(mesh)} data-parallel parts "
            f"of mesh {dict(mesh.shape)}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples (the leading axis) over the data-parallel axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_names(abstract: Any, rules: Rules) -> None:
    """Raises ConfigError for a parameter's logical axis without a rule: Linen would leave it unsharded."""
    known = {name for name, _ in rules}
    for path, spec in jax.tree_util.tree_leaves_with_path(
        nn.get_partition_spec(abstract), is_leaf=lambda x: isinstance(x, PartitionSpec)
    ):
        for name in spec:
            if name is not None and name not in known:
                raise ConfigError(f"{jax.tree_util.keystr(path)}: no sharding rule for its axis {name!r}")


def logical_axes(boxed: Any) -> dict[str, tuple[str | None, ...]]:
    """The path "vision/…" of each boxed parameter → its logical axes; of one without a box none."""
    flat = traverse_util.flatten_dict(boxed, sep="/")
    return {path: tuple(x.names) if isinstance(x, nn.LogicallyPartitioned) else () for path, x in flat.items()}


def unbox(tree: Any) -> Any:
    """Parameters without their logical axes. (Flax's own unbox also constrains them, outside jit in vain.)"""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, nn.LogicallyPartitioned) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )


def tree_shardings(abstract: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """NamedShardings for a tree of (boxed) abstract parameters or of anything that mirrors them.

    A mesh axis that does not divide its dimension is dropped (a first convolution's 3 channels), and logged.
    """
    check_names(abstract, rules)
    shapes = unbox(abstract)
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)

    def fit(path: Any, leaf: Any, sharding: NamedSharding) -> NamedSharding:
        spec = divisible(leaf.shape, tuple(sharding.spec), mesh)
        if any(axis is not None and kept is None for axis, kept in zip(sharding.spec, spec, strict=False)):
            logging.debug("%s: %s not divisible by %s", jax.tree_util.keystr(path), leaf.shape, sharding.spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(fit, shapes, specs)


def divisible(shape: Sequence[int], spec: Sequence[Any], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec without the mesh axes that do not divide their dimension."""
    axes = []
    for size, axis in zip(shape, tuple(spec) + (None,) * len(shape), strict=False):
        parts = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
        axes.append(None if size % parts else axis)
    return PartitionSpec(*axes)


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """x laid out by its logical axes, inside jit and `use_mesh`. Unlike Linen's constraint, which pads what does not
    divide, this one leaves such a dimension whole: so a program may return x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, divisible(x.shape, tuple(nn.logical_to_mesh_axes(tuple(names))), mesh))


def abstract(boxed: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Boxed shapes → unboxed shapes that carry their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        unbox(boxed),
        tree_shardings(boxed, mesh, rules),
    )


def warn_of_whole(shapes: Any, mesh: Mesh) -> None:
    """Logs where much of the parameters, shapes with their shardings, stays whole on a mesh that was to part them."""
    sizes = {path: math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    whole = {
        path: sizes[path] for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if leaf.sharding.is_fully_replicated
    }  # fmt: skip
    if mesh.shape["fsdp"] > 1 and sum(whole.values()) > 0.1 * sum(sizes.values()):
        largest = max(whole, key=lambda path: whole[path])
        logging.warning(
            "%.0f%% of the parameters are whole on every device: mesh.fsdp=%d does not divide them (%s, say); a "
            "smaller fsdp with replica=-1 does", 100 * sum(whole.values()) / sum(sizes.values()), mesh.shape["fsdp"],
            jax.tree_util.keystr(largest),
        )  # fmt: skip


def put_tree(tree: Any, shardings: Any = None) -> Any:
    """Host arrays that every process has alike → arrays on the devices; by default on the first one."""
    if shardings is None:
        return jax.tree.map(jnp.asarray, tree)

    def place(value: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return jax.tree.map(place, tree, shardings)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch which this process's devices hold, sorted.

    Two processes hold the same rows where the tensor axis spans both.
    """
    rows: set[int] = set()
    for index in sharding.addressable_devices_indices_map((batch_size,)).values():
        rows.update(np.arange(batch_size)[index].tolist())
    return np.array(sorted(rows))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows of a batch (in the order of `local_rows`) → global arrays [batch_size, …]."""
    position = {row: i for i, row in enumerate(local_rows(sharding, batch_size))}

    def place(rows: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0] if index else slice(None)]
            return rows[position[wanted[0]] : position[wanted[-1]] + 1]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, shard)

    return {key: place(np.asarray(rows)) for key, rows in batch.items()}
