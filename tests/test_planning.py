"""What the planner counts, against programs whose counts are known, and its names of TPUs."""

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.models.variants import build_two_tower, get_variant
from launch.planning import hardware, model_flops
from launch.planning.counting import collectives, operations
from launch.planning.hlo import Array, Instruction, Program, device_groups
from launch.planning.model_flops import gradient_flops, products_flops


def compiled(function: Any, *shapes: tuple[int, ...]) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return Program(text)


def flops(program: Program) -> int:
    assert not program.uncounted
    return sum(operation.times * operation.flops for operation in operations(program))


def test_products_in_loops_count_as_often_as_they_run() -> None:
    def inner(x: jax.Array) -> jax.Array:
        return lax.fori_loop(2, 7, lambda _, y: jnp.tanh(y @ y), x)  # 5 times

    def outer(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (inner(c) @ w, None), x, length=3)[0]

    n = 64
    expected = 3 * (5 * 2 * n**3 + 2 * n * n * n)
    assert flops(compiled(outer, (n, n), (n, n))) == expected
    traced = jax.make_jaxpr(outer)(jnp.zeros((n, n)), jnp.zeros((n, n)))
    assert products_flops(traced.jaxpr) == expected


def test_a_loop_of_unknown_length_is_told() -> None:
    program = compiled(lambda x: lax.while_loop(lambda y: y.sum() < 10, lambda y: y @ y, x), (16, 16))
    assert sum(operation.times * operation.flops for operation in operations(program)) == 2 * 16**3
    assert program.uncounted


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_count_what_meets_the_image(stride: int) -> None:
    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, w, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Along an axis of 8, a kernel of 3 meets the image 3·8 - 2 times, its every second place 3·4 - 1 times.
    meets = {1: 22, 2: 11}[stride]
    expected = 2 * 4 * 16 * 32 * meets**2
    shapes = (4, 8, 8, 16), (3, 3, 16, 32)
    assert flops(compiled(convolve, *shapes)) == expected
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    assert gradient_flops(lambda w, x: (convolve(x, w).sum(), None), w, x) == 2 * expected  # not x's
    assert gradient_flops(lambda both: (convolve(*both).sum(), None), (x, w)) == 3 * expected


DILATED = """HloModule test

ENTRY %main.1 (q.1: bf16[8,577,4,64], k.1: bf16[8,577,4,64]) -> f32[8,4,577,577] {
  %q.1 = bf16[8,577,4,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[8,577,4,64]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution-base-dilated.4 = f32[8,4,577,577]{2,3,1,0:T(8,128)} convolution(%q.1, %k.1), """ + (
    "window={size=8x4 stride=7x3 lhs_dilate=8x4}, dim_labels=0b1f_0o1i->01bf, "
    'metadata={op_name="jit(f)/dot_general"}, backend_config={"window_config":{"estimated_cycles":"12"}}\n}\n'
)


def test_a_batched_product_as_tpus_spell_it() -> None:
    """A batch of products is one convolution with dilations there, most of whose places hold nothing."""
    program = Program(DILATED)
    (operation,) = operations(program)
    assert operation.flops == 2 * 8 * 4 * 577 * 577 * 64
    assert operation.instruction.config["window_config"]["estimated_cycles"] == "12"
    q = 8 * 4 * 584 * 128 * 2  # whole tiles of 8 × 128
    assert operation.hbm_bytes == q + 8 * 4 * 584 * 640 * 4  # k lies on the chip


# Twelve slices of a contracted axis, four at a time: the counter goes 0, 2, 4. A window lists sizes by axis number.
WINDOWED = """HloModule test

%body (p: (u32[], bf16[128,50,2,96], bf16[2,96,3072,1])) -> (u32[], bf16[128,50,2,96], bf16[2,96,3072,1]) {
  %p = (u32[]{:T(128)}, bf16[128,50,2,96]{3,0,2,1}, bf16[2,96,3072,1]{2,1,0,3}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[128,50,2,96]{3,0,2,1} get-tuple-element(%p), index=1
  %w = bf16[2,96,3072,1]{2,1,0,3} get-tuple-element(%p), index=2
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %a = bf16[128,50,3072,1]{2,0,3,1} convolution(%x, %w), window={size=2x1}, dim_labels=b10f_0io1->b1f0
  %b = bf16[128,50,3072,1]{2,0,3,1} convolution(%x, %w), window={size=2x1}, dim_labels=b10f_0io1->b1f0
  ROOT %t = (u32[]{:T(128)}, bf16[128,50,2,96]{3,0,2,1}, bf16[2,96,3072,1]{2,1,0,3}) tuple(%next, %x, /*index=2*/%w)
}

%condition (q: (u32[], bf16[128,50,2,96], bf16[2,96,3072,1])) -> pred[] {
  %q = (u32[]{:T(128)}, bf16[128,50,2,96]{3,0,2,1}, bf16[2,96,3072,1]{2,1,0,3}) parameter(0)
  %six = u32[]{:T(128)} constant(6)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %compare = pred[]{:T(512)} compare(%j, %six), direction=LT
}

ENTRY %main (x: bf16[128,50,2,96], w: bf16[2,96,3072,1]) -> bf16[128,50,2,96] {
  %x.1 = bf16[128,50,2,96]{3,0,2,1} parameter(0)
  %w.1 = bf16[2,96,3072,1]{2,1,0,3} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, bf16[128,50,2,96]{3,0,2,1}, bf16[2,96,3072,1]{2,1,0,3}) tuple(%zero, %x.1, %w.1)
  %while = (u32[]{:T(128)}, bf16[128,50,2,96]{3,0,2,1}, bf16[2,96,3072,1]{2,1,0,3}) while(%start), """ + (
    "condition=%condition, body=%body\n  ROOT %y = bf16[128,50,2,96]{3,0,2,1} get-tuple-element(%while), index=1\n}\n"
)


def test_a_product_in_slices_whose_loop_counts_by_two() -> None:
    assert flops(Program(WINDOWED)) == 2 * 128 * 50 * 3072 * (12 * 96)


def test_bytes_of_tiles() -> None:
    assert Array("bf16", (10, 64), (1, 0), (8, 128)).bytes == 16 * 128 * 2
    assert Array("bf16", (10, 64), (0, 1), (8, 128)).bytes == 64 * 128 * 2
    assert Array("f32", (3,)).bytes == 12
    assert Array("pred", ()).bytes == 1


def test_a_slice_of_a_stack_is_what_is_read() -> None:
    def loop(stack: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, w: (c @ w, None), x, stack)[0]

    layers, n = 50, 64
    program = compiled(loop, (layers, n, n), (n, n))
    total = sum(operation.times * operation.hbm_bytes for operation in operations(program))
    assert layers * 4 * n * n * 4 <= total < layers * 10 * n * n * 4  # never the whole stack for each layer


def test_collectives_and_what_they_send() -> None:
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 4})
    n = 1024

    def exchange(x: jax.Array) -> jax.Array:
        def body(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            total = lax.ppermute(total, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
            return total, None

        whole = lax.all_gather(x, "fsdp", tiled=True)  # [4n]
        part = lax.psum_scatter(whole * 2, "fsdp", tiled=True)  # [n]
        summed = lax.psum(part * part, "replica")
        mixed = lax.all_to_all(jnp.sin(summed).reshape(4, -1), "fsdp", 0, 0).reshape(-1)
        return lax.scan(body, mixed, length=3)[0]

    where = P(("replica", "fsdp"))
    function = jax.shard_map(exchange, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)
    found = list(collectives(compiled(function, (8 * n,)), 8))
    sent: Counter[str] = Counter()
    for collective in found:
        sent[collective.kind] += collective.times * collective.bytes
        assert "shard_map" in collective.scope
    assert sent == {
        "all-gather": 3 * 4 * n,
        "reduce-scatter": 3 * 4 * n,
        "all-reduce": 2 * 4 * n // 2,
        "all-to-all": 3 * 4 * n // 4,
        "collective-permute": 3 * 4 * n,
    }
    (reduce,) = [collective for collective in found if collective.kind == "all-reduce"]
    assert reduce.group in ([0, 4], [1, 5], [2, 6], [3, 7])


BETWEEN_SLICES = """HloModule test

ENTRY %main (x: f32[256,8,128]) -> token[] {
  %x = f32[256,8,128]{2,1,0:T(8,128)} parameter(0)
  %after = token[] after-all()
  %send = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=2, """ + (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    "  ROOT %done = token[] send-done(%send), channel_id=2, is_host_transfer=true\n}\n"
)


def test_what_is_sent_between_slices_goes_through_the_hosts() -> None:
    (found,) = collectives(Program(BETWEEN_SLICES), 8)
    assert (found.kind, found.bytes, found.times, found.group) == ("all-reduce", 256 * 8 * 128 * 4, 1, [*range(8)])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, use_global_device_ids=true",
            [[0, 1], [2, 3]],
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}", [[0, 2, 1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, metadata={}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_devices(groups: str, expected: list[list[int]]) -> None:
    instruction = Instruction("x", "all-reduce", (), (), "", f", channel_id=1, {groups}")
    assert device_groups(instruction, 4).tolist() == expected


@pytest.mark.parametrize("rest", ["", ", device_ids=(0,2,1,3) {'a'}"])
def test_groups_spelt_in_another_way_are_refused(rest: str) -> None:
    instruction = Instruction("x", "all-reduce", (), (), "", f", replica_groups=mesh['a'=2,'b'=2]{rest}")
    with pytest.raises(ValueError, match="expected a mesh, an order and the axes"):
        device_groups(instruction, 4)


# Its ResNet's attention pool asks for the features of all 50 tokens, of which it uses one.
UNUSED = 2 * 49 * 2048 * (2048 + 1024) + 4 * 49 * 50 * 2048


# GFLOPs of image and text tower together, in open_clip's docs/model_profile.csv. It counts what meets the padding, too.
@pytest.mark.parametrize(
    ("name", "published", "unused"), [("ViT-B/32", 14.78, 0), ("ViT-L/14@336", 395.22, 0), ("RN50", 18.18, UNUSED)]
)
def test_operations_of_models_are_the_published_ones(
    name: str, published: float, unused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_flops, "places", lambda length, kernel, out, *_: kernel * out)
    config = get_variant(name)
    size = config.vision.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32),
    }
    model = build_two_tower(config)
    variables = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    counted = products_flops(jax.make_jaxpr(model.apply)(variables, batch).jaxpr)
    assert (counted + unused) / 1e9 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "full", "chips", "devices"),
    [
        ("v5p:4x4x8", "v5p:4x4x8", 128, 1),
        ("v5p-256", "v5p:4x4x8", 128, 1),  # TensorCores, two on a chip
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v4-512", "v4:4x8x8", 256, 1),
        ("v5litepod-256", "v5e:16x16", 256, 1),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("v6e-32", "v6e:4x8", 32, 1),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 2),
    ],
)
def test_names_of_topologies(name: str, full: str, chips: int, devices: int) -> None:
    topology = hardware.parse(name)
    assert (topology.name, topology.chips, topology.chip.devices) == (full, chips, devices)
    assert math.prod(topology.shape) == chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "unknown chip v9; expected one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5p:4x4", "v5p chips stand in 3 dimensions"),
        ("v5p-100", "give the shape of the slice, as in v5p:4x4x8"),
        ("pod", "expected a name such as v5p:4x4x8"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hardware.parse(name)
