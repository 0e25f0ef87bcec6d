"""The decoder against Hugging Face's five families and a float64 reference, its cache, and what it refuses."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ORACLES

from clip_jax import sharding
from clip_jax.errors import ConfigError
from flamingo_jax.interop import huggingface
from flamingo_jax.models import flamingo
from flamingo_jax.models.language_model import DecoderSpec, LanguageModel, causal_mask, positions

CASES = ("lm_llama", "lm_gpt2", "lm_neox", "lm_opt", "lm_mpt")
TINY: dict[str, Any] = dict(vocab_size=50, width=24, layers=2, heads=6, kv_heads=2, mlp_width=40)
CHINCHILLA: dict[str, Any] = TINY | dict(positions="relative", activation="gelu", kv_heads=6)
SPECS: dict[str, dict[str, Any]] = {  # what no peer at hand computes
    "chinchilla": CHINCHILLA,
    "chinchilla, shared keys": CHINCHILLA | dict(kv_heads=2, norm="layer", biases=True),
    "mpt-1b": TINY | dict(kv_heads=6, norm="layer", qk_norm=True, positions="alibi", activation="gelu"),
}


def assert_close(got: Any, expected: np.ndarray, tolerance: float) -> None:
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()


def model_and_params(name: str) -> tuple[LanguageModel, Any]:
    """A case's own model, or one of SPECS with parameters at random."""
    if name in CASES:
        imported = huggingface.read(ORACLES / name)
        return LanguageModel(imported.spec), jax.tree.map(jnp.asarray, imported.params)
    model = LanguageModel(DecoderSpec(**SPECS[name]))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), shapes_of(model))


def shapes_of(model: LanguageModel) -> Any:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), ids))["params"]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_hugging_faces(case: str) -> None:
    model, params = model_and_params(case)
    inputs, expected = (np.load(ORACLES / case / f"{part}.npz") for part in ("inputs", "expected"))
    tolerance = json.loads((ORACLES / case / "meta.json").read_text())["tolerance"]["value"]
    apply = jax.jit(model.apply)
    for side in ("left", "right"):
        mask = inputs[f"{side}_attention_mask"]
        np.testing.assert_array_equal(positions(jnp.asarray(mask)) * mask, inputs[f"{side}_position_ids"] * mask)
        with jax.default_matmul_precision("highest"):
            got = apply({"params": params}, inputs[f"{side}_input_ids"], mask.astype(bool))
        assert_close(got * mask[..., None], expected[f"logits_{side}"], tolerance)


def dense(spec: DecoderSpec, params: Any, text_L: np.ndarray) -> np.ndarray:
    """One row's logits in float64, from the papers' formulas, one pair of query and key at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    D, H, K = spec.width, spec.heads, spec.head_size

    def norm(x: np.ndarray, q: Any) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True) if spec.norm == "layer" else x
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + spec.norm_eps) * q["scale"] + q.get("bias", 0)

    def linear(x: np.ndarray, q: Any) -> np.ndarray:
        return np.tensordot(x, q["kernel"], 1) + q.get("bias", 0)

    x = p["embedding"][text_L]
    for layer in range(spec.layers):
        b = jax.tree.map(lambda w: w[layer], p["blocks"])  # noqa: B023
        y = norm(x, b["attention_norm"])
        q, k, v = (linear(y, b[name]) for name in ("query", "key", "value"))
        if spec.qk_norm:
            q = norm(q.reshape(len(x), -1), b["query_norm"]).reshape(q.shape)
            k = norm(k.reshape(len(x), -1), b["key_norm"]).reshape(k.shape)
        out = np.zeros((len(x), H, K))
        for h in range(H):
            shared = h // (H // spec.kv_heads)
            for i in range(len(x)):
                logits = []
                for j in range(i + 1):
                    if spec.positions == "relative":
                        w = (i - j) / 10000 ** (np.arange(0, D, 2) / D)
                        r = np.concatenate([np.sin(w), np.cos(w)]) @ b["position"]["kernel"][:, h]
                        content = (q[i, h] + b["content_bias"][h]) @ k[j, shared]
                        logits.append((content + (q[i, h] + b["position_bias"][h]) @ r) / np.sqrt(K))
                    else:  # slopes for 6 heads: of 8, the second, fourth, … first
                        slope = 2.0 ** -[2, 4, 6, 8, 1, 3][h]
                        logits.append(q[i, h] @ k[j, shared] / np.sqrt(K) - slope * (i - j))
                weights = np.exp(np.array(logits) - max(logits))
                out[i, h] = weights @ v[: i + 1, shared] / weights.sum()
        x = x + np.tensordot(out, b["out"]["kernel"], 2) + b["out"].get("bias", 0)
        hidden = linear(norm(x, b["mlp_norm"]), b["up"])
        erf = np.vectorize(math.erf)
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, b["down"])
    return norm(x, p["final_norm"]) @ p["embedding"].T


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_the_papers_formulas(name: str) -> None:
    model, params = model_and_params(name)
    text = np.random.default_rng(2).integers(0, 50, (1, 9))
    expected = dense(model.spec, params, text[0])
    # The same text without padding, and with padding before and after it.
    places = [(0, 3), (3, 0), (1, 2)]
    rows = np.concatenate([np.pad(text, ((0, 0), place)) for place in places])
    mask = np.concatenate([np.pad(np.ones((1, 9), bool), ((0, 0), place)) for place in places])
    with jax.default_matmul_precision("highest"):
        got = jax.jit(model.apply)({"params": params}, rows, mask)
    for row, (before, _) in zip(got, places, strict=True):
        assert_close(row[before : before + 9], expected, 1e-5)


@pytest.mark.parametrize("name", [*CASES, "chinchilla, shared keys", "mpt-1b"])
def test_a_cache_changes_no_logits(name: str) -> None:
    model, params = model_and_params(name)
    rng, first, more = np.random.default_rng(3), 5, 4
    text = rng.integers(0, 50, (2, first + more)).astype(np.int32)
    mask = np.ones(text.shape, bool)
    mask[1, :3] = False
    S = text.shape[1]

    @jax.jit
    def read(params: Any, text: Any, position: Any, seen: Any, cache: Any, start: Any) -> Any:
        x = model.apply({"params": params}, text, method="embed")
        x = model.apply({"params": params}, x, position, S, method="place")
        kept = []
        for i in range(model.layers):
            block = {"params": flamingo.layer(params["blocks"], i)}
            x, pair = model.block().apply(block, x, position, seen, cache[i], start)
            kept.append(pair)
        return model.apply({"params": params}, x, method="logits")[0], kept

    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(model.apply)({"params": params}, text, mask))
        position, seen = positions(jnp.asarray(mask)), causal_mask(jnp.asarray(mask))
        zeros = jnp.zeros((2, model.kv_heads, S, model.spec.head_size))
        cache = [(zeros, zeros)] * model.layers
        got, cache = read(params, text[:, :first], position[:, :first], seen[:, :first], cache, 0)
        steps = [got]
        for at in range(first, S):
            now = slice(at, at + 1)
            got, cache = read(params, text[:, now], position[:, now], seen[:, now], cache, at)
            steps.append(got)
    assert_close(np.concatenate(steps, axis=1) * mask[..., None], expected * mask[..., None], 1e-5)


def test_a_tied_head_is_the_embedding() -> None:
    model, params = model_and_params("lm_llama")
    text = np.load(ORACLES / "lm_llama" / "inputs.npz")["right_input_ids"]
    untied = jax.jit(model.apply)({"params": params | {"head": params["embedding"]}}, text)
    del params["head"]
    tied = jax.jit(LanguageModel(dataclasses.replace(model.spec, tied=True)).apply)({"params": params}, text)
    np.testing.assert_array_equal(tied, untied)


@pytest.mark.parametrize("name", [*CASES, "chinchilla", "mpt-1b"])
def test_every_axis_has_a_rule(name: str) -> None:
    model, _ = model_and_params(name)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    sharding.check_names(boxed, sharding.DEFAULT_RULES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 7}, "width 24: 7 heads must divide it"),
        ({"kv_heads": 4}, "4 key/value heads must divide them"),
        ({"heads": 8, "kv_heads": 2}, "3 of head size 3 is odd"),
        ({"rotary_fraction": 0.25}, "1 of head size 4 is odd"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of rms, layer"),
        ({"positions": "absolute"}, "positions is 'absolute'; expected one of rotary, learned, alibi, relative"),
        ({"activation": "elu"}, "activation is 'elu'; expected one of swiglu, "),
        ({"positions": "learned"}, "max_positions is 0; learned ones need at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderSpec(**TINY | changed)


def test_a_row_longer_than_the_learned_positions_is_refused() -> None:
    model = LanguageModel(DecoderSpec(**TINY, positions="learned", max_positions=8))
    with pytest.raises(ConfigError, match="a row of 9 tokens: this language model has 8 positions"):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 9), jnp.int32))
