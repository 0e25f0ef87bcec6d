"""The sigmoid loss against a dense float64 computation and against open_clip's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from loss_oracles import OpenClip, assert_close, ours, program, rounded, unit_rows

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.losses import ring, sigmoid_loss


def dense(image: np.ndarray, text: np.ndarray, scale: float, bias: float) -> tuple[np.ndarray, ...]:
    """(loss, d image, d text, d scale, d bias) in float64, every N×N matrix in memory."""
    n = len(image)
    cosine = image @ text.T
    z = 2 * np.eye(n) - 1
    margin = z * (scale * cosine + bias)
    d_logits = -z / (1 + np.exp(margin)) / n
    loss = np.logaddexp(0, -margin).sum() / n
    return (
        loss, scale * d_logits @ text, scale * d_logits.T @ image, (d_logits * cosine).sum(), d_logits.sum(),
    )  # fmt: skip


def test_the_dense_oracle_is_open_clips() -> None:
    peer = OpenClip()
    got = peer.before_normalization(dense(peer.image, peer.text, peer.scale, peer.bias))
    assert_close(got, (*peer.answer("sigmoid"), peer.expected["sigmoid_grad_bias"]), 1e-12)


@pytest.mark.parametrize("devices", [1, 7])
def test_open_clips_loss_and_gradients(devices: int) -> None:
    peer = OpenClip()
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    got = ours(sigmoid_loss, mesh, peer.image, peer.text, peer.scale, peer.bias)
    assert_close(peer.before_normalization(got), (*peer.answer("sigmoid"), peer.expected["sigmoid_grad_bias"]))


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -10.0)])
def test_loss_and_every_gradient_on_every_device_count(data_mesh: Mesh, scale: float, bias: float) -> None:
    rng = np.random.default_rng(0)
    image, text = unit_rows(rng, 64, 33), unit_rows(rng, 64, 33)
    expected = dense(rounded(image), rounded(text), scale, bias)
    assert_close(ours(sigmoid_loss, data_mesh, image, text, scale, bias), expected)


def test_saturated_pairs_keep_their_last_digits(data_mesh: Mesh) -> None:
    image = unit_rows(np.random.default_rng(2), 64, 33)
    got = ours(sigmoid_loss, data_mesh, image, image, 100.0, -60.0)
    for g, e in zip(got, dense(rounded(image), rounded(image), 100.0, -60.0), strict=True):
        assert np.abs(np.asarray(g, np.float64) - e).max() <= 1e-6


@pytest.mark.parametrize("devices", [1, 8])
def test_many_tiles_the_last_one_padded(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program.cache_clear()  # of programs with other tiles
    monkeypatch.setattr(ring, "TILE", 3)
    rng = np.random.default_rng(3)
    image, text = unit_rows(rng, 64, 8), unit_rows(rng, 64, 8)
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    expected = dense(rounded(image), rounded(text), 10.0, -2.0)
    assert_close(ours(sigmoid_loss, mesh, image, text, 10.0, -2.0), expected)


def test_a_mesh_with_all_three_axes() -> None:
    rng = np.random.default_rng(4)
    image, text = unit_rows(rng, 32, 8), unit_rows(rng, 32, 8)
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    expected = dense(rounded(image), rounded(text), 10.0, -10.0)
    assert_close(ours(sigmoid_loss, mesh, image, text, 10.0, -10.0), expected)


def test_gradients_follow_what_comes_after_the_loss() -> None:
    rng = np.random.default_rng(5)
    image, text = (np.float32(unit_rows(rng, 64, 33)) for _ in range(2))
    mesh = sharding.make_mesh({"fsdp": 8})
    loss = partial(sigmoid_loss, mesh=mesh, axis_names=sharding.BATCH_AXES)
    got = jax.jit(jax.grad(lambda *x: loss(*x) ** 2, (0, 1, 2, 3)))(image, text, np.float32(10), np.float32(-3))
    value, *gradients = dense(np.asarray(image, np.float64), np.asarray(text, np.float64), 10.0, -3.0)
    assert_close((value, *got), (value, *(2 * value * g for g in gradients)))


def test_the_loss_alone_costs_no_gradients() -> None:
    mesh = sharding.make_mesh({"fsdp": 8})
    shape = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding.batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    loss = jax.jit(partial(sigmoid_loss, mesh=mesh, axis_names=sharding.BATCH_AXES))
    compiled = loss.lower(shape, shape, scalar, scalar).compile().as_text()
    assert compiled is not None and compiled.count(" dot(") == 1


def test_shapes_that_do_not_fit_are_named() -> None:
    mesh = sharding.make_mesh({"fsdp": 8})
    one = jnp.ones(())
    with pytest.raises(ConfigError, match=r"sigmoid_loss: 12 examples are not divisible by the 8 shards"):
        sigmoid_loss(jnp.ones((12, 4)), jnp.ones((12, 4)), one, one, mesh=mesh, axis_names=sharding.BATCH_AXES)
