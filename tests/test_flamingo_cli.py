"""flamingo-jax on toy pictures and toy models: what it prints and writes, against the model applied directly."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flamingo_models
import jax
import numpy as np
import pytest
from conftest import ORACLES
from PIL import Image
from runs import write_run
from tokenizers import AddedToken, Tokenizer, decoders, models

from clip_jax import sharding
from clip_jax.data.preprocess import Preprocess
from clip_jax.errors import ConfigError
from clip_jax.interop.tensors import read_tensors
from configs.flamingo import quickstart
from flamingo_jax.chat import images_in
from flamingo_jax.cli import main
from flamingo_jax.data.conventions import Convention
from flamingo_jax.data.prompts import begin
from flamingo_jax.data.tokenizer import open_tokenizer
from flamingo_jax.loading import Loaded, load
from flamingo_jax.models.language_model import DecoderSpec
from flamingo_jax.speaker import Manner, Speaker, settled
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
    write_run(workdir, config, FlamingoTask(config, sharding.make_mesh()))
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


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def directly(loaded: Loaded, images: list[list[Path]], *texts: str) -> list[str]:
    """What the most likely tokens are after images with texts between them, by the model's logits alone."""
    tag, tokenizer, end = list(loaded.convention.image), loaded.tokenizer, loaded.convention.end_id
    ids = tokenizer.start_ids
    for i, text in enumerate(texts):
        ids = ids + tag + tokenizer.encode(text) + ([end] if i < len(texts) - 1 else [])
    rows = [list(ids) for _ in images]
    for _ in range(4):
        padded = [row + [0] * (64 - len(row)) for row in rows]  # one shape; what comes later does not matter
        logits = loaded.logits(loaded.params, loaded.make_batch(images, padded))
        for row, choice in zip(rows, np.asarray(logits).argmax(axis=-1), strict=True):
            row.append(end if row[len(ids) :].count(end) else int(choice[len(row) - 1]))
    said = [row[len(ids) :] for row in rows]
    return [tokenizer.decode(row[: [*row, end].index(end)]).strip() for row in said]


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
    one_device: None, ours: Path, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
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
    one_device: None, ours: Path, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, texts = pictures / "red.png", ["a dog", "the big cat", "a"]
    options = [option for text in texts for option in ("--text", text)]
    found = json.loads(run(capsys, "score", "--model", ours, image, "--prompt", "A photo of", "--json", *options))
    tokenizer = loaded.tokenizer
    start = [*tokenizer.start_ids, *loaded.convention.image, *tokenizer.encode("A photo of")]
    expected = {}
    for text in texts:
        ids = start + tokenizer.encode(f" {text}")
        batch = loaded.make_batch([[image]] * 4, [ids + [0] * (64 - len(ids))] * 4)  # the shape of captions
        logits = np.asarray(loaded.logits(loaded.params, batch))[0].astype(np.float64)
        each = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        last = len(start) + len(tokenizer.encode(f" {text}"))
        expected[text] = sum(each[i - 1, ids[i]] for i in range(len(start), last))
    total = np.logaddexp.reduce(list(expected.values()))
    assert [result["text"] for result in found] == sorted(texts, key=lambda text: -expected[text])
    for result in found:
        assert abs(result["log_likelihood"] - expected[result["text"]]) < 1e-3
        assert abs(result["probability"] - np.exp(expected[result["text"]] - total)) < 1e-3


def test_a_chat_keeps_its_history(
    one_device: None, idefics: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"What is in {pictures}/red.png?", "/image nowhere.png", f"/image {pictures}/blue.png", "And this?",
             "/prompt", "/reset", "/prompt", "/huh", "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    main(["chat", "--model", f"idefics:{idefics}", "--preprocess", "clip", *NEW])
    printed = capsys.readouterr().out
    fake, end = "<fake_token_around_image>", "<end_of_utterance>"
    image = f"User:{fake}<image>{fake}"
    head, tail = printed.split(f"{image}What is in?{end}\nAssistant:")
    one, two = re.fullmatch(
        rf" (.*){end}\n{re.escape(image)}And this\?{end}\nAssistant: (.*){end}\n\n\n/image PATH .*\n", tail, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    # What was said aloud, piece by piece, is what the history holds.
    assert head == f"{one}\nerror: nowhere.png: can't be read (No such file or directory)\n{two}\n"
    assert "never read" not in printed


def test_paths_are_found_in_a_line() -> None:
    assert images_in("what is in a/cat.jpg?") == ("what is in?", ["a/cat.jpg"])
    assert images_in("'my cat.png' and dog.webp: which is older?") == (
        "and: which is older?",
        ["my cat.png", "dog.webp"],
    )
    assert images_in('"a cat.jpg"') == ("", ["a cat.jpg"])
    assert images_in('no "picture" here, .png') == ('no "picture" here, .png', [])


def test_what_is_said_aloud_stays() -> None:
    stop = ("\nUser:",)
    assert settled("A cat.\nUs", stop) == settled("A cat.\n", stop) == settled("A cat.\nUser: no", stop) == "A cat."
    assert settled(" A c\N{REPLACEMENT CHARACTER}", stop) == "A c" and settled("A\nUFO", stop) == "A\nUFO"


def test_a_prompt_that_fits_is_not_rounded_up_beyond_the_models_positions() -> None:
    tokenizer = open_tokenizer("wordnet/tokenizer.json")
    spec = DecoderSpec(
        vocab_size=9, width=8, layers=1, heads=1, kv_heads=1, mlp_width=8, positions="learned", max_positions=50
    )
    speaker: Any = object.__new__(Speaker)
    speaker.loaded = SimpleNamespace(
        model=SimpleNamespace(language_model=SimpleNamespace(spec=spec)), preprocess=Preprocess(8), tokenizer=tokenizer
    )
    prompt = begin(Convention("flamingo", (5,), tokenizer.vocab_size, tokenizer.bos_id)).text("a " * 30)
    count = len(prompt.ids(tokenizer))
    assert 30 <= count < 40
    speaker.manner = Manner(max_new_tokens=10)
    assert speaker.shape([prompt], multiple=128).tokens == 40  # of 128
    assert speaker.shape([prompt], multiple=1).tokens == count
    speaker.manner = Manner(max_new_tokens=51 - count)
    with pytest.raises(ConfigError, match="51 tokens, the answer's included; the model has 50 positions"):
        speaker.shape([prompt])


def test_weights_come_in_and_go_out(idefics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, workdir, out = f"idefics:{idefics}", tmp_path / "run", tmp_path / "out"
    printed = run(capsys, "import", spec, workdir)
    tensors = read_tensors(idefics)
    assert f"{spec}: {len(tensors)} tensors used, 0 missing, 0 unused" in printed and "wrote" in printed
    about = json.loads(run(capsys, "info", workdir, "--json"))
    assert about["family"] == "idefics" and about["parameters"]["all"] == sum(x.size for x in tensors.values())
    assert "family          idefics\n" in run(capsys, "info", workdir)
    assert str(out / "model.safetensors") in run(capsys, "export", workdir, "idefics", out)
    again = read_tensors(out)
    assert again.keys() == tensors.keys() and all(np.array_equal(again[k], tensors[k]) for k in tensors)


def test_an_open_flamingo_is_named_by_its_three_parts(
    one_device: None, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, given = flamingo_models.arguments("of_opt", tmp_path)
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    images = [str(pictures / f"{colour}.png") for colour in COLOURS[:2]]
    main(["caption", "--model", spec, *options, *images, "--show-prompt", "--prompt", "w5 w7", "--json", *NEW])
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["<image>w5 w7"]
    model = load(spec, **given)
    ids = [*model.tokenizer.start_ids, model.convention.image[0], *model.tokenizer.encode("w5 w7")]
    tokens = model.generate(model.params, model.make_batch([[path] for path in images], [ids] * 2), max_new_tokens=4)
    expected = [model.tokenizer.decode(row).strip() for row in np.asarray(tokens).tolist()]
    assert json.loads(printed.out) == [
        {"image": path, "caption": text} for path, text in zip(images, expected, strict=True)
    ]
    with pytest.raises(SystemExit, match=r"error: 100\d\d tokens, the answer's included; the model has \d+ positions"):
        main(["caption", "--model", spec, *options, images[0], "--max-new-tokens", "9999"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["caption", "--model", "OURS", "nowhere"], "nowhere: not found; expected a folder, a glob, a .tar"),
        (["caption", "--model", "nowhere", "PICTURES"], "nowhere: no finished checkpoint there"),
        (["caption", "--model", "OURS", "PICTURES/broken.jpg"], "not one of 1 images could be read"),
        (["caption", "--model", "OURS", "PICTURES", "--shots", "PICTURES/shots.jsonl"],
         "shots.jsonl: line 1: expected an object of texts with image, text"),
        (["answer", "--model", "OURS", "PICTURES", "--question", "x", "--shots", "DIR/lost.jsonl"],
         "lost.jsonl: line 2: DIR/lost.png: not found; expected an image"),
        (["answer", "--model", "OURS", "PICTURES", "--question", "x", "--shots", "DIR/broken.jsonl"],
         "broken.jsonl: line 1: not JSON"),
        (["answer", "--model", "OURS", "PICTURES/red.png", "--question", "an <image>?"],
         "the text 'an <image>?' holds <image>, which only the prompt itself may write"),
        (["score", "--model", "OURS", "nowhere.png", "--text", "x"], "nowhere.png: not found; expected an image"),
        (["score", "--model", "OURS", "PICTURES/red.png", "--text", "x", "--text", " "], "--text: empty"),
        (["info", "OURS", "--vision", "hf:x"], "language_model, vision, norm_tokens, preprocess, allow and allow_nan"),
        (["import", "OURS", "DIR/new"], "expected one of idefics:PATH, open_flamingo:PATH"),
        (["export", "OURS", "idefics", "DIR"], "DIR: exists already; name a new one"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    one_device: None, arguments: list[str], expected: str, ours: Path, pictures: Path, tmp_path: Path
) -> None:
    good = json.dumps({"image": str(pictures / "red.png"), "question": "what?", "answer": "red"})
    (tmp_path / "lost.jsonl").write_text(f'{good}\n{{"image": "lost.png", "question": "a", "answer": "b"}}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    places = {"OURS": str(ours), "PICTURES": str(pictures), "DIR": str(tmp_path)}
    named = [re.sub("|".join(places), lambda m: places[m[0]], text) for text in [*arguments, expected]]
    with pytest.raises(SystemExit) as stop:
        main(named[:-1])
    assert str(stop.value).startswith("error: ") and named[-1] in str(stop.value), stop.value
    assert "\n" not in str(stop.value) and not (tmp_path / "new").exists()
