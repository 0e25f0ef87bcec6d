"""The mesh, the rules, and that the constraints stand in the program, each with its own spec."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.losses import contrastive_loss
from clip_jax.models.variants import VARIANTS, build_two_tower, get_variant
from launch.planning.counting import collectives
from launch.planning.hlo import Program

BATCH = 16


def setup(name: str, size: int = 32) -> tuple[Any, Any, dict[str, jax.Array]]:
    config = get_variant(name)
    config.vision.image_size = size
    model = build_two_tower(config)
    length = config.text.context_length
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(BATCH, size, size, 3)), jnp.float32),
        "text": jnp.asarray(rng.integers(1, 4096, size=(BATCH, length)), jnp.int32),
    }
    return model, jax.eval_shape(model.init, jax.random.key(0), batch), batch


def loss_fn(model: Any, mesh: Mesh) -> Any:
    def loss(variables: Any, batch: Any) -> jax.Array:
        rest = [key for key in variables if key != "params"]
        (image, text, extras), _ = model.apply(variables, batch, train=True, mutable=rest)
        return contrastive_loss(image, text, extras["logit_scale"], mesh=mesh, axis_names=sharding.BATCH_AXES)

    return loss


def constraints(jaxpr: Any) -> Iterator[tuple[tuple[int, ...], P]]:
    """(shape, spec) of every sharding constraint of a program, inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            yield equation.invars[0].aval.shape, equation.params["sharding"].spec
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from constraints(inner)


def padded(spec: P, rank: int) -> tuple[Any, ...]:
    return tuple(spec) + (None,) * (rank - len(spec))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_named_and_every_name_has_a_rule(name: str) -> None:
    boxed = abstract(name)
    sharding.check_names(boxed["params"], sharding.DEFAULT_RULES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    ):
        assert isinstance(leaf, nn.LogicallyPartitioned) or leaf.shape == (), jax.tree_util.keystr(path)


def abstract(name: str) -> Any:
    config = get_variant(name)
    size = config.vision.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32),
    }
    return jax.eval_shape(build_two_tower(config).init, jax.random.key(0), batch)


def test_a_name_without_a_rule_is_an_error() -> None:
    _, boxed, _ = setup("debug-ViT")
    rules = [rule for rule in sharding.DEFAULT_RULES if rule[0] != "mlp"]
    with pytest.raises(ConfigError, match=r"\['mlp'\].*no sharding rule for its axis 'mlp'"):
        sharding.tree_shardings(boxed["params"], sharding.make_mesh(), rules)


@pytest.mark.parametrize("name", ["debug-ViT", "debug-RN", "debug-NFNet"])
def test_each_activation_carries_its_own_spec(name: str) -> None:
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    model, boxed, batch = setup(name)
    config = get_variant(name)
    with sharding.use_mesh(mesh):
        jaxpr = jax.make_jaxpr(loss_fn(model, mesh))(sharding.unbox(boxed), batch)
    found = {(shape, padded(spec, len(shape))) for shape, spec in constraints(jaxpr.jaxpr)}
    rows = ("replica", "fsdp")
    text = config.text
    length, width, heads = text.context_length, text.width, text.heads
    expected = {
        ((BATCH, length, width), (rows, None, None)),  # the residual stream
        ((BATCH, length, heads, width // heads), (rows, None, "tensor", None)),
        ((BATCH, length, 4 * width), (rows, None, "tensor")),
        ((BATCH, config.embed_dim), (rows, None)),
    }
    if name == "debug-ViT":
        tokens, vision = (config.vision.image_size // config.vision.patch_size) ** 2 + 1, config.vision
        expected |= {
            ((BATCH, tokens, vision.width), (rows, None, None)),
            ((BATCH, tokens, vision.heads, vision.width // vision.heads), (rows, None, "tensor", None)),
            ((BATCH, tokens, 4 * vision.width), (rows, None, "tensor")),
        }
    elif name == "debug-NFNet":
        expected |= {((BATCH, 8, 8, 16), (rows, None, None, None)), ((BATCH, 4, 4, 32), (rows, None, None, None)),
                     ((BATCH, 4, 4, 64), (rows, None, None, None))}  # fmt: skip
    else:
        grid, width = config.vision.image_size // 4, config.vision.width
        expected |= {
            ((BATCH, grid // 2**i, grid // 2**i, 4 * width * 2**i), (rows, None, None, None)) for i in range(4)
        }
        expected.add(((BATCH, grid, grid, width), (rows, None, None, None)))
    assert expected <= found, expected - found


def test_a_swapped_table_reaches_the_program() -> None:
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    model, boxed, batch = setup("debug-ViT")
    rules = sharding.rules_of([("residual", "tensor"), *[r for r in sharding.DEFAULT_RULES if r[0] != "residual"]])
    with sharding.use_mesh(mesh, rules):
        jaxpr = jax.make_jaxpr(loss_fn(model, mesh))(sharding.unbox(boxed), batch)
    found = {(shape, tuple(spec)) for shape, spec in constraints(jaxpr.jaxpr)}
    assert ((BATCH, 17, 32), (("replica", "fsdp"), None, "tensor")) in found


def test_parameters_are_really_sharded() -> None:
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    _, boxed, _ = setup("debug-ViT")
    shardings = sharding.tree_shardings(boxed["params"], mesh)
    blocks = shardings["vision"]["transformer"]["blocks"]
    assert blocks["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert blocks["attention"]["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert shardings["text"]["token_embedding"].spec == P("tensor", "fsdp")


def test_an_axis_that_does_not_divide_is_dropped() -> None:
    mesh = sharding.make_mesh({"fsdp": 8})
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((3, 3, 3, 8), jnp.float32), (None, None, "conv_in", "channels"))
    assert sharding.tree_shardings({"kernel": box}, mesh)["kernel"].spec == P(None, None, None, "tensor")


def test_a_mesh_that_parts_few_parameters_is_said(caplog: pytest.LogCaptureFixture) -> None:
    boxes = {
        name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct((width, 64), jnp.float32), ("embed", "head_size"))
        for name, width in (("parted", 96), ("whole", 12))
    }
    for fsdp, expected in ((8, 1), (4, 0)):  # 12 is not a multiple of 8
        caplog.clear()
        mesh = sharding.make_mesh({"fsdp": fsdp, "replica": -1})
        sharding.warn_of_whole(sharding.abstract(boxes, mesh), mesh)
        assert len(caplog.records) == expected
        assert all("11% of the parameters are whole" in r.message and "['whole']" in r.message for r in caplog.records)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_rows_of_a_table_are_taken_on_any_mesh(shape: tuple[int, int, int]) -> None:
    V, D, B, L = 40, 16, 48, 5
    rng = np.random.default_rng(0)
    table, weight = rng.normal(size=(V, D)), rng.normal(size=(B, L, D))
    ids = rng.integers(-2, V + 2, size=(B, L))
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)))
    rows, parts = sharding.batch_sharding(mesh), NamedSharding(mesh, P("tensor", "fsdp"))

    def look_up(table: jax.Array, ids: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, backward = jax.vjp(lambda table: sharding.take_rows(table, ids, table.dtype), table)
        return y, backward(weight)[0]

    with jax.enable_x64(True), sharding.use_mesh(mesh):
        placed = jax.device_put((table, ids, weight), (parts, rows, rows))
        compiled = jax.jit(look_up, out_shardings=(rows, parts)).lower(*placed).compile()
        y, gradient = compiled(*placed)
    nearest, expected = ids.clip(0, V - 1), np.zeros((V, D))
    np.add.at(expected, nearest, weight)
    assert y.dtype == gradient.dtype == np.float64
    np.testing.assert_array_equal(y, table[nearest])
    np.testing.assert_allclose(gradient, expected, rtol=1e-14, atol=1e-14)

    text = compiled.as_text()
    assert text is not None
    # A device's own examples' rows, and its part of the vocabulary with its gradient: never anybody else's examples.
    own, part = 8 * B * L * D // (shape[0] * shape[1]), 8 * V * D // shape[2]
    sent = sum(collective.bytes for collective in collectives(Program(text), 8))
    assert 0 < sent <= 2 * own * (shape[2] > 1) + 3 * part


def test_meshes_that_do_not_fit_are_named() -> None:
    assert dict(sharding.make_mesh({"fsdp": -1, "tensor": 2}).shape) == {"replica": 1, "fsdp": 4, "tensor": 2}
    with pytest.raises(ConfigError, match="there are 8"):
        sharding.make_mesh({"fsdp": 3})
    with pytest.raises(ConfigError, match="mesh axis 'model'"):
        sharding.make_mesh({"model": 8})
    with pytest.raises(ConfigError, match="batch_size 12 is not divisible by the 8 data-parallel parts"):
        sharding.check_batch(12, sharding.make_mesh())


def test_batches_land_where_they_belong() -> None:
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    where = sharding.batch_sharding(mesh)
    rows = sharding.local_rows(where, 8)
    assert rows.tolist() == list(range(8))
    placed = sharding.put_batch({"x": np.arange(8)[rows]}, where, 8)["x"]
    assert placed.tolist() == list(range(8))
    assert isinstance(placed.sharding, NamedSharding) and placed.sharding.spec == P(("replica", "fsdp"))
