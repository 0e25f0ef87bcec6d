"""From their state dicts to our variables and back, both by one table for each layout.

A table's rows pair a path of ours ("params/vision/ln_post/scale") with a key of theirs. `axes` says how the
dimensions correspond, ours before the arrow: "d h k -> (h k) d" turns our kernel [D, H, K] into their matrix
[H·K, D]. A `*` in their key is the number of a layer, and stands for our leading `layers` dimension.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from clip_jax import sharding
from clip_jax.errors import CheckpointError
from clip_jax.models.variants import build_text, build_two_tower, build_vision
from clip_jax.progress import brief

Arrays = dict[str, np.ndarray]
PyTree = Any


class Row(NamedTuple):
    """`part` (i, n): ours is the i-th of n parts, which their dimension "n" counts (queries, keys and values).

    `every` (first, step): our layer i is their layer first + i·step.
    """

    ours: str
    theirs: str
    axes: str = ""
    part: tuple[int, int] = (0, 1)
    every: tuple[int, int] = (0, 1)


@dataclass
class Report:
    """What became of each tensor. `used`: their key → our paths; `unused` and `missing`: their keys;
    `wrong_shape`: their key → (its shape, the expected one); `ignored`: constants that are no weights.
    """

    used: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def check(self, label: str, allow: Sequence[str]) -> None:
        """Raises CheckpointError for a wrong shape, and for what is missing or unused and not allowed."""
        for key, (got, expected) in self.wrong_shape.items():
            raise CheckpointError(f"{label}: {key} has shape {list(got)}; this model expects {list(expected)}")
        faults = []
        for kind, keys in (("missing", self.missing), ("unused", self.unused)):
            if left := [key for key in keys if not any(re.match(pattern, key) for pattern in allow)]:
                faults.append(f"{len(left)} tensors {kind} (first: {left[0]})")
        if faults:
            raise CheckpointError(f"{label}: {', '.join(faults)}; a pattern of `allow` accepts them")

    def counts(self) -> dict[str, int]:
        return {kind: len(getattr(self, kind)) for kind in ("used", "missing", "unused", "ignored")}

    def summary(self) -> str:
        return "{used} tensors used, {missing} missing, {unused} unused, {ignored} constants ignored".format(
            **self.counts()
        )

    def add(self, name: str, other: "Report") -> None:
        """Takes in what became of another file's tensors, as `name: KEY`."""
        self.used |= {f"{name}: {key}": ours for key, ours in other.used.items()}
        for kind in ("missing", "unused", "ignored"):
            getattr(self, kind).extend(f"{name}: {key}" for key in getattr(other, kind))

    def __str__(self) -> str:
        """Every tensor and what became of it, one a line, and the summary."""
        lines = [f"used     {key} → {', '.join(ours)}" for key, ours in self.used.items()]
        for kind in ("missing", "unused", "ignored"):
            lines += [f"{kind:8} {key}" for key in getattr(self, kind)]
        return "\n".join([*lines, self.summary()])


def initial_variables(config: Mapping[str, Any]) -> PyTree:
    """The variables of a model of `get_variant`'s shape, or of the one tower that a config has, drawn from seed 0."""
    batch, towers = {}, {}
    if "vision" in config:
        size = config["vision"]["image_size"]
        batch["image"], towers["vision"] = jnp.zeros((1, size, size, 3)), build_vision
    if "text" in config:
        batch["text"], towers["text"] = jnp.zeros((1, config["text"]["context_length"]), jnp.int32), build_text

    def draw(key: jax.Array) -> PyTree:
        if len(towers) == 2:
            return build_two_tower(config).init(key, batch)
        ((name, build),) = towers.items()
        variables = build(config).init(key, *batch.values())
        return {collection: {name: tree} for collection, tree in variables.items()}

    return sharding.unbox(jax.jit(draw)(jax.random.key(0)))


def to_ours(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    label: str,
    *,
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> tuple[PyTree, Report]:
    """Their tensors as variables {"params": …, "batch_stats": …} of a two-tower model, float32.

    Args: `config`: the model, in `get_variant`'s shape; the others as for `fill`, which says what is raised.
    """

    def initial() -> PyTree:
        return initial_variables(config)

    return fill(rows, initial, tensors, label, allow=allow, ignore=ignore, dtype=np.dtype(np.float32))


def fill(
    rows: Sequence[Row],
    initial: Callable[[], PyTree],
    tensors: Mapping[str, np.ndarray],
    label: str,
    *,
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
    dtype: np.dtype | None = None,
) -> tuple[PyTree, Report]:
    """Their tensors as a tree of ours, and what became of each.

    Args:
      rows: the layout. Rows for variables that this model lacks are passed over.
      initial: what draws the model's variables. Its shapes alone are used, unless `allow` lets tensors be missing.
      tensors: their key → array of any float dtype; it may be read when it is asked for.
      label: what errors begin with: the file.
      allow: regular expressions for the start of keys that may be missing (they are then initialised) or unused.
      ignore: the same, for constants that carry no weights.
      dtype: of what is returned; None: as it is stored (of several layers, the widest).

    Raises:
      CheckpointError: a tensor is missing, left over, of another shape, or not of finite floats.
    """
    # As large a model as a config may claim: only its shapes are made.
    shapes = {path: x.shape for path, x in _flat(sharding.unbox(jax.eval_shape(initial))).items()}
    report = Report()
    found: Arrays = {}
    left_out = set()
    for row in brief(rows, total=len(rows), desc="weights", unit="row"):
        if row.ours not in shapes:
            continue
        pieces = []
        for key, expected in _keys(row, shapes[row.ours]):
            if key not in tensors:
                report.missing.append(key)
            elif (value := tensors[key]).shape != expected:
                report.wrong_shape[key] = (value.shape, expected)
            else:
                report.used.setdefault(key, []).append(row.ours)
                pieces.append(_from_theirs(row, _as_floats(value, dtype, f"{label}: {key}"), shapes[row.ours]))
        if len(pieces) == _layers(row, shapes[row.ours]):
            widest = functools.reduce(jnp.promote_types, (piece.dtype for piece in pieces))
            found[row.ours] = np.stack(pieces, dtype=widest) if "*" in row.theirs else pieces[0]
        else:
            left_out.add(row.ours)
    report.missing = list(dict.fromkeys(report.missing))
    for key in tensors:
        if key not in report.used and key not in report.wrong_shape:
            (report.ignored if any(re.match(p, key) for p in ignore) else report.unused).append(key)
    report.check(label, allow)
    if left_out:

        def drawn() -> dict[str, jax.Array]:
            return {path: x for path, x in _flat(sharding.unbox(initial())).items() if path in left_out}

        found |= {path: np.asarray(x) for path, x in jax.jit(drawn)().items()}  # XLA draws no others
    if unmapped := sorted(shapes.keys() - found.keys()):
        raise CheckpointError(f"{label}: this layout has no {unmapped[0]}")
    return traverse_util.unflatten_dict(found, sep="/"), report


def to_theirs(rows: Sequence[Row], variables: PyTree) -> Arrays:
    """The inverse of `to_ours`: their key → array, of our dtypes.

    Raises CheckpointError naming a variable that the layout has no place for.
    """
    ours = {path: np.asarray(leaf) for path, leaf in _flat(variables).items()}
    if unmapped := sorted(ours.keys() - {row.ours for row in rows}):
        raise CheckpointError(f"this layout has no place for {unmapped[0]}")
    parts: dict[str, dict[int, np.ndarray]] = {}
    theirs: Arrays = {}
    for row in brief(rows, total=len(rows), desc="weights", unit="row"):
        if row.ours in ours:
            value = ours[row.ours]
            layers = value if "*" in row.theirs else [value]
            for (key, shape), layer in zip(_keys(row, value.shape), layers, strict=True):
                left, right = _axes(row)
                moved = layer.transpose([left.index(name) for name in right if name in left]) if row.axes else layer
                found = parts.setdefault(key, {})
                found[row.part[0]] = moved
                if len(found) == row.part[1]:
                    joined = np.stack([found[i] for i in sorted(found)], right.index("n")) if "n" in right else moved
                    theirs[key] = np.array(joined.reshape(shape), order="C")
    return theirs


def resize_positions(position_NxD: np.ndarray, grid: int, prefix: int) -> np.ndarray:
    """A square grid's position embedding for another grid, [prefix + grid², D]; the prefix's stay.

    Bicubic (a = -0.5) with antialiasing, as open_clip's `resize_pos_embed` has it.
    """
    old = math.isqrt(len(position_NxD) - prefix)
    if old * old != len(position_NxD) - prefix or old == grid:
        return position_NxD
    squares = jnp.asarray(position_NxD[prefix:], jnp.float32).reshape(old, old, -1)
    resized = jax.image.resize(squares, (grid, grid, squares.shape[-1]), "cubic", antialias=True)
    return np.concatenate([np.float32(position_NxD[:prefix]), np.asarray(resized).reshape(grid * grid, -1)])


def norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.weight", "d m -> m d"), Row(f"{ours}/bias", f"{theirs}.bias")]


def split_heads(ours: str, theirs: str, part: tuple[int, int] = (0, 1), dot: str = ".") -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}{dot}weight", "d h k -> (n h k) d", part),
        Row(f"{ours}/bias", f"{theirs}{dot}bias", "h k -> (n h k)", part),
    ]


def joint_heads(ours: str, theirs: str) -> list[Row]:
    """Query, key and value in one matrix, as torch.nn.MultiheadAttention keeps them."""
    parts = enumerate(("query", "key", "value"))
    return [row for i, name in parts for row in split_heads(f"{ours}/{name}", f"{theirs}.in_proj", (i, 3), "_")]


def merge_heads(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.weight", "h k d -> d (h k)"), Row(f"{ours}/bias", f"{theirs}.bias")]


def _flat(tree: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _layers(row: Row, shape: tuple[int, ...]) -> int:
    return shape[0] if "*" in row.theirs else 1


def _keys(row: Row, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Each of their keys and its shape."""
    inner = shape[1:] if "*" in row.theirs else shape
    if row.axes:
        sizes = _sizes(row, inner)
        groups = re.findall(r"\(([^)]*)\)|(\S+)", row.axes.split("->")[1])
        inner = tuple(math.prod(sizes[name] for name in (group or single).split()) for group, single in groups)
    first, step = row.every
    return [(row.theirs.replace("*", str(first + i * step)), inner) for i in range(_layers(row, shape))]


def _axes(row: Row) -> tuple[list[str], list[str]]:
    """Our dimensions and theirs, without those of size 1."""
    left, right = row.axes.split("->") if row.axes else ("", "")
    return left.split(), [name for name in re.sub("[()]", " ", right).split() if name != "1"]


def _sizes(row: Row, inner: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(row.axes.split("->")[0].split(), inner, strict=True)) | {"1": 1, "n": row.part[1]}


def _from_theirs(row: Row, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not row.axes:
        return value
    left, right = _axes(row)
    sizes = _sizes(row, shape[1:] if "*" in row.theirs else shape)
    value = value.reshape([sizes[name] for name in right])
    if "n" in right:
        value = value.take(row.part[0], right.index("n"))
        right.remove("n")
    return value.transpose([right.index(name) for name in left])


def _as_floats(value: np.ndarray, dtype: np.dtype | None, label: str) -> np.ndarray:
    if value.dtype.kind in "iubc":
        raise CheckpointError(f"{label} is {value.dtype}; floats expected")
    floats = np.asarray(value, dtype)
    if np.isinf(floats).any():
        raise CheckpointError(f"{label} holds infinities")
    return floats
