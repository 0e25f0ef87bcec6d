"""Prompts of every family, token for token what its own processor or tokenizer makes of the same (tests/peers)."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ORACLES
from PIL import Image
from test_video import RATE, write

from clip_jax.data.preprocess import Preprocess
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.chat import Chat
from flamingo_jax.data.conventions import Convention
from flamingo_jax.data.documents import Document, Media, Shape, encode
from flamingo_jax.data.prompts import CAPTION, Prompt, Shot, begin, encode_prompts, few_shot, question, see, shape_of
from flamingo_jax.data.tokenizer import TextTokenizer, open_tokenizer
from flamingo_jax.data.video import read_clip

CASES = ORACLES / "prompts"
EXPECTED = json.loads((CASES / "expected.json").read_text())
RED, BLUE = (Media(np.full((1, 8, 8, 3), value, np.uint8)) for value in (1, 2))
FAKE, TAG = "<fake_token_around_image>", "<image>"


def idefics(kind: str, instruct: bool) -> tuple[Convention, TextTokenizer]:
    ids = EXPECTED["idefics"][f"{kind} ids"]
    turn = ids["<end_of_utterance>"] if instruct else None
    convention = Convention(
        "idefics", (ids[TAG],), ids["</s>"], bos_id=ids["<s>"], around_id=ids[FAKE], turn_id=turn
    )  # fmt: skip
    return convention, open_tokenizer(CASES / f"idefics_{kind}.json", "<s>")


def open_flamingo(kind: str) -> tuple[Convention, TextTokenizer]:
    ids = EXPECTED["open_flamingo"][f"{kind} ids"]
    bos = "</s>" if kind == "opt" else None
    tokenizer = open_tokenizer(CASES / f"open_flamingo_{kind}.json", bos).with_tokens(ids, "<PAD>")
    assert {token: tokenizer.special_id(token) for token in ids} == ids
    bos_id = None if bos is None else tokenizer.bos_id
    return Convention("open_flamingo", (ids[TAG],), ids["<|endofchunk|>"], bos_id, ids["<PAD>"]), tokenizer


@pytest.fixture(scope="module")
def ours() -> tuple[Convention, TextTokenizer]:
    tokenizer = open_tokenizer("wordnet/tokenizer.json")
    return Convention("flamingo", tuple(tokenizer.encode(TAG)), tokenizer.vocab_size, tokenizer.bos_id), tokenizer


def prompts(convention: Convention, case: str) -> list[Prompt]:
    """What the peers' prompts say, by the builder."""
    new = begin(convention)
    return {
        "captions": [new.shot(RED, "a dog").shot(BLUE, "two kittens").ask(RED), new.ask(BLUE)],
        "questions": [new.shot(RED, "a dog", "What is this?").ask(BLUE, "And this?")],
        "chat": [new.user("Describe this image.", RED).reply("An image of two kittens.").user("And this?", BLUE)],
        "instruct": [
            new.user("What is in this image?", RED).reply("This picture depicts Idefix.").user("And what colour?")
        ],
        "neighbours": [new.user("Which one is older?", RED, BLUE)],
        "instruct captions": [new.shot(RED, "a dog").ask(BLUE)],
    }[case]


def check(convention: Convention, tokenizer: TextTokenizer, case: str, expected: dict[str, Any]) -> None:
    some = prompts(convention, case)
    tokens = len(expected["ids"][0])
    batch = encode_prompts(some, tokenizer, Shape(max(len(prompt.media) for prompt in some), 1, 8, tokens))
    mask = np.array(expected["mask"], bool)
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_array_equal(batch["text"][mask], np.array(expected["ids"])[mask])
    for i, prompt in enumerate(some):
        shown = [media.frames[0, 0, 0, 0] for media in prompt.media]
        assert batch["media"][i, :, 0, 0, 0, 0].tolist()[: len(shown)] == shown
        assert batch["frame_mask"][i].sum() == len(shown)
    if "images" in expected:
        np.testing.assert_array_equal(
            batch["media_mask"] & mask[..., None], np.array(expected["images"], bool) & mask[..., None]
        )


@pytest.mark.parametrize("kind", ["legacy", "first"])
@pytest.mark.parametrize("case", list(EXPECTED["idefics"]["legacy"]))
def test_idefics_prompts_are_its_processors(kind: str, case: str) -> None:
    """For a tokenizer that puts a blank before every piece of text, and for one that does before the first."""
    check(*idefics(kind, case.startswith("instruct")), case, EXPECTED["idefics"][kind][case])


@pytest.mark.parametrize("kind", ["neox", "opt"])
@pytest.mark.parametrize("case", ["captions", "questions"])
def test_open_flamingos_prompts_are_its_evaluations(kind: str, case: str) -> None:
    check(*open_flamingo(kind), case, EXPECTED["open_flamingo"][kind][case])


def test_our_own_prompts_are_what_is_trained_on(ours: tuple[Convention, TextTokenizer]) -> None:
    convention, tokenizer = ours
    shots = [Shot(RED, question("what?"), "a dog"), Shot(BLUE, question("where?"), "here")]
    document = Document([*few_shot(shots, Shot(RED, CAPTION, "")).parts])
    prompt = begin(convention).shot(RED, "a dog", "what?").shot(BLUE, "here", "where?").ask(RED)
    shape = shape_of([prompt], tokenizer, 8)
    got, expected = (
        encode_prompts([prompt], tokenizer, shape),
        encode(document, tokenizer, shape, convention.end_id, key="", left=True),
    )
    for key, value in got.items():
        theirs = expected["text_mask"] if key == "text" else np.array(True)
        np.testing.assert_array_equal(value[0] * theirs, expected[key])
    assert str(prompt) == (
        "<image>Question: what? Answer: a dog<EOC><image>Question: where? Answer: here<EOC><image>Output:"
    )


def test_a_prompt_shows_itself() -> None:
    convention, _ = idefics("legacy", instruct=True)
    chat = begin(convention).user("What is this?", RED).reply("A dog.").user("And?", RED, BLUE)
    assert str(chat) == (
        f"User:{FAKE}{TAG}{FAKE}What is this?<end_of_utterance>\nAssistant: A dog.<end_of_utterance>\n"
        f"User:{FAKE}{TAG}{FAKE}{TAG}{FAKE}And?<end_of_utterance>\nAssistant:"
    )
    convention, _ = open_flamingo("opt")
    assert str(begin(convention).shot(RED, "a dog").ask(BLUE, "What?")) == (
        "<image>Output:a dog<|endofchunk|><image>Question:What? Short answer:"
    )
    assert str(begin(convention, caption="A photo of").ask(RED)) == "<image>A photo of"
    assert str(begin(convention, question="{}?").ask(None, "{why} {}")) == "{why} {}?"
    assert (
        str(begin(convention).template("My pets: <image> and <image>!", [RED, BLUE])) == "My pets: <image> and <image>!"
    )


def test_what_is_wrong_is_said_before_anything_is_computed(
    ours: tuple[Convention, TextTokenizer], tmp_path: Path
) -> None:
    convention, tokenizer = ours
    new, other = begin(convention), begin(open_flamingo("opt")[0])
    with pytest.raises(ConfigError, match="1 images for 2 places <image> in the prompt '<image> or"):
        new.template("<image> or <image>", [RED])
    with pytest.raises(ConfigError, match="2 images for 1 places <image>"):
        new.template("<image>", [RED, BLUE])
    with pytest.raises(ConfigError, match="the text 'an <image>.' holds <image>, which only the prompt"):
        new.user("an <image>.")
    with pytest.raises(ConfigError, match=r"holds <\|endofchunk\|>"):
        other.shot(RED, "a dog<|endofchunk|>")
    with pytest.raises(ConfigError, match="a clip of 2 frames: open_flamingo sees single images"):
        other.ask(Media(np.zeros((2, 8, 8, 3), np.uint8)))
    with pytest.raises(ConfigError, match="the prompt 'What': one {} expected, where the question stands"):
        begin(convention, question="What")
    with pytest.raises(ConfigError, match="0 image tags among the tokens of a prompt with 1 images"):
        other.ask(RED).ids(open_tokenizer(CASES / "open_flamingo_opt.json", "</s>"))
    with pytest.raises(RecordError, match=r"prompt 0: \d+ tokens and 1 images; at most 4 and 1 expected"):
        encode_prompts([new.ask(RED)], tokenizer, Shape(1, 1, 8, 4))
    with pytest.raises(RecordError, match=r"prompt 0: frames \(1, 8, 8, 3\); at most \(1, 16, 16, 3\)"):
        encode_prompts([new.ask(RED)], tokenizer, Shape(1, 1, 16, 64))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, message in (("broken.png", "does not decode"), ("nowhere.png", "can't be read")):
        with pytest.raises(RecordError, match=f"{name}: .*{message}"):
            see(tmp_path / name, Preprocess(8))


def test_a_video_is_a_clip_of_its_first_seconds(ours: tuple[Convention, TextTokenizer], tmp_path: Path) -> None:
    convention, tokenizer = ours
    path = write(tmp_path / "clip.mp4", "mpeg4", 9 * RATE)
    clip = see(path, Preprocess(8))
    np.testing.assert_array_equal(clip.frames, read_clip(path, size=8))
    np.testing.assert_array_equal(see(path.read_bytes(), Preprocess(8), str(path)).frames, clip.frames)
    some = [begin(convention).ask(clip), begin(convention).ask(RED)]
    batch = encode_prompts(some, tokenizer, shape_of(some, tokenizer, 8))
    assert batch["frame_mask"].sum(axis=2).tolist() == [[8], [1]] and batch["media"].shape == (2, 1, 8, 8, 8, 3)
    (tmp_path / "corrupt.mp4").write_bytes(path.read_bytes()[:500])
    with pytest.raises(RecordError, match="corrupt.mp4: the video does not decode"):
        see(tmp_path / "corrupt.mp4", Preprocess(8))


class Tagging:
    """A speaker that writes a tag into its answer, as a model may to which that is plain text."""

    def __init__(self, convention: Convention):
        self.convention, self.loaded = convention, SimpleNamespace(preprocess=Preprocess(8))

    def begin(self) -> Prompt:
        return begin(self.convention)

    def shape(self, prompts: Any, multiple: int, images: int) -> None:
        pass

    def say_aloud(self, prompt: Prompt, shape: None, listen: Any) -> str:
        listen(said := "a dog <image>Output: a cat")
        return said


def test_a_chat_keeps_an_answer_up_to_a_tag_that_the_model_wrote(
    ours: tuple[Convention, TextTokenizer], tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    heard: list[str] = []
    chat = Chat(Tagging(ours[0]), heard.append)  # type: ignore[arg-type]
    chat.run([f"/image {tmp_path / 'a.png'}", "What is this?", "And now?"])
    assert not [text for text in heard if text.startswith("error")]
    turn = "Question: {} Answer: a dog<EOC>"
    assert str(chat.history) == "<image>" + turn.format("What is this?") + turn.format("And now?")
    instruct = begin(idefics("legacy", True)[0]).user("What?").said("a dog<end_of_utterance>\n<image>")
    assert str(instruct).endswith("Assistant: a dog<end_of_utterance>\n")
