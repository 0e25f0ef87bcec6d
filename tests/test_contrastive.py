"""The contrastive loss against a dense float64 computation and against open_clip's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from loss_oracles import OpenClip, assert_close, ours, products, program, rounded, unit_rows

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.losses import contrastive_loss, ring


def dense(image: np.ndarray, text: np.ndarray, scale: float, smoothing: float = 0.0) -> tuple[np.ndarray, ...]:
    """(loss, d image, d text, d scale) in float64, every N×N matrix in memory."""
    n = len(image)
    cosine = image @ text.T
    logits = scale * cosine
    target = (1 - smoothing) * np.eye(n) + smoothing / n

    def softmax(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        top = x.max(axis=axis, keepdims=True)
        e = np.exp(x - top)
        total = e.sum(axis=axis, keepdims=True)
        return e / total, x - np.log(total) - top

    (p, rows), (q, columns) = softmax(logits, 1), softmax(logits, 0)
    d_logits = (p + q - 2 * target) / (2 * n)
    loss = -(target * (rows + columns)).sum() / (2 * n)
    return loss, scale * d_logits @ text, scale * d_logits.T @ image, (d_logits * cosine).sum()


def test_the_dense_oracle_is_open_clips() -> None:
    peer = OpenClip()
    got = peer.before_normalization(dense(peer.image, peer.text, peer.scale))
    assert_close(got, peer.answer("infonce"), 1e-12)


@pytest.mark.parametrize("devices", [1, 7])
def test_open_clips_loss_and_gradients(devices: int) -> None:
    peer = OpenClip()
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    got = ours(contrastive_loss, mesh, peer.image, peer.text, peer.scale)
    assert_close(peer.before_normalization(got), peer.answer("infonce"))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_and_every_gradient_on_every_device_count(data_mesh: Mesh, scale: float) -> None:
    rng = np.random.default_rng(0)
    image, text = unit_rows(rng, 64, 33), unit_rows(rng, 64, 33)
    assert_close(ours(contrastive_loss, data_mesh, image, text, scale), dense(rounded(image), rounded(text), scale))


def test_partly_matched_pairs(data_mesh: Mesh) -> None:
    rng = np.random.default_rng(1)
    image = unit_rows(rng, 64, 33)
    text = image + 0.2 * rng.normal(size=image.shape)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    assert_close(ours(contrastive_loss, data_mesh, image, text, 20.0), dense(rounded(image), rounded(text), 20.0))


def test_saturated_pairs_keep_their_last_digits(data_mesh: Mesh) -> None:
    rng = np.random.default_rng(2)
    image = unit_rows(rng, 64, 33)
    got = ours(contrastive_loss, data_mesh, image, image, 100.0)
    for g, e in zip(got, dense(rounded(image), rounded(image), 100.0), strict=True):
        assert np.abs(np.asarray(g, np.float64) - e).max() <= 1e-6


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing(data_mesh: Mesh, smoothing: float) -> None:
    rng = np.random.default_rng(5)
    image, text = unit_rows(rng, 64, 33), unit_rows(rng, 64, 33)
    got = ours(contrastive_loss, data_mesh, image, text, 14.3, label_smoothing=smoothing)
    assert_close(got, dense(rounded(image), rounded(text), 14.3, smoothing))


@pytest.mark.parametrize("devices", [1, 8])
def test_many_tiles_the_last_one_padded(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program.cache_clear()  # of programs with other tiles
    monkeypatch.setattr(ring, "TILE", 3)
    rng = np.random.default_rng(3)
    image, text = unit_rows(rng, 64, 8), unit_rows(rng, 64, 8)
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    assert_close(ours(contrastive_loss, mesh, image, text, 14.3), dense(rounded(image), rounded(text), 14.3))


def test_a_mesh_with_all_three_axes() -> None:
    rng = np.random.default_rng(4)
    image, text = unit_rows(rng, 32, 8), unit_rows(rng, 32, 8)
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    assert_close(ours(contrastive_loss, mesh, image, text, 14.3), dense(rounded(image), rounded(text), 14.3))


def test_bfloat16_embeddings_are_multiplied_in_bfloat16_and_summed_in_float32() -> None:
    rng = np.random.default_rng(6)
    mesh = sharding.make_mesh({"fsdp": 8})
    image, text = (jnp.asarray(unit_rows(rng, 64, 32), jnp.bfloat16) for _ in range(2))
    run = program(contrastive_loss, mesh, 1)
    loss, gradients = run(image, text, jnp.float32(14.3))
    assert loss.dtype == jnp.float32 and [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    expected = dense(np.asarray(image, np.float64), np.asarray(text, np.float64), 14.3)
    assert_close((loss,), expected[:1])  # products of bfloat16 numbers are exact in float32
    assert_close((loss, *gradients), expected, 1e-2)
    found = [equation for equation, _ in products(jax.make_jaxpr(run)(image, text, jnp.float32(14.3)).jaxpr)]
    assert len(found) == 4  # the logits, again the logits, and two gradients
    for equation in found:
        assert [x.aval.dtype for x in equation.invars] == [jnp.bfloat16] * 2
        assert equation.outvars[0].aval.dtype == jnp.float32


def test_nothing_of_size_n_by_n_is_ever_alive() -> None:
    n, d = 16384, 64
    mesh = sharding.make_mesh({"fsdp": 8})
    shape = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=sharding.batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = program(contrastive_loss, mesh, 1, label_smoothing=0.1).lower(shape, shape, scalar).compile()
    local_rows_of_logits = (n // 8) * n * 4
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.temp_size_in_bytes < local_rows_of_logits / 4
    assert "collective-permute" in text
    assert "all-gather" not in text


def test_shapes_that_do_not_fit_are_named() -> None:
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ConfigError, match=r"12 examples are not divisible by the 8 shards"):
        contrastive_loss(jnp.ones((12, 4)), jnp.ones((12, 4)), jnp.ones(()), mesh=mesh, axis_names=sharding.BATCH_AXES)
    with pytest.raises(ConfigError, match=r"\(16, 4\) and text embeddings \(8, 4\)"):
        contrastive_loss(jnp.ones((16, 4)), jnp.ones((8, 4)), jnp.ones(()), mesh=mesh, axis_names="fsdp")
