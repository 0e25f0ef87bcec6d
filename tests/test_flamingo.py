"""Flamingo's model: what must hold at the start and always, on 1 and on 8 devices."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import ConfigError
from flamingo_jax import decoding
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.resampler import interpolate_time
from flamingo_jax.models.variants import FLAMINGOS, build_flamingo, get_variant

B, T, F, S, L, V = 8, 3, 2, 32, 10, 4096
Batch = dict[str, np.ndarray]


@pytest.fixture(params=[1, 8], ids=lambda n: f"{n}dev")
def mesh(request: pytest.FixtureRequest) -> Mesh:
    shape = {"replica": 2, "fsdp": 2, "tensor": 2} if request.param == 8 else {}
    return sharding.make_mesh(shape, jax.devices()[: request.param])


@cache
def build(dtype: str = "float32", frames: int = 0, **overrides: Any) -> Flamingo:
    config = get_variant("debug")
    config.dtype = dtype
    config.resampler.frames = frames or config.resampler.frames
    config.update(overrides)
    return build_flamingo(config)


def make_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    places = np.array([1, 4, 7])  # the images' tags
    seen = (places <= np.arange(L)[:, None]).sum(axis=1)
    return {
        "media": rng.normal(size=(B, T, F, S, S, 3)).astype(np.float32),
        "frame_mask": np.ones((B, T, F), bool),
        "text": rng.integers(0, V, (B, L)).astype(np.int32),
        "text_mask": np.ones((B, L), bool),
        "media_mask": np.broadcast_to(seen[:, None] == np.arange(1, T + 1), (B, L, T)).copy(),
    }


@cache
def first(model: Flamingo) -> Any:
    return sharding.unbox(jax.jit(model.init)(jax.random.key(0), make_batch()))


@cache
def variables_of(model: Flamingo, gates: float) -> Any:
    """Parameters off their initial values; the gates at `gates`."""
    rng = np.random.default_rng(1)

    def value(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if name.endswith("gate']"):
            return jnp.full_like(x, gates)
        return x + 0.05 * rng.normal(size=x.shape).astype(x.dtype) if "['params']" in name else x

    return jax.tree_util.tree_map_with_path(value, first(model))


@cache
def on(model: Flamingo, mesh: Mesh) -> tuple[Any, Callable[..., jax.Array]]:
    """(where the model's parameters go, its compiled self)."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch())
    return sharding.tree_shardings(boxed, mesh), jax.jit(model.apply)


def run(model: Flamingo, variables: Any, batch: Mapping[str, Any], mesh: Mesh) -> np.ndarray:
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        where, apply = on(model, mesh)
        inputs = jax.device_put(dict(batch), sharding.batch_sharding(mesh))
        return np.asarray(apply(jax.device_put(variables, where), inputs))


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", FLAMINGOS)
def test_every_parameter_is_named_and_every_name_has_a_rule(name: str) -> None:
    config = get_variant(name)
    size, frames = config.vision.image_size, config.resampler.frames
    batch = {
        "media": jax.ShapeDtypeStruct((1, 1, frames, size, size, 3), jnp.float32),
        "frame_mask": jax.ShapeDtypeStruct((1, 1, frames), bool),
        "text": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((1, 2), bool),
        "media_mask": jax.ShapeDtypeStruct((1, 2, 1), bool),
    }
    boxed = jax.eval_shape(build_flamingo(config).init, jax.random.key(0), batch)
    sharding.check_names(boxed["params"], sharding.DEFAULT_RULES)
    latents = 64 if name != "debug" else 8
    assert boxed["params"]["resampler"]["latents"].value.shape == (latents, config.resampler.width)
    gates = -(-(config.language_model.layers - config.first_block) // config.interval)  # before blocks f, f + n, …
    assert sharding.unbox(boxed["params"]["gated"]["attention_gate"]).shape[0] == gates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_with_closed_gates_the_logits_are_the_frozen_models_own_bits(dtype: str, interval: int, mesh: Mesh) -> None:
    model, batch = build(dtype, interval=interval), make_batch()
    lm = model.language_model
    with sharding.use_mesh(mesh):
        placed = jax.device_put(first(model), on(model, mesh)[0])  # gates start at zero
        inputs = jax.device_put(batch, sharding.batch_sharding(mesh))
        logits = jax.jit(model.apply)(placed, inputs)
        alone = jax.jit(lambda p, text: lm.apply({"params": p}, text))(
            placed["params"]["language_model"], inputs["text"]
        )
    assert logits.shape == (B, L, V + 1) and alone.shape == (B, L, V)
    np.testing.assert_array_equal(np.asarray(logits)[..., :V], np.asarray(alone))


def test_open_gates_look_at_the_image_that_the_mask_names(mesh: Mesh) -> None:
    model, batch = build(), make_batch()
    variables = variables_of(model, 0.5)
    logits = run(model, variables, batch, mesh)

    other = batch | {"media": make_batch(5)["media"]}
    assert np.abs(run(model, variables, other, mesh) - logits).max() > 1e-3
    blind = {"media_mask": np.zeros_like(batch["media_mask"])}
    np.testing.assert_array_equal(
        run(model, variables, batch | blind, mesh), run(model, variables, other | blind, mesh)
    )

    # The second image belongs to tokens 4 to 6: nothing before them may change; the text itself carries it on.
    second = batch | {"media": batch["media"].copy()}
    second["media"][:, 1] = other["media"][:, 1]
    changed = run(model, variables, second, mesh)
    np.testing.assert_array_equal(changed[:, :4], logits[:, :4])
    assert (np.abs(changed[:, 4:7] - logits[:, 4:7]).max(axis=(0, 2)) > 1e-4).all()
    # Text before any image ignores all of them.
    np.testing.assert_array_equal(run(model, variables, other, mesh)[:, :1], logits[:, :1])


def test_padded_frames_and_images_change_nothing(mesh: Mesh) -> None:
    model, batch = build(), make_batch()
    variables = variables_of(model, 0.5)
    batch["frame_mask"][:, :, 1] = False
    logits = run(model, variables, batch, mesh)
    noise = batch | {"media": batch["media"].copy()}
    noise["media"][:, :, 1] = 7.0
    assert_close(run(model, variables, noise, mesh), logits)
    batch["frame_mask"][:, :, 1] = True
    assert np.abs(run(model, variables, batch, mesh) - logits).max() > 1e-4


def test_the_order_of_frames_matters_and_rows_do_not_mix(mesh: Mesh) -> None:
    model, batch = build(), make_batch()
    variables = variables_of(model, 0.5)
    logits = run(model, variables, batch, mesh)
    assert np.abs(run(model, variables, batch | {"media": batch["media"][:, :, ::-1]}, mesh) - logits).max() > 1e-4
    order = np.random.default_rng(2).permutation(B)
    assert_close(run(model, variables, {key: x[order] for key, x in batch.items()}, mesh), logits[order])


def test_padding_on_the_left_changes_nothing(mesh: Mesh) -> None:
    model, batch = build(), make_batch()
    variables = variables_of(model, 0.5)
    logits = run(model, variables, batch, mesh)
    pad = 3
    padded = batch | {
        "text": np.pad(batch["text"], ((0, 0), (pad, 0)), constant_values=9),
        "text_mask": np.pad(batch["text_mask"], ((0, 0), (pad, 0))),
        "media_mask": np.pad(batch["media_mask"], ((0, 0), (pad, 0), (0, 0))),
    }
    assert_close(run(model, variables, padded, mesh)[:, pad:], logits)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient() -> None:
    batch = make_batch()
    plain, again = build(), build(remat=True)
    variables = variables_of(plain, 0.5)
    a, b = (
        jax.jit(jax.grad(lambda v, m=m: jnp.square(m.apply(v, batch)).mean(), allow_int=True))(variables)["params"]
        for m in (plain, again)
    )
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert float(jnp.abs(x - y).max()) <= 1e-5 * largest


def test_thirty_frames_take_the_times_between_those_of_eight() -> None:
    trained = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    np.testing.assert_array_equal(interpolate_time(trained, 8), trained)
    np.testing.assert_array_equal(interpolate_time(trained, 3), trained[:3])
    got = np.asarray(interpolate_time(trained, 30))
    at = np.linspace(0, 7, 30)
    expected = np.stack([np.interp(at, np.arange(8), np.asarray(trained)[:, d]) for d in range(5)], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ConfigError, match="without a frame"):
        interpolate_time(trained, 0)


def test_a_clip_of_thirty_frames_is_seen_with_eight_frames_interpolated_embeddings(mesh: Mesh) -> None:
    """As a model sees it that was trained with 30, at those embeddings (arXiv 2204.14198, appendix A.1.1)."""
    eight, thirty = (build(frames=frames) for frames in (8, 30))
    variables = variables_of(eight, 0.5)
    batch = make_batch()
    clips = np.random.default_rng(3).normal(size=(B, 1, 30, S, S, 3)).astype(np.float32)
    batch |= {"media": clips, "frame_mask": np.ones((B, 1, 30), bool), "media_mask": batch["media_mask"][..., :1]}
    trained = np.asarray(variables["params"]["resampler"]["time_embedding"], np.float64)
    between = np.stack([np.interp(np.linspace(0, 7, 30), np.arange(8), column) for column in trained.T], axis=1)
    params = variables["params"]
    known = {**params, "resampler": {**params["resampler"], "time_embedding": jnp.asarray(between, jnp.float32)}}
    got = run(eight, variables, batch, mesh)
    assert_close(got, run(thirty, variables | {"params": known}, batch, mesh))


def left_padded(batch: Batch, pads: np.ndarray) -> Batch:
    """The rows of a batch cut at the end by `pads` tokens each and padded on the left instead."""
    out = {key: value.copy() for key, value in batch.items()}
    for row, pad in enumerate(pads):
        keep = L - pad
        for key in ("text", "text_mask", "media_mask"):
            out[key][row] = 0
            out[key][row, pad:] = batch[key][row, :keep]
    return out


def test_generation_is_the_whole_models_choice_token_by_token(mesh: Mesh) -> None:
    model = build()
    variables = variables_of(model, 0.5)
    batch = left_padded(make_batch(), np.array([0, 1, 2, 3, 4, 5, 6, 7]))
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        placed = jax.device_put(variables, on(model, mesh)[0])
        inputs = jax.device_put(batch, sharding.batch_sharding(mesh))
        four = np.asarray(decoding.generate(model, placed, inputs, max_new_tokens=4).tokens)
        came: list[np.ndarray] = []  # in one loop, and one by one from the cache
        decoding.generate(model, placed, inputs, max_new_tokens=4, on_tokens=came.append)
        _, cache = decoding.read_prompts(model, placed, inputs, 3)
    np.testing.assert_array_equal(np.concatenate(came, axis=1), four)
    # Every device holds its own rows and its own heads, of the text and of the images.
    rows, heads = mesh.shape["replica"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    for x in jax.tree.leaves((cache.text, cache.media)):
        assert x.sharding.shard_shape(x.shape) == (B // rows, x.shape[1] // heads, *x.shape[2:])

    whole = (
        batch
        | {  # no cache at all
            "text": np.concatenate([batch["text"], four[:, :3]], axis=1),
            "text_mask": np.pad(batch["text_mask"], ((0, 0), (0, 3)), constant_values=True),
            "media_mask": np.pad(batch["media_mask"], ((0, 0), (0, 3), (0, 0)), mode="edge"),
        }
    )
    np.testing.assert_array_equal(run(model, variables, whole, mesh)[:, -4:].argmax(axis=-1), four)


def test_wrong_heads_are_named() -> None:
    config = get_variant("debug")
    config.language_model.kv_heads = 3
    with pytest.raises(ConfigError, match="4 heads must divide it, and 3 key/value heads must divide them"):
        jax.eval_shape(build_flamingo(config).init, jax.random.key(0), make_batch())
    with pytest.raises(ConfigError, match="unknown Flamingo variant 'tiny'"):
        get_variant("tiny")
