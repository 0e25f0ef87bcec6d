"""NFNet: the sizes that timm counts, the constants, stochastic depth, and what Flamingo taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.models.nfnet import GAMMA, NFNet, input_scales
from clip_jax.models.variants import build_text, build_vision, get_variant
from flamingo_jax.models.variants import build_flamingo
from flamingo_jax.models.variants import get_variant as get_flamingo

COUNTED = {  # timm 1.0.31: dm_nfnet_f0 to f6 without their classifier
    "nfnet_f0_bert": 68_416_284, "nfnet_f1_bert": 129_561_256, "nfnet_f2_bert": 190_706_228,
    "nfnet_f3_bert": 251_851_200, "nfnet_f4_bert": 312_996_172, "nfnet_f5_bert": 374_141_144,
    "nfnet_f6_bert": 435_286_116,
}  # fmt: skip
BERT_BASE = 108_891_648  # transformers 5.23.0: BertModel(BertConfig(), add_pooling_layer=False)


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts_are_the_peers(name: str) -> None:
    config = get_variant(name)
    size, length = config.vision.image_size, config.text.context_length
    image, text = jax.ShapeDtypeStruct((1, size, size, 3), "float32"), jax.ShapeDtypeStruct((1, length), "int32")
    for tower, given, counted in ((build_vision(config), image, COUNTED[name]), (build_text(config), text, BERT_BASE)):
        variables = sharding.unbox(jax.eval_shape(tower.init, jax.random.key(0), given))
        assert set(variables) == {"params"}  # no statistics
        projection = variables["params"].pop("projection")
        assert projection.shape[1] == 1376
        assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == counted


def test_the_activation_keeps_a_unit_variance() -> None:
    """γ is 1 / the standard deviation of GELU(x) for normal x: DeepMind's constant, sampled, holds within 1 ‰."""
    x = np.linspace(-12, 12, 200_001)
    weight = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0])
    y = np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)
    deviation = np.sqrt((y**2 * weight).sum() - (y * weight).sum() ** 2)
    assert abs(GAMMA * deviation - 1) < 1e-3


def test_each_block_adds_to_the_expected_variance() -> None:
    found = [1 / scale**2 for scale in input_scales((2, 3))]
    np.testing.assert_allclose(found[0], [1, 1.04])
    np.testing.assert_allclose(found[1], [1.08, 1.04, 1.08])  # the first reads the stage before


def test_at_the_start_a_block_is_its_shortcut() -> None:
    """skip_gain is 0: moving a branch's weights moves nothing."""
    config = get_variant("debug-NFNet")
    model = build_vision(config)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = sharding.unbox(jax.jit(model.init)(jax.random.key(0), image))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if "conv2" in str(path) and "stem" not in str(path) else x, variables
    )
    apply = jax.jit(lambda v: model.apply(v, image)[1])
    np.testing.assert_array_equal(apply(variables), apply(moved))


def test_stochastic_depth() -> None:
    """Of one block each example keeps all or nothing, scaled so that the mean stays; evaluation drops none."""
    fields = dict(image_size=8, layers=(2,), channels=(8,), stem_width=8, group_size=4, embed_dim=8)
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32).repeat(512, axis=0)
    plain, dropping = NFNet(**fields), NFNet(**fields, drop_path=0.25)
    variables = sharding.unbox(jax.jit(plain.init)(jax.random.key(0), image))
    for stage in ("stage1_first", "stage1_rest"):
        gain = variables["params"][stage]["skip_gain"]
        variables["params"][stage]["skip_gain"] = jnp.full_like(gain, 0.7)
    whole, evaluated = (jax.jit(model.apply)(variables, image)[1] for model in (plain, dropping))
    np.testing.assert_array_equal(evaluated, whole)
    train = jax.jit(lambda v: dropping.apply(v, image, train=True, rngs={"dropout": jax.random.key(1)})[1])
    tokens = train(variables)
    outcomes, counts = np.unique(np.asarray(tokens).round(4).reshape(512, -1), axis=0, return_counts=True)
    assert len(outcomes) == 2  # the first block is never dropped, the last at drop_path
    assert abs(counts.min() / 512 - 0.25) < 5 * (0.25 * 0.75 / 512) ** 0.5


def test_flamingo_taps_its_grid() -> None:
    """The tower in Flamingo, on images of another size than its own."""
    config, clip = get_flamingo("debug"), get_variant("debug-NFNet")
    config.vision, config.embed_dim, config.activation = clip.vision, clip.embed_dim, clip.activation
    model = build_flamingo(config)
    batch = dict(
        media=jnp.zeros((2, 1, 2, 40, 40, 3)),
        frame_mask=jnp.ones((2, 1, 2), bool),
        text=jnp.ones((2, 5), int),
        text_mask=jnp.ones((2, 5), bool),
        media_mask=jnp.ones((2, 5, 1), bool),
    )
    shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    assert shapes["resampler"]["project"]["kernel"].shape == (64, 32)  # twice the last stage's width
    _, tokens = jax.eval_shape(build_vision(clip).apply, {"params": shapes["vision"]}, batch["media"][0, 0])
    assert tokens.shape == (2, 25, 64)


def test_widths_that_do_not_fit_are_named() -> None:
    fields = dict(image_size=8, layers=(2,), channels=(8,), stem_width=8, group_size=4, embed_dim=8)
    for change, message in (
        (dict(layers=(1, 1)), r"layers \(1, 1\) and channels \(8,\): one of each for each stage"),
        (dict(channels=(12,)), r"stem_width 8 and channels \(12,\): multiples of 8"),
        (dict(group_size=5), "group_size 5 does not divide 8, half of 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(NFNet(**{**fields, **change}).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
