"""Frozen weights in int8: qwix's own values, logits close to float32's, decoding, memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from test_flamingo_interop import ORACLES, idefics_batch, load, logits, open_flamingo, open_flamingo_batch, read_idefics

from clip_jax.errors import ConfigError
from flamingo_jax.decoding import generate
from flamingo_jax.interop.open_flamingo import ImportedFlamingo, initial_params
from flamingo_jax.models.variants import build_flamingo, get_variant
from flamingo_jax.quantization import FROZEN, bytes_of, quantize

CASE = "hf_idefics_float"


def is_int8(leaf: Any) -> bool:
    return isinstance(leaf, qwix.QArray)


def with_params(model: ImportedFlamingo, params: Any) -> ImportedFlamingo:
    return dataclasses.replace(model, variables={"params": params})


@pytest.fixture(scope="module")
def held() -> tuple[ImportedFlamingo, Any]:
    """(IDEFICS in float32, its parameters in int8)."""
    model = read_idefics(ORACLES / CASE)
    return model, quantize(model.variables["params"], model.config)


def test_products_are_those_of_the_dequantised_weights(held: Any) -> None:
    model, params = held
    inputs, expected, _ = load(CASE)
    batch = idefics_batch(inputs)
    dense = jax.tree.map(lambda x: qwix.dequantize(x) if is_int8(x) else x, params, is_leaf=is_int8)
    got, want = (logits(with_params(model, tree), batch) for tree in (params, dense))
    scale = np.abs(want).max()
    assert np.abs(got - want).max() <= 2e-5 * scale
    # Of a model this narrow a weight's rounding costs much: 6.5 % of the largest logit were measured.
    mask = batch["text_mask"][..., None]
    assert 1e-3 * scale < np.abs((got - expected["logits"]) * mask).max() <= 0.1 * scale


def test_decoding_says_mostly_the_same(held: Any) -> None:
    model, params = held
    inputs, expected, _ = load(CASE)
    with jax.default_matmul_precision("highest"):
        said = generate(build_flamingo(model.config), {"params": params}, idefics_batch(inputs), max_new_tokens=8)
    assert (np.asarray(said.tokens) == expected["generated"]).mean() >= 0.75  # 21 of 24 tokens were measured


def test_a_tied_table_of_words_is_read_and_multiplied_in_int8() -> None:
    inputs, expected, _ = load("of_opt")
    model, batch = open_flamingo("of_opt"), open_flamingo_batch(inputs, load("of_opt")[2])
    params = quantize(model.variables["params"], model.config, ("language_model/embedding",))
    table = params["language_model"]["embedding"]
    assert is_int8(table) and table.scale.shape == (len(table.qvalue), 1)
    got = logits(with_params(model, params), batch)[..., : expected["logits"].shape[-1]]
    error = np.abs((got - expected["logits"]) * batch["text_mask"][..., None]).max()
    assert 0 < error <= 0.05 * np.abs(expected["logits"]).max()


def test_memory_is_a_quarter_and_what_does_not_fit_is_named() -> None:
    config = get_variant("IDEFICS-9B")
    whole = jax.eval_shape(lambda: initial_params(config))
    whole = jax.tree.map(lambda x: x.value, whole, is_leaf=lambda x: hasattr(x, "value"))
    small = jax.eval_shape(lambda params: quantize(params, config), whole)

    def size(params: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for name in FROZEN for leaf in jax.tree.leaves(params[name[:-1]]))

    assert 0.25 < size(small) / size(whole) < 0.252
    assert {leaf.dtype for leaf in jax.tree.leaves(small["gated"])} == {jnp.dtype("float32")}
    assert bytes_of({"a": np.zeros(3, np.int8), "b": np.zeros(2, np.float32)}) == 11
    with pytest.raises(ConfigError, match="int8 'languge_model/' matches no parameter; the nearest is language_model/"):
        quantize({}, config, ("languge_model/",))
