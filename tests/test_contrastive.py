"""The contrastive loss against a dense float64 computation and against open_clip's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ORACLES
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.losses import contrastive_loss, ring

TOLERANCE = 1e-5  # of the largest expected value, for the loss and for every gradient


def dense(image: np.ndarray, text: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """(loss, d image, d text, d scale) in float64, every N×N matrix in memory."""
    n = len(image)
    cosine = image @ text.T
    logits = scale * cosine

    def softmax(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        top = x.max(axis=axis, keepdims=True)
        e = np.exp(x - top)
        total = e.sum(axis=axis, keepdims=True)
        return e / total, (np.log(total) + top).squeeze(axis)

    (p, rows), (q, columns) = softmax(logits, 1), softmax(logits, 0)
    positive = np.diagonal(logits)
    d_logits = (p + q - 2 * np.eye(n)) / (2 * n)
    loss = (rows - positive + columns - positive).mean() / 2
    return loss, scale * d_logits @ text, scale * d_logits.T @ image, (d_logits * cosine).sum()


def unit_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ours(mesh: Mesh, image: np.ndarray, text: np.ndarray, scale: float) -> tuple[jax.Array, ...]:
    def loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return contrastive_loss(image, text, scale, mesh=mesh, axis_names=sharding.BATCH_AXES)

    where = sharding.batch_sharding(mesh)
    arrays = [jax.device_put(np.float32(x), where) for x in (image, text)]
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays, jnp.float32(scale))
    return value, *gradients


def assert_close(got: tuple, expected: tuple, tolerance: float = TOLERANCE) -> None:
    for name, g, e in zip(("loss", "image", "text", "scale"), got, expected, strict=True):
        error = np.abs(np.asarray(g, np.float64) - e).max()
        assert error <= tolerance * np.abs(e).max(), f"{name}: {error} of {np.abs(e).max()}"


def test_the_dense_oracle_is_open_clips() -> None:
    inputs, expected = (np.load(ORACLES / "clip_loss" / f"{name}.npz") for name in ("inputs", "expected"))
    norms = [np.linalg.norm(inputs[k], axis=1, keepdims=True) for k in ("image", "text")]
    image, text = inputs["image"] / norms[0], inputs["text"] / norms[1]
    scale = np.exp(inputs["log_scale"])
    loss, d_image, d_text, d_scale = dense(image, text, scale)
    through = [  # the peer's gradients are those of the embeddings before normalisation
        (d - x * (d * x).sum(axis=1, keepdims=True)) / norm
        for d, x, norm in ((d_image, image, norms[0]), (d_text, text, norms[1]))
    ]
    for got, key in zip(
        (loss, *through, d_scale * scale),
        ("infonce", "infonce_grad_image", "infonce_grad_text", "infonce_grad_log_scale"),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected[key], rtol=0, atol=1e-12 * np.abs(expected[key]).max())


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_and_every_gradient_on_every_device_count(data_mesh: Mesh, scale: float) -> None:
    rng = np.random.default_rng(0)
    image, text = unit_rows(rng, 64, 33), unit_rows(rng, 64, 33)
    assert_close(ours(data_mesh, image, text, scale), dense(rounded(image), rounded(text), scale))


def test_partly_matched_pairs(data_mesh: Mesh) -> None:
    rng = np.random.default_rng(1)
    image = unit_rows(rng, 64, 16)
    text = image + 0.3 * rng.normal(size=image.shape)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    assert_close(ours(data_mesh, image, text, 20.0), dense(rounded(image), rounded(text), 20.0))


def test_saturated_pairs_keep_their_last_digits(data_mesh: Mesh) -> None:
    rng = np.random.default_rng(2)
    image = unit_rows(rng, 64, 16)
    got, expected = ours(data_mesh, image, image, 100.0), dense(rounded(image), rounded(image), 100.0)
    for g, e in zip(got, expected, strict=True):
        assert np.abs(np.asarray(g, np.float64) - e).max() <= 1e-6


def test_many_tiles_the_last_one_padded(data_mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "TILE", 6)
    rng = np.random.default_rng(3)
    image, text = unit_rows(rng, 64, 8), unit_rows(rng, 64, 8)
    assert_close(ours(data_mesh, image, text, 14.3), dense(rounded(image), rounded(text), 14.3))


def test_a_mesh_with_all_three_axes() -> None:
    rng = np.random.default_rng(4)
    image, text = unit_rows(rng, 32, 8), unit_rows(rng, 32, 8)
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    assert_close(ours(mesh, image, text, 14.3), dense(rounded(image), rounded(text), 14.3))


def test_nothing_of_size_n_by_n_is_ever_alive() -> None:
    n, d = 8192, 64
    mesh = sharding.make_mesh({"fsdp": 8})
    shape = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return contrastive_loss(image, text, scale, mesh=mesh, axis_names=sharding.BATCH_AXES)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, scalar).compile()
    local_rows_of_logits = (n // 8) * n * 4
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and program is not None
    assert memory.temp_size_in_bytes < local_rows_of_logits / 2
    assert "collective-permute" in program
    assert "all-gather" not in program


def test_shapes_that_do_not_fit_are_named() -> None:
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ConfigError, match=r"12 examples are not divisible by the 8 shards"):
        contrastive_loss(jnp.ones((12, 4)), jnp.ones((12, 4)), jnp.ones(()), mesh=mesh, axis_names=sharding.BATCH_AXES)
    with pytest.raises(ConfigError, match=r"\(16, 4\) and text embeddings \(8, 4\)"):
        contrastive_loss(jnp.ones((16, 4)), jnp.ones((8, 4)), jnp.ones(()), mesh=mesh, axis_names="fsdp")


def rounded(x: np.ndarray) -> np.ndarray:
    """What the float32 program is given, in float64."""
    return x.astype(np.float32).astype(np.float64)
