"""Decoding: against transformers' IDEFICS (its tokens, logits, beams and samplers) and against the whole model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ORACLES
from test_flamingo_interop import idefics_batch

from clip_jax.errors import ConfigError
from flamingo_jax import decoding
from flamingo_jax.decoding.generation import check_batch
from flamingo_jax.decoding.sampling import Sampling, log_probability
from flamingo_jax.interop.idefics import read_idefics
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.variants import build_flamingo
from launch import benchmark

CASE, NEW, V = "hf_idefics_float", 10, 93
EXPECTED = np.load(ORACLES / "idefics_decoding" / "expected.npz")
STOP = tuple(EXPECTED["stop_ids"].tolist())
Batch = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model_and_variables() -> tuple[Flamingo, Any]:
    imported = read_idefics(ORACLES / CASE)
    return build_flamingo(imported.config), decoding.unstack(imported.variables)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return idefics_batch(np.load(ORACLES / CASE / "inputs.npz"))


@pytest.fixture(scope="module")
def generate(model_and_variables: tuple[Flamingo, Any]) -> Any:
    return partial(decoding.generate, *model_and_variables, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def said(generate: Any, batch: Batch) -> np.ndarray:
    """Greedy tokens; transformers' own, as far as it went."""
    tokens = np.asarray(generate(batch).tokens)
    np.testing.assert_array_equal(tokens[:, :8], np.load(ORACLES / CASE / "expected.npz")["generated"])
    return tokens


def assert_close(got: Any, expected: Any, tolerance: float = 3e-5) -> None:
    assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.abs(expected).max()


def test_a_cache_goes_on_where_it_was_left(
    model_and_variables: tuple[Flamingo, Any], batch: Batch, said: np.ndarray
) -> None:
    """Three tokens at once, or one by one: the same logits, and the tokens that generation chose."""
    model, variables = model_and_variables
    step, extend = (jax.jit(partial(f, model)) for f in (decoding.step, decoding.extend))
    logits, start = decoding.read_prompts(model, variables, batch, room=NEW - 1)  # `prefill`, compiled
    found, cache = [], start
    for i in range(4):
        np.testing.assert_array_equal(np.argmax(logits, axis=-1), said[:, i])
        logits, cache = step(variables, cache, said[:, i])
        found.append(logits)
    together, three = extend(variables, start, said[:, :3], np.ones((3, 3), bool))
    assert_close(together, np.stack(found[:3], axis=1))
    assert_close(step(variables, three, said[:, 3])[0], found[3])
    assert int(three.start) == 18 and np.array_equal(three.length, batch["text_mask"].sum(axis=1) + 3)
    more, _ = decoding.resume(model, variables, together[:, -1], decoding.grow(three, 3), max_new_tokens=NEW)
    np.testing.assert_array_equal(more.tokens[:, :7], said[:, 3:])
    with pytest.raises(ConfigError, match="7 more tokens: the cache has 24 slots, of which 18 are taken"):
        decoding.extend(*model_and_variables, three, said[:, :7], np.ones((3, 7), bool))


def test_cached_features_are_decoded(model_and_variables: tuple[Flamingo, Any], batch: Batch) -> None:
    """transformers' logits, from what the tower made of the images."""
    model, variables = model_and_variables
    features = jax.jit(partial(model.apply, method="look"))(variables, batch["media"])
    cached = {key: value for key, value in batch.items() if key != "media"} | {"features": features}
    check_batch(model, cached)
    logits, _ = decoding.read_prompts(model, variables, cached, room=0)
    assert_close(logits, np.load(ORACLES / CASE / "expected.npz")["logits"][:, -1])
    with pytest.raises(ConfigError, match=r"frame_mask has shape \[3, 3, 1\]; .* and features \[3, 2, 1, .*need"):
        check_batch(model, cached | {"features": features[:, :2], "media_mask": batch["media_mask"][..., :2]})


def test_a_second_turn_brings_an_image_and_its_own_padding(
    model_and_variables: tuple[Flamingo, Any], batch: Batch
) -> None:
    """transformers' logits of the whole text, read in two turns; the second one's rows are padded on the right."""
    model, variables = model_and_variables
    P, turn = 8, ("text", "text_mask", "media_mask")
    assert not batch["media_mask"][:, :P, 2].any() and batch["media_mask"][:, P:, 2].any()
    first = {key: batch[key][:, :P] for key in turn} | {key: batch[key][:, :2] for key in ("media", "frame_mask")}
    first["media_mask"] = first["media_mask"][..., :2]

    @jax.jit
    def read(variables: Any, first: Batch, more: Batch) -> tuple[jax.Array, decoding.Cache]:
        logits, cache = decoding.prefill(model, variables, first, room=3)
        cache = decoding.add_media(model, variables, cache, batch["media"][:, 2:], batch["frame_mask"][:, 2:])
        after, cache = decoding.extend(model, variables, decoding.grow(cache, 6), *(more[key] for key in turn))
        return jnp.concatenate([logits[:, None], after], axis=1), cache

    pad = 2
    second = {key: np.pad(batch[key][:, P:], ((0, 0), (0, pad), (0, 0))[: batch[key].ndim]) for key in turn}
    logits, cache = read(variables, first, second)
    expected = np.load(ORACLES / CASE / "expected.npz")["logits"]
    assert_close(logits[:, :-pad], expected[:, P - 1 :])
    np.testing.assert_array_equal(cache.media_mask, batch["media_mask"][:, -1])
    np.testing.assert_array_equal(cache.length, batch["text_mask"].sum(axis=1))
    np.testing.assert_array_equal(cache.text_mask[:, P:], np.broadcast_to(np.arange(9) < 7, (3, 9)))


def test_rows_do_not_mix(generate: Any, batch: Batch, said: np.ndarray) -> None:
    order = np.array([2, 0, 1])
    turned = {key: value[order] for key, value in batch.items()}
    turned["text"] = np.where(turned["text_mask"], turned["text"], 5)  # what padding says does not matter
    np.testing.assert_array_equal(generate(turned).tokens, said[order])


def test_scores_and_ends(generate: Any, batch: Batch, said: np.ndarray, model_and_variables: Any) -> None:
    stop = (int(said[0, 2]), int(said[1, 4]))
    free, ended = generate(batch), generate(batch, stop_ids=stop)
    for row, tokens, length in zip(said, np.asarray(ended.tokens), np.asarray(ended.lengths), strict=True):
        at = next((i + 1 for i, token in enumerate(row) if token in stop), NEW)
        assert length == at and np.array_equal(tokens[:at], row[:at]) and (tokens[at:] == stop[0]).all()
    assert len({*np.asarray(ended.lengths).tolist()}) > 1
    model, variables = model_and_variables
    given = decoding.score(model, variables, batch, said[:, None], np.ones((3, 1, NEW), bool))
    np.testing.assert_allclose(free.scores, given[:, 0], rtol=1e-5)
    cut = np.arange(NEW) < np.asarray(ended.lengths)[:, None]
    given = decoding.score(model, variables, batch, said[:, None], cut[:, None])
    np.testing.assert_allclose(ended.scores, given[:, 0], rtol=1e-5)


def test_beams_are_transformers(generate: Any, batch: Batch) -> None:
    for i, penalty in enumerate(EXPECTED["length_penalty"]):
        found = generate(batch, num_beams=int(EXPECTED["beams"]), length_penalty=penalty, stop_ids=STOP)
        np.testing.assert_array_equal(found.tokens, EXPECTED["tokens"][i])
        np.testing.assert_allclose(found.scores, EXPECTED["scores"][i], rtol=1e-5)
        ends = np.isin(EXPECTED["tokens"][i], STOP)
        np.testing.assert_array_equal(found.lengths, np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, NEW))


def test_samplers_keep_what_transformers_keep() -> None:
    for (temperature, top_k, top_p), expected in zip(EXPECTED["samplers"], EXPECTED["restricted"], strict=True):
        got = Sampling(float(temperature), int(top_k), float(top_p)).restrict(jnp.asarray(EXPECTED["logits"]))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    sampling, n = Sampling(0.7, 5, 0.95), 40_000
    logits = jnp.asarray(EXPECTED["logits"][:1])
    drawn = sampling.choose(jnp.broadcast_to(logits, (n, 40)), jax.random.key(3))
    p = np.asarray(jax.nn.softmax(sampling.restrict(logits)))[0]
    share = np.bincount(drawn, minlength=40) / n
    assert np.abs(share - p).max() < 5 * np.sqrt(p.max() * (1 - p.max()) / n) and not share[p == 0].any()


def test_drawn_tokens_depend_on_the_key_alone(generate: Any, batch: Batch) -> None:
    draw = partial(generate, batch, temperature=0.8, top_k=4)
    one, again, other = (draw(key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert not np.array_equal(one.tokens, other.tokens)
    assert (np.asarray(one.scores) < np.asarray(generate(batch).scores)).any()  # of the model, not of its top 4


def test_likelihoods_are_those_of_the_whole_text(model_and_variables: tuple[Flamingo, Any], batch: Batch) -> None:
    model, variables = model_and_variables
    rng = np.random.default_rng(0)
    ids, mask = decoding.pad_continuations([rng.integers(0, V, n).tolist() for n in (3, 1, 4, 2, NEW)])
    got = decoding.score(model, variables, batch, ids, mask, at_once=2)
    assert got.shape == (3, 5)
    C = ids.shape[1]
    whole, stacked = jax.jit(model.apply), read_idefics(ORACLES / CASE).variables
    for n in range(5):
        joined = {
            "text": np.concatenate([batch["text"], np.broadcast_to(ids[n], (3, C))], axis=1),
            "text_mask": np.concatenate([batch["text_mask"], np.broadcast_to(mask[n], (3, C))], axis=1),
            "media_mask": np.concatenate([batch["media_mask"], np.repeat(batch["media_mask"][:, -1:], C, 1)], axis=1),
        }
        logits = np.asarray(whole(stacked, batch | joined), np.float64)[:, -C - 1 : -1]
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        each = np.take_along_axis(logits, np.broadcast_to(ids[n], (3, C))[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(got[:, n], (each * mask[n]).sum(axis=1), rtol=1e-5)


def spell(ids: Any) -> str:
    """Two letters a token, so that a stop string may begin and end inside tokens."""
    return "".join(chr(97 + i // 10) + chr(97 + i % 10) for i in ids)


def test_tokens_come_as_they_are_chosen(generate: Any, batch: Batch, said: np.ndarray) -> None:
    came: list[np.ndarray] = []
    stop = (int(said[0, 2]), int(said[1, 4]))
    found = generate(batch, stop_ids=stop, on_tokens=came.append)
    streamed = np.concatenate(came, axis=1)
    for row, tokens, length in zip(streamed, np.asarray(found.tokens), np.asarray(found.lengths), strict=True):
        assert np.array_equal(row[:length], tokens[:length]) and (row[length:] == -1).all()
    assert (streamed == -1).any()


def test_a_stop_string_ends_a_row(generate: Any, batch: Batch, said: np.ndarray) -> None:
    inside = [spell(row[k : k + 2])[1:3] for row, k in zip(said, (1, 4, 2), strict=True)]
    came: list[np.ndarray] = []
    found = generate(batch, stop_strings=inside, decode=spell, on_tokens=came.append)
    for row, length in zip(said, np.asarray(found.lengths), strict=True):
        text, shorter = spell(row[:length]), spell(row[: length - 1])
        assert decoding.truncate(text, inside) != text and decoding.truncate(shorter, inside) == shorter
    assert len(came) == max(found.lengths) < NEW  # nothing is computed after the last row's end
    assert decoding.truncate("one\ntwo; three", (";", "\n")) == "one"


def test_rows_that_ended_at_different_places_go_on(
    model_and_variables: tuple[Flamingo, Any], batch: Batch, said: np.ndarray
) -> None:
    """The whole model's logits of each row's prompt and what was said, at its last token."""
    model, variables = model_and_variables
    logits, cache = decoding.read_prompts(model, variables, batch, room=NEW - 1)
    inside = [spell(row[k : k + 2])[1:3] for row, k in zip(said, (1, 4, 2), strict=True)]
    found, cache = decoding.resume(
        model, variables, logits, cache, max_new_tokens=NEW, stop_strings=inside, decode=spell
    )
    lengths, tokens = np.asarray(found.lengths), np.asarray(found.tokens)
    assert len({*lengths.tolist()}) > 1 and lengths.max() < NEW
    np.testing.assert_array_equal(cache.length, batch["text_mask"].sum(axis=1) + lengths - 1)
    rows = np.arange(3)
    got, _ = jax.jit(partial(decoding.step, model))(variables, cache, tokens[rows, lengths - 1])
    joined = {
        "text": np.concatenate([batch["text"], tokens], axis=1),
        "text_mask": np.concatenate([batch["text_mask"], np.arange(NEW) < lengths[:, None]], axis=1),
        "media_mask": np.concatenate([batch["media_mask"], np.repeat(batch["media_mask"][:, -1:], NEW, 1)], axis=1),
    }
    whole = jax.jit(model.apply)(read_idefics(ORACLES / CASE).variables, batch | joined)
    assert_close(got, np.asarray(whole)[rows, batch["text"].shape[1] + lengths - 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0.*: expected at least 1"),
        ({"temperature": 1.0}, "expected a key"),
        ({"top_k": 5}, "expected a temperature above 0"),
        ({"temperature": -1.0}, "expected temperature >= 0"),
        ({"stop_strings": ["x"]}, "expected a function `decode`"),
        ({"num_beams": 2, "on_tokens": print}, "expected neither a temperature, nor stop_strings, nor on_tokens"),
        (
            {"batch": {"media_mask": np.ones((3, 15, 2), bool)}},
            r"media_mask has shape \[3, 15, 2\]; .*need \[3, 15, 3",
        ),
        ({"batch": {"text_mask": np.arange(15) < np.array([[15], [14], [15]])}}, "prompt 1 ends in padding"),
        ({"batch": {"text": np.full((3, 15), V, np.int32)}}, "ids from 93 to 93: this model has ids from 0 to 92"),
    ],
)
def test_what_does_not_fit_is_named(generate: Any, batch: Batch, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(batch | options.pop("batch", {}), **options)


def test_continuations_that_do_not_fit_are_named(model_and_variables: tuple[Flamingo, Any], batch: Batch) -> None:
    with pytest.raises(ConfigError, match="a token in each"):
        decoding.pad_continuations([[1], []])
    with pytest.raises(ConfigError, match=r"continuations of shape \[2, 4, 1\] .*: expected \[N, C\] or \[3, N, C\]"):
        decoding.score(*model_and_variables, batch, np.ones((2, 4, 1), np.int32), np.ones((2, 4, 1), bool))


def test_a_log_probability_is_the_models() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7))
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(3), [0, 6, 2]]
    np.testing.assert_allclose(log_probability(jnp.asarray(logits), jnp.array([0, 6, 2])), expected, rtol=1e-5)


def test_the_benchmark_names_what_is_not_installed(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["benchmark", "flamingo"])
    benchmark.main()
    out = capsys.readouterr().out
    assert "- Flamingo, idefics's design: not run: transformers, torch not installed" in out
    assert "- Flamingo, open_flamingo's design: not run: " in out
