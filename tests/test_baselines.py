"""The baselines of CLIP's figure 2: their losses, their models, their scores of labels, whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from conftest import ORACLES
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.sources import open_source
from clip_jax.errors import ConfigError
from clip_jax.losses.bag_of_words import bag_of_words_losses
from clip_jax.losses.next_token import caption_losses
from clip_jax.models.captioner import Captioner
from clip_jax.models.variants import build_vision, get_variant
from clip_jax.training import checkpoint
from clip_jax.training.loop import train
from configs.clip import bag_of_words, captioning
from configs.clip.common import baseline
from configs.clip.emoji_vit import get_config as emoji_vit
from launch.tasks import build_task

START, END, V, L = 17, 18, 19, 7
TEXT = np.array(
    [
        [START, 4, 4, 9, END, 0, 0],  # a word twice
        [START, 5, END, 3, 5, END, 2],  # words after the end do not count
        [START, 1, 2, 3, 4, 5, END],
        [START, END, 0, 0, 0, 0, 0],  # no word
        [START, 0, 16, 0, END, END, END],  # the padding's id is a word before the end
        [START, 3, 3, 3, 3, 3, END],
        [START, 7, 8, 7, END, 0, 0],
        [START, 6, 2, END, 0, 0, 0],
    ],
    np.int32,
)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def words_oracle(logits: np.ndarray) -> tuple[float, np.ndarray]:
    """(mean loss, gradient) by the definition, example by example."""
    log_p = log_softmax(logits)
    total, gradient = 0.0, np.zeros_like(logits)
    for i, row in enumerate(TEXT.tolist()):
        words = sorted(set(row[1 : row.index(END)]))
        if words:
            total -= log_p[i, words].mean()
            gradient[i] = np.exp(log_p[i])
            gradient[i, words] -= 1 / len(words)
    return total / len(TEXT), gradient / len(TEXT)


def caption_oracle(logits: np.ndarray) -> tuple[float, np.ndarray]:
    log_p = log_softmax(logits)
    total, count, gradient = 0.0, 0, np.zeros_like(logits)
    for i, row in enumerate(TEXT.tolist()):
        for place in range(1, row.index(END) + 1):
            total, count = total - log_p[i, place - 1, row[place]], count + 1
            gradient[i, place - 1] = np.exp(log_p[i, place - 1])
            gradient[i, place - 1, row[place]] -= 1
    return total / count, gradient / count


def words_loss(logits: jax.Array, text: jax.Array) -> jax.Array:
    return bag_of_words_losses(logits, text, START, END).mean()


def caption_loss(logits: jax.Array, text: jax.Array) -> jax.Array:
    losses, tokens = caption_losses(logits, text, END)
    return losses.sum() / tokens.sum()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("loss", "oracle", "shape"),
    [(words_loss, words_oracle, (8, V)), (caption_loss, caption_oracle, (8, L, V))],
    ids=["bag_of_words", "captioning"],
)
def test_losses_and_gradients_are_those_of_the_definition(
    devices: int, loss: Callable[..., jax.Array], oracle: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    logits = (30 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    placed = jax.device_put((logits, TEXT), sharding.batch_sharding(mesh))
    value, gradient = jax.jit(jax.value_and_grad(loss))(*placed)
    expected, expected_gradient = oracle(logits.astype(np.float64))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.abs(np.asarray(gradient) - expected_gradient).max() <= 1e-6 * np.abs(expected_gradient).max()


def one() -> Mesh:
    return sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])


def small(name: str, micro_batches: int = 1) -> ml_collections.ConfigDict:
    config = baseline(emoji_vit("debug"), name)
    config.micro_batches = micro_batches
    return config


def variables_of(task: Any) -> Any:
    """Its parameters, away from their initial values: a bias is not 0, a scale not 1."""
    params = sharding.unbox(jax.jit(task.init)(jax.random.key(0))[0])
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("name", ["bag_of_words", "captioning"])
def test_a_label_s_score_is_what_it_would_cost(name: str) -> None:
    config = small(name)
    config.evaluation_batch_size = 8
    task: Any = build_task(config, one())
    params = variables_of(task)
    source = [open_source("emoji:unseen_concepts")[i] for i in range(0, 120, 8)]
    found = task.evaluator(params, {}, one())(source)
    assert found.figures["images"] == 15 and found.figures["classes"] == len(found.names) == 15

    # One picture and one label at a time, by the model and the loss that are trained.
    images = np.stack([task.streams()["pairs"].element(i)["image"] for i in range(8)])
    text = task.tokenize(found.names[:8])
    evaluate = jax.jit(lambda batch: task.outputs(params, {}, {}, batch, jax.random.key(0), use)[0])

    def use(output: Any, batch: Any) -> jax.Array:
        if name == "captioning":
            return caption_losses(output[0], batch["text"], task.tokenizer.end_id)[0]
        return bag_of_words_losses(output, batch["text"], task.tokenizer.start_id, task.tokenizer.end_id)

    rows = jax.jit(lambda p, x: task.rows({"params": p}, {"image": task.normalize(x)}))(params, images)
    scores = jax.jit(lambda p, r, i: task.scores({"params": p}, r, i))(params, rows, text)
    for j in (0, 3):
        cost = evaluate({"image": images, "text": np.tile(text[j], (8, 1))})
        np.testing.assert_allclose(scores[:, j], -cost, rtol=1e-4)


def test_parts_of_a_batch_give_its_gradient() -> None:
    gradients = []
    for k in (1, 2):
        task: Any = build_task(small("captioning", k), one())
        params = variables_of(task)
        elements = [task.streams()["pairs"].element(i) for i in range(8)]
        batch = {key: np.stack([e[key] for e in elements]) for key in ("image", "text")}
        loss = jax.grad(lambda p, b, t=task: t.loss(p, {}, {}, b, jax.random.key(0))[0])
        gradients.append(jax.jit(loss)(params, batch))
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients[0]))
    for whole, parts in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert float(jnp.abs(whole - parts).max()) <= 1e-5 * scale


def test_the_decoder_is_pytorch_s() -> None:
    weights, inputs, expected = (
        np.load(ORACLES / "captioner" / f"{name}.npz") for name in ("weights", "inputs", "expected")
    )
    D, H, layers = inputs["embedding"].shape[1], 2, 2

    def stacked(name: str, shape: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> np.ndarray:
        return np.stack([shape(weights[f"layers.{i}.{name}"]) for i in range(layers)])

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    def attention(name: str) -> dict[str, Any]:
        out = {"kernel": stacked(f"{name}.out_proj.weight", lambda w: w.T.reshape(H, -1, D)),
               "bias": stacked(f"{name}.out_proj.bias")}  # fmt: skip
        return {"out": out} | {
            part: {
                "kernel": stacked(f"{name}.in_proj_weight", lambda w: w.T.reshape(D, 3, H, -1))[:, :, j],
                "bias": stacked(f"{name}.in_proj_bias", lambda b: b.reshape(3, H, -1))[:, j],
            }
            for j, part in enumerate(("query", "key", "value"))
        }

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": stacked(f"{name}.weight", np.transpose), "bias": stacked(f"{name}.bias")}

    params = {
        "token_embedding": inputs["embedding"],
        "position_embedding": inputs["position"],
        "blocks": {
            "attention_norm": norm("norm1"), "attention": attention("self_attn"),
            "cross_attention_norm": norm("norm2"), "cross_attention": attention("multihead_attn"),
            "mlp_norm": norm("norm3"), "mlp": {"up": linear("linear1"), "down": linear("linear2")},
        },
        "ln_final": {"scale": weights["norm.weight"], "bias": weights["norm.bias"]},
    }  # fmt: skip
    model = Captioner(
        vision=build_vision(get_variant("debug-ViT")), vocab_size=23, context_length=6, width=D, layers=layers, heads=H,
        mlp_width=24, activation="gelu",
    )  # fmt: skip
    batch = {"image_tokens": inputs["image"], "text": inputs["text"]}
    with jax.default_matmul_precision("highest"):
        logits, _ = model.apply({"params": params}, batch)
    assert np.abs(logits - expected["logits"]).max() <= 1e-5 * np.abs(expected["logits"]).max()


def test_a_token_sees_those_before_it_and_the_picture() -> None:
    task: Any = build_task(small("captioning"), one())
    params, rng = variables_of(task), np.random.default_rng(0)
    image = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    text = rng.integers(1, 4000, size=(2, 6), dtype=np.int32)
    apply = jax.jit(lambda image, text: task.model.apply({"params": params}, {"image": image, "text": text})[0])
    before = apply(image, text)
    later = text.copy()
    later[:, 3] += 1
    changed = np.abs(apply(image, later) - before).max(axis=(0, 2))
    assert (changed[:3] == 0).all() and (changed[3:] > 1e-3).all()
    other = np.abs(apply(image[::-1], text) - before).max(axis=2)
    assert (other > 1e-3).all()


@pytest.mark.parametrize(("config_file", "variant"), [(bag_of_words, "debug-RN"), (captioning, "debug-ViT")])
def test_a_run_is_trained_and_evaluated(
    config_file: Any, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import evaluate

    config = config_file.get_config("debug")
    config.model = get_variant(variant)
    config.steps, config.data.evaluate = 2, {}
    mesh = one()
    state = train(config, build_task(config, mesh), tmp_path, mesh)
    assert set(state.params) >= {"vision"} and "text" not in state.params
    path = checkpoint.latest(tmp_path)
    metadata = checkpoint.metadata(path)
    family = metadata["model"]["family"]
    assert family == config.task
    config = ml_collections.ConfigDict(metadata["config"])
    config.data.evaluate, config.evaluation_batch_size = {"unseen_concepts": "emoji:unseen_concepts"}, 30
    monkeypatch.setattr(evaluate, "open_source", lambda spec: [open_source(spec)[i] for i in range(50)])
    results, shown = evaluate.EVALUATORS[family][0](config, mesh, path)
    figures = results["sources"]["unseen_concepts"]
    assert figures["images"] == 50 and figures["chance"]["top1"] == 1 / figures["classes"]
    assert 0 <= figures["top1"] <= figures["top5"] < 0.5  # two steps teach nothing
    assert len(shown["unseen_concepts"]["classification"][0]["top"]) == 5
    evaluate.EVALUATORS[family][1](results)


def test_captions_need_a_start_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_jax.data.tokenizer import load_tokenizer
    from clip_jax.training import pair_task

    tokenizer = load_tokenizer("emoji/tokenizer.json")
    tokenizer.start_id = None
    monkeypatch.setattr(pair_task, "load_tokenizer", lambda _: tokenizer)
    with pytest.raises(ConfigError, match="emoji/tokenizer.json has no start token: expected one, for captions to"):
        build_task(small("captioning"), one())
