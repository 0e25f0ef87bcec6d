"""What is damaged, lies or would run code, by every command: refused in one line that names it, nothing left behind."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ORACLES
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_cli import run, save_model
from test_preprocess import png
from test_tensors import Called, Global, archive, safetensors

from clip_jax.cli import main
from clip_jax.embedding import EmbeddingFile
from clip_jax.interop import published
from clip_jax.loading import load
from clip_jax.training import checkpoint

FIRST = "ln_final.bias"  # of the tensors, as they stand in the file
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model"), 0))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "good.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


@pytest.fixture(scope="module")
def embedded(model: str, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("embedded") / "all.safetensors"
    main(["embed", model, str(picture), str(output)])
    return output


def refusal(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def changed(value: float) -> Callable[[Path], None]:
    """The weights with one value changed."""

    def write(path: Path) -> None:
        tensors = load_file(path)
        tensors[FIRST] = tensors[FIRST].copy()
        tensors[FIRST][3] = value
        save_file(tensors, path)

    return write


def with_code(path: Path) -> None:
    trace = path.parent / "trace"
    archive(path.with_name("open_clip_pytorch_model.bin"), {"a": Called(Global("os", "system"), f"touch {trace}")}, {})
    path.unlink()


HEADER = '{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}'
BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), f"{WEIGHTS}: header: not readable as safetensors"),
    "lying": (lambda p: safetensors(p, HEADER, b"\0" * 4), f"{WEIGHTS}: header: not readable as safetensors"),
    "NaN": (changed(np.nan), f"{WEIGHTS}: {FIRST} holds values that are no numbers (NaN)"),
    "infinite": (changed(-np.inf), f"{FIRST} holds infinities"),
    "of another model": (lambda p: save_file({"encoder.weight": np.ones(3)}, p), "tensors missing (first: "),
    "with code": (with_code, "asks for os.system; only descriptions of tensors are read, no code is run"),
}


@pytest.mark.parametrize("command", ["embed", "classify", "search", "import"])
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights(case: str, command: str, picture: Path, embedded: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, "open_clip_config.json"):
        (tmp_path / name).write_bytes((ORACLES / "openai_clip_vit" / name).read_bytes())
    write, expected = BAD_WEIGHTS[case]
    write(tmp_path / WEIGHTS)
    before = sorted(tmp_path.iterdir())
    rest = {
        "embed": (picture, tmp_path / "out.safetensors"),
        "classify": (picture, "--labels", "cat,dog"),
        "search": (embedded, "--text", "x"),
        "import": (tmp_path / "out",),
    }
    message = refusal(command, f"open_clip:{tmp_path}", *rest[command])
    assert expected in message and str(tmp_path) in message
    assert sorted(tmp_path.iterdir()) == before  # no trace of the code either


def test_a_checkpoint_of_values_that_are_no_numbers(model: str, picture: Path, tmp_path: Path) -> None:
    loaded = load(model)
    variables = jax.tree.map(np.array, dict(loaded.params))
    variables["params"]["text"]["projection"][0, 0] = np.inf
    items = {f"params.{name}": {name: value} for name, value in variables.pop("params").items()}
    checkpoint.write(tmp_path / "bad", items | {"state": variables}, loaded.metadata)
    message = refusal("embed", tmp_path / "bad", picture, tmp_path / "out.safetensors")
    assert "bad: params/text/projection holds values that are no finite numbers" in message
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_an_import_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = published.Checkpointer.wait

    def full(checkpointer: published.Checkpointer) -> None:
        wait(checkpointer)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(published.Checkpointer, "wait", full)
    tokenizer = tmp_path / "vocab.txt"
    tokenizer.write_text("[PAD]\n[CLS]\n[SEP]\n[UNK]\n")
    with pytest.raises(OSError, match="No space left"):
        main(["import", f"open_clip:{ORACLES / 'openai_clip_vit'}", str(tmp_path / "x"), "--tokenizer", str(tokenizer)])
    assert list(tmp_path.iterdir()) == [tokenizer]


BAD_IMAGES = {
    "empty.png": (png(0, 5), "does not decode|is empty"),
    "wide.png": (png(100_000, 1, bytes(100_001)), "100000×1 pixels is too large"),
    "bomb.png": (png(9_500, 9_500), "9500×9500 pixels is too large"),
    "huge_bomb.png": (png(60_000, 60_000), "decompression bomb"),
    "text.jpg": (b"no picture", "does not decode"),
    "caf\udce9.png": (b"", "does not decode"),  # a name that is no UTF-8
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images(model: str, picture: Path, embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, output, page = tmp_path / "images", tmp_path / "out.safetensors", tmp_path / "found.html"
    directory.mkdir()
    for name, (data, _) in BAD_IMAGES.items():
        (directory / name).write_bytes(data)
    strange = directory / "good\udce9.png"
    strange.write_bytes(picture.read_bytes())

    assert "1 embeddings" in run(capsys, "embed", model, directory, output)
    lines = output.with_name(output.name + ".rejected.txt").read_text().splitlines()
    assert len(lines) == len(BAD_IMAGES)
    for line, name in zip(lines, sorted(BAD_IMAGES), strict=True):
        assert line.startswith(str(directory / name.replace("\udce9", "?"))), line
        assert any(reason in line for reason in BAD_IMAGES[name][1].split("|")), line
    assert EmbeddingFile(output).key(0) == str(strange)

    for arguments in (
        ("classify", model, directory, "--labels", "cat,dog", "-k", 1),
        ("search", model, output, "--image", directory, "--html", page),
        ("search", model, embedded, "--image", directory),
    ):
        main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert printed.err.count("left out: ") == len(BAD_IMAGES) and "huge_bomb.png" in printed.err
        assert printed.out.splitlines()[0].endswith("good?.png")
    assert "good?.png" in page.read_text()

    strange.unlink()
    for command, *rest in (("embed", tmp_path / "none.safetensors"), ("classify", "--labels", "cat")):
        assert re.search("not one (of 6 images|image) could be read", refusal(command, model, directory, *rest))
    assert not list(tmp_path.glob("none*"))


LONG = "one two three four five " * 20


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (" ", (), "text 0: empty"),
        ("x" * 1_000_001, (), "1,000,001 characters; at most 1,000,000 expected"),
        ("caf\udce9", (), "not valid UTF-8"),
        (LONG, ("--long-texts", "refuse"), "tokens; at most 14 fit in context_length 16"),
    ],
    ids=["empty", "huge", "not UTF-8", "long"],
)
def test_texts(
    text: str, options: tuple[str, ...], expected: str, model: str, picture: Path, embedded: Path, tmp_path: Path
) -> None:
    assert expected in refusal("search", model, embedded, "--text", text, *options)
    if text.strip():  # blank labels and lines are none
        assert expected in refusal("classify", model, picture, "--labels", f"{text}", *options)
        (tmp_path / "texts.txt").write_bytes(b"fine\n" * 5 + text.encode("utf-8", "surrogateescape"))
        message = refusal("embed", model, tmp_path / "texts.txt", tmp_path / "out.safetensors", "--texts",
                          "--rows-in-part", 3, *options)  # fmt: skip
        assert "texts.txt: not UTF-8 (byte 28)" in message if "\udce9" in text else expected in message
        assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_cut_texts_are_counted_and_averaged_ones_are_not_cut(
    model: str, picture: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("--long-texts", "average")):
        main(["search", model, str(embedded), "--text", LONG, "--text", "short", *options])
        assert ("1 texts were too long and cut; see --long-texts" in capsys.readouterr().err) == (not options)
    main(["classify", model, str(picture), "--labels", f"{LONG},short"])
    assert "1 texts were too long and cut" in capsys.readouterr().err


BAD_EMBEDDINGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no numbers": (lambda t: t["embeddings"].__setitem__((0, 2), np.nan), "embedding 0 (", ),
    "other width": (lambda t: t.update(embeddings=np.ones((1, 3), np.float32)), "embeddings of width 3; this model's"),
    "one dimension": (lambda t: t.update(embeddings=np.ones(1, np.float32)), "embeddings [1], keys [1], indices [1]"),
    "more keys": (lambda t: t.update(key_ends=np.zeros(7, np.int64)), "keys [7], indices [1]; expected [N, E]"),
    "ends beyond": (lambda t: t["key_ends"].__setitem__(0, 1 << 40), "the ends of its keys are none of its"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EMBEDDINGS)
def test_embeddings(case: str, model: str, embedded: Path, tmp_path: Path) -> None:
    change, expected = BAD_EMBEDDINGS[case]
    tensors = {name: value.copy() for name, value in load_file(embedded).items()}
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors", EmbeddingFile(embedded).metadata)
    message = refusal("search", model, tmp_path / "x.safetensors", "--text", "x", "--html", tmp_path / "x.html")
    assert f"{tmp_path}/x.safetensors: " in message and expected in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_embedding_files_that_are_cut_off_or_of_unknown_origin(model: str, embedded: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (embedded.read_bytes()[:-10], struct.pack("<Q", 1 << 60)):
        path.write_bytes(data)
        assert "x.safetensors: not a file of embeddings" in refusal("search", model, path, "--text", "x")
    save_file(load_file(embedded), path)
    assert "(its source is missing)" in refusal("search", model, path, "--text", "x")
