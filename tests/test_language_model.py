"""The language model against Hugging Face's LLaMA, published sizes, and what it refuses."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ORACLES

from clip_jax import sharding
from clip_jax.errors import ConfigError
from flamingo_jax.interop import huggingface
from flamingo_jax.models.language_model import LanguageModel, positions

ORACLE = ORACLES / "lm_llama"
PUBLISHED = {  # config.json's sizes, and the number of parameters that each model is published with
    "SmolLM2-135M": ((49152, 576, 30, 9, 3, 1536, True), 134_515_008),
    "TinyLlama-1.1B": ((32000, 2048, 22, 32, 4, 5632, False), 1_100_048_384),
    "Llama-2-7B": ((32000, 4096, 32, 32, 32, 11008, False), 6_738_415_616),
}
SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width", "tied")


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_hugging_faces(side: str) -> None:
    fields, params = huggingface.read(ORACLE)
    inputs, expected = np.load(ORACLE / "inputs.npz"), np.load(ORACLE / "expected.npz")[f"logits_{side}"]
    mask = inputs[f"{side}_attention_mask"]
    np.testing.assert_array_equal(positions(jnp.asarray(mask)) * mask, inputs[f"{side}_position_ids"] * mask)
    with jax.default_matmul_precision("highest"):
        got = LanguageModel(**fields).apply({"params": params}, inputs[f"{side}_input_ids"], mask.astype(bool))
    tolerance = json.loads((ORACLE / "meta.json").read_text())["tolerance"]["value"]
    assert np.abs(got * mask[..., None] - expected).max() <= tolerance * np.abs(expected).max()


def test_a_tied_head_is_the_embedding() -> None:
    fields, params = huggingface.read(ORACLE)
    text = np.load(ORACLE / "inputs.npz")["right_input_ids"]
    untied = LanguageModel(**fields).apply({"params": params | {"head": params["embedding"]}}, text)
    del params["head"]
    tied = LanguageModel(**fields | {"tied": True}).apply({"params": params}, text)
    np.testing.assert_array_equal(tied, untied)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    sizes, count = PUBLISHED[name]
    model = LanguageModel(**dict(zip(SIZES, sizes, strict=True)))
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(sharding.unbox(variables))) == count


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 7}, "width 48: 7 heads must divide it"),
        ({"kv_heads": 4}, "4 key/value heads must divide them"),
        ({"heads": 16, "kv_heads": 2}, "head size 3 is odd"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    fields = huggingface.model_fields(json.loads((ORACLE / "config.json").read_text()) | {"head_dim": None}, "")
    with pytest.raises(ConfigError, match=message):
        LanguageModel(**fields | changed).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
