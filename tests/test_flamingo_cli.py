"""flamingo-jax on toy pictures and toy models: what it prints and writes, against the model applied directly."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ORACLES
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models

from clip_jax import sharding
from clip_jax.interop.tensors import read_tensors
from clip_jax.training import checkpoint
from clip_jax.training.loop import run_metadata
from configs.flamingo import quickstart
from flamingo_jax.chat import images_in
from flamingo_jax.cli import main
from flamingo_jax.loading import Loaded, load
from flamingo_jax.speaker import settled
from flamingo_jax.training.flamingo_task import FlamingoTask

COLOURS = ["red", "lime", "blue", "white"]
NEW = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 images, one that is none, and shots."""
    directory = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        image = Image.new("RGB", (50, 40), colour)
        image.paste(Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)), (9, 5))
        image.save(directory / f"{colour}.png")
    (directory / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    shots = [{"image": "red.png", "question": "what?", "answer": "red"}, {"image": "blue.png", "question": "so?",
              "answer": "blue"}]  # fmt: skip
    (directory / "shots.jsonl").write_text("".join(json.dumps(shot) + "\n" for shot in shots))
    return directory


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's workdir with the quickstart's debug model; of random numbers, so that images matter."""
    workdir, config = tmp_path_factory.mktemp("ours"), quickstart.get_config("debug")
    task, rng = FlamingoTask(config, sharding.make_mesh()), np.random.default_rng(1)
    params, state = jax.tree.map(
        lambda leaf: rng.normal(0.5 if leaf.ndim < 2 else 0.0, 0.2, leaf.shape).astype(np.float32),
        sharding.unbox(jax.eval_shape(task.init, jax.random.key(0))),
    )
    items = {f"params.{name}": {name: tree} for name, tree in params.items()} | {"state": jax.tree.map(np.abs, state)}
    metadata = run_metadata(config, task) | {"step": 7}
    (workdir / "checkpoints").mkdir()
    checkpoint.write(workdir / "checkpoints" / "00000007", items, metadata)
    return workdir


@pytest.fixture(scope="module")
def loaded(ours: Path) -> Loaded:
    return load(ours)


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's instructed IDEFICS, with a tokenizer of single characters beside it."""
    directory = tmp_path_factory.mktemp("idefics") / "model"
    shutil.copytree(ORACLES / "hf_idefics_float", directory)
    known = ["<unk>", "<s>", "</s>", *"\n ?!.,:<>/_'0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-+"]
    vocab = {token: i for i, token in enumerate([*known, *(f"[{i}]" for i in range(len(known), 90))])}
    assert len(vocab) == 90
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def directly(loaded: Loaded, images: list[list[Path]], *texts: str) -> list[str]:
    """What greedy decoding says after images with texts between them."""
    tag, tokenizer = list(loaded.convention.image), loaded.tokenizer
    ids = tokenizer.start_ids
    for i, text in enumerate(texts):
        ids = ids + tag + tokenizer.encode(text) + ([loaded.convention.end_id] if i < len(texts) - 1 else [])
    batch = loaded.make_batch(images, [ids] * len(images))
    rows = np.asarray(loaded.generate(loaded.params, batch, max_new_tokens=4)).tolist()
    end = loaded.convention.end_id
    return [tokenizer.decode(row[: [*row, end].index(end)]).strip() for row in rows]


def test_captions_are_what_the_model_says(
    ours: Path, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 8 devices, the last batch filled up; an image that can't be read is left out, counted and named."""
    main(["caption", "--model", str(ours), str(pictures), "--show-prompt", *NEW])
    printed = capsys.readouterr()
    paths = sorted(pictures.glob("*.png"))
    expected = directly(loaded, [[path] for path in paths], "Output:")
    assert printed.out.splitlines() == [f"{path}\t{text}" for path, text in zip(paths, expected, strict=True)]
    assert len(set(expected)) > 1
    assert "<image>Output:\n" in printed.err and "1 of 5 images left out" in printed.err
    assert f"left out: {pictures}/broken.jpg: the image does not decode" in printed.err


def test_answers_follow_the_shots(
    ours: Path, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pictures / "lime.png"
    question = ("--question", "what now?", "--shots", pictures / "shots.jsonl", "--show-prompt")
    main(["answer", "--model", str(ours), str(image), *map(str, question), "--json", *NEW])
    printed = capsys.readouterr()
    texts = ["Question: what? Answer: red", "Question: so? Answer: blue", "Question: what now? Answer:"]
    expected = directly(loaded, [[pictures / "red.png", pictures / "blue.png", image]], *texts)
    assert json.loads(printed.out) == [{"image": str(image), "answer": expected[0]}]
    assert printed.err.strip() == "<image>" + "<EOC><image>".join(texts)


def test_scores_are_log_likelihoods(
    ours: Path, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, texts = pictures / "red.png", ["a dog", "the big cat", "a"]
    options = [option for text in texts for option in ("--text", text)]
    found = json.loads(run(capsys, "score", "--model", ours, image, "--prompt", "A photo of", "--json", *options))
    tokenizer = loaded.tokenizer
    start = [*tokenizer.start_ids, *loaded.convention.image, *tokenizer.encode("A photo of")]
    expected = {}
    for text in texts:
        ids = start + tokenizer.encode(f" {text}")
        ids += [0] * (24 - len(ids))  # one shape; what comes later does not matter
        logits = np.asarray(loaded.logits(loaded.params, loaded.make_batch([[image]], [ids])))[0].astype(np.float64)
        each = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        last = len(start) + len(tokenizer.encode(f" {text}"))
        expected[text] = sum(each[i - 1, ids[i]] for i in range(len(start), last))
    total = np.logaddexp.reduce(list(expected.values()))
    assert [result["text"] for result in found] == sorted(texts, key=lambda text: -expected[text])
    for result in found:
        assert abs(result["log_likelihood"] - expected[result["text"]]) < 1e-3
        assert abs(result["probability"] - np.exp(expected[result["text"]] - total)) < 1e-3


def test_a_chat_keeps_its_history(
    idefics: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"What is in {pictures}/red.png?", "/image nowhere.png", f"/image {pictures}/blue.png", "And this?",
             "/prompt", "/reset", "/prompt", "/huh", "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    main(["chat", "--model", f"idefics:{idefics}", "--preprocess", "clip", "--allow", "x", *NEW])
    first, error, second, prompt, *rest = capsys.readouterr().out.split("\n", 3)[:3] + ["", ""]
    assert error == "error: nowhere.png: can't be read (No such file or directory)"
