"""clip-jax on toy pictures and a toy model: what it prints and writes, against the model applied directly."""

import functools
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import faiss
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.cli import main
from clip_jax.embedding import Embedder, EmbeddingFile
from clip_jax.loading import Loaded, load
from clip_jax.search import faiss_on_cpu, nearest
from clip_jax.training import checkpoint, state
from clip_jax.training.clip_task import ClipTask
from clip_jax.training.loop import run_metadata
from clip_jax.training.optimizer import make_optimizer
from configs.clip import quickstart

COLOURS = ["red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta", "gray", "orange", "navy"]
SHAPES = ((700, 32), (9, 32))  # of rows and of queries


def save_model(workdir: Path, seed: int) -> Path:
    """A checkpoint of the quickstart's debug model as it is born."""
    config, mesh = quickstart.get_config("debug"), sharding.make_mesh()
    task = ClipTask(config, mesh)
    create = state.create_fn(task, make_optimizer(config.optimizer, 1), ())
    with sharding.use_mesh(mesh):
        value = sharding.unbox(jax.jit(create)(jax.random.key(seed)))
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", 1)
    checkpointer.save(value, 1, run_metadata(config, task) | {"step": 1})
    checkpointer.wait()
    return workdir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model"), 0))


@pytest.fixture(scope="module")
def loaded(model: str) -> Loaded:
    return load(model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 images in two folders, one that is none, and a text."""
    directory = tmp_path_factory.mktemp("pictures")
    (directory / "more").mkdir()
    rng = np.random.default_rng(0)
    for i, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40 + 7 * i, 50), colour)
        image.paste(Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)), (3 * i, i))
        image.save(directory / ("more" if i % 3 == 0 else "") / f"{colour}.png")
    (directory / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (directory / "notes.txt").write_text("no picture")
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def good_paths(pictures: Path) -> list[Path]:
    return sorted(pictures.rglob("*.png"))


@functools.cache
def direct_encoder(loaded: Loaded) -> Callable[[str, np.ndarray], np.ndarray]:
    """One example at a time, on one device, without any of the command's machinery."""
    encode = jax.jit(lambda batch: next(x for x in loaded.model.apply(loaded.params, batch)[:2] if x is not None))
    return lambda kind, example: np.asarray(encode({kind: example[None]})[0])


def direct(loaded: Loaded, paths: list[Path]) -> np.ndarray:
    return np.stack([direct_encoder(loaded)("image", loaded.preprocess(path)) for path in paths])


def direct_text(loaded: Loaded, text: str) -> np.ndarray:
    return direct_encoder(loaded)("text", loaded.tokenizer(text, 16)[0])


@pytest.fixture(scope="module")
def embedded(model: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("embedded") / "all.safetensors"
    main(["embed", model, str(pictures), str(output), "--batch-size", "8", "--rows-in-part", "5"])
    return output


def test_embeddings_are_the_models_and_bad_images_are_listed(embedded: Path, loaded: Loaded, pictures: Path) -> None:
    file, paths = EmbeddingFile(embedded), good_paths(pictures)
    assert [file.key(i) for i in range(len(file))] == list(map(str, sorted(paths)))
    np.testing.assert_allclose(file.rows(0, len(file)), direct(loaded, paths), atol=2e-6)
    rejected = embedded.with_name(embedded.name + ".rejected.txt").read_text().splitlines()
    assert len(rejected) == 1 and rejected[0].startswith(f"{pictures}/broken.jpg: the image does not decode")
    assert file.metadata["rejected"] == "1" and file.metadata["source"] == str(pictures)
    assert sorted(p.name for p in embedded.parent.iterdir()) == [embedded.name, embedded.name + ".rejected.txt"]


@pytest.mark.parametrize("kind", ["glob", "tar", "parquet"])
def test_other_sources_and_formats_hold_the_same(
    kind: str, embedded: Path, model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = str(pictures), tmp_path / "out.safetensors"
    if kind == "glob":
        source = str(pictures / "**" / "*.png")
    elif kind == "tar":
        source = str(tmp_path / "shard.tar")
        with tarfile.open(source, "w") as tar:
            for path in good_paths(pictures):
                tar.add(path, path.name)
    else:
        output = tmp_path / "out.parquet"
    printed = run(capsys, "embed", model, source, output, "--batch-size", 8)
    a, b = EmbeddingFile(embedded), EmbeddingFile(output)
    assert f"wrote {output}: 11 embeddings" in printed and len(b) == 11
    assert [Path(b.key(i)).name for i in range(11)] == [Path(a.key(i)).name for i in range(11)]
    np.testing.assert_allclose(b.rows(0, 11), a.rows(0, 11), atol=2e-6)
    assert a.metadata["model_sha256"] == b.metadata["model_sha256"]


def test_a_data_source_is_embedded(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.safetensors"
    run(capsys, "embed", model, "emoji:unseen_concepts_held_out_style", output)
    assert len(EmbeddingFile(output)) > 200 and EmbeddingFile(output).key(0).startswith("fluent-emoji")


def test_a_stopped_run_goes_on_and_ends_with_the_same_file(
    embedded: Path, model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "all.safetensors"
    arguments = ["embed", model, str(pictures), str(output), "--batch-size", "8", "--rows-in-part", "5"]
    whole, allowed = Embedder.images, 2
    seen: list[list[int]] = []

    def counted(self: Embedder, images, indices, progress):
        if len(seen) == allowed:
            raise KeyboardInterrupt
        seen.append(list(indices))
        return whole(self, images, indices, progress)

    monkeypatch.setattr(Embedder, "images", counted)
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    assert not output.exists() and len(list(tmp_path.glob("*.parts/*.safetensors"))) == 2

    with pytest.raises(SystemExit, match=r"error: .*was begun with rows_in_part 5, not 6; remove .*\.parts"):
        main([*arguments[:-1], "6"])

    allowed = 3
    main(arguments)
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    got, expected = load_file(output), load_file(embedded)
    assert got.keys() == expected.keys() and all(np.array_equal(got[name], expected[name]) for name in got)
    assert EmbeddingFile(output).metadata == EmbeddingFile(embedded).metadata
    with pytest.raises(SystemExit, match="all.safetensors: exists; remove it or name another file"):
        main(arguments)


def test_search_finds_what_the_model_finds(
    embedded: Path, model: str, loaded: Loaded, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, paths = tmp_path / "found.html", good_paths(pictures)
    printed = run(
        capsys, "search", model, embedded, "--text", "a <red> apple", "--image", paths[3], "-k", 4, "--json",
        "--html", page,
    )  # fmt: skip
    by_text, by_image = json.loads(printed)
    scores = direct(loaded, paths) @ direct_text(loaded, "a <red> apple")
    best = np.argsort(-scores)[:4]
    assert by_text["keys"] == [str(paths[i]) for i in best]
    np.testing.assert_allclose(by_text["scores"], scores[best], atol=1e-4)
    assert by_image["keys"][0] == str(paths[3]) and abs(by_image["scores"][0] - 1) < 1e-4
    html = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", html) and html.count("data:image/webp;base64,") == 8
    assert "a &lt;red&gt; apple" in html


def test_texts_are_found_by_images(
    model: str, loaded: Loaded, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, long = ["a red apple", "smiling face", "the sea"], "one two three four five " * 20
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "", long]) + "\n")
    output, path = tmp_path / "texts.safetensors", good_paths(pictures)[0]
    main(["embed", model, str(tmp_path / "texts.txt"), str(output), "--texts"])
    printed = capsys.readouterr()
    assert "4 embeddings" in printed.out and "1 texts were too long and cut" in printed.err
    (found,) = json.loads(run(capsys, "search", model, output, "--image", path, "-k", "9", "--json"))
    scores = {text: float(direct(loaded, [path])[0] @ direct_text(loaded, text)) for text in [*texts, long]}
    assert found["keys"] == sorted(scores, key=lambda text: -scores[text])
    np.testing.assert_allclose(found["scores"], sorted(scores.values(), reverse=True), atol=1e-4)


def test_long_texts_are_averaged_over_their_windows(loaded: Loaded) -> None:
    text = "one two three four five " * 20
    (windows,) = loaded.tokenizer.windows(text, 16)
    mean = np.mean([direct_encoder(loaded)("text", window) for window in windows], axis=0, dtype=np.float64)
    (got,) = Embedder(loaded).texts([text], "average")
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=2e-6)
    assert len(windows) > 3


def test_classify_gives_the_softmax_at_the_models_temperature(
    model: str, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, path = ["apple", "dog", "house", "sea"], good_paths(pictures)[5]
    command = ("classify", model, path, "--labels", "apple, dog,house,sea", "--templates", "a photo of a {}.", "-k", 3)
    (result,) = json.loads(run(capsys, *command, "--json"))
    classes = np.stack([direct_text(loaded, f"a photo of a {label}.") for label in labels]).astype(np.float64)
    exponentials = np.exp((direct(loaded, [path])[0] @ classes.T) / 0.07)  # a newborn model's temperature
    expected = dict(zip(labels, exponentials / exponentials.sum(), strict=True))
    assert result["image"] == str(path)
    assert [entry["label"] for entry in result["labels"]] == sorted(labels, key=lambda x: -expected[x])[:3]
    for entry in result["labels"]:
        assert abs(entry["probability"] - expected[entry["label"]]) < 1e-4
    table = run(capsys, *command)
    assert table.splitlines()[0] == str(path) and result["labels"][0]["label"] in table.splitlines()[1]


def test_rerank_orders_images_by_a_text(
    model: str, loaded: Loaded, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(capsys, "rerank", model, pictures, "--text", "a red apple").splitlines()
    paths = good_paths(pictures)
    scores = direct(loaded, paths) @ direct_text(loaded, "a red apple")
    assert printed[0] == "a red apple"
    assert [line.split()[1] for line in printed[1:]] == [str(paths[i]) for i in np.argsort(-scores)]


@pytest.mark.parametrize("library", [None, faiss], ids=["jax", "faiss"])
def test_nearest_is_exact_and_ties_go_to_the_earlier_row(
    data_mesh: jax.sharding.Mesh, library: ModuleType | None
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, 4, (1000, 12)).astype(np.float32)  # whole numbers: exact sums, many ties
    queries = rng.integers(-3, 4, (7, 12)).astype(np.float32)
    chunks = [rows[i : i + 96] for i in range(0, 1000, 96)]
    for k in (1, 10, 300, 2000):
        scores, found = nearest(queries, chunks, k, data_mesh, 96, library)
        dense = queries.astype(np.float64) @ rows.T.astype(np.float64)
        expected = np.argsort(-dense, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(scores, np.take_along_axis(dense, expected, 1))


def test_faiss_finds_what_jax_finds() -> None:
    """Embeddings, so that few scores are equal and the library's own answer is taken; some rows stand there twice."""
    assert faiss_on_cpu() is faiss
    rng = np.random.default_rng(1)
    rows, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(rng.normal, (0, 0), (1, 1), SHAPES))
    rows[500:510] = rows[:10]
    queries[0] = rows[3]
    found = [nearest(queries, [rows[:400], rows[400:]], 20, sharding.make_mesh(), 400, x) for x in (None, faiss)]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[1][1][0, :2].tolist() == [3, 503]


def test_embeddings_of_another_model_are_refused(embedded: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", 1)
    with pytest.raises(SystemExit, match="error: .*all.safetensors: was made with another model"):
        main(["search", str(other), str(embedded), "--text", "x"])


def empty_tar() -> bytes:
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["embed", "MODEL", "nowhere", "x.safetensors"], "nowhere: not found; expected a folder, a glob, a .tar"),
        (["embed", "nowhere", "PICTURES", "x.safetensors"], "nowhere: no finished checkpoint there"),
        (["embed", "MODEL", "PICTURES", "x.npy"], "x.npy: expected a name that ends in .safetensors or .parquet"),
        (["embed", "MODEL", "DIR/empty.tar", "x.safetensors"], "empty.tar: no images there"),
        (["embed", "MODEL", "DIR/garbage.tar", "x.safetensors"], "garbage.tar: not a readable tar file"),
        (["embed", "MODEL", "DIR/*.nothing", "x.safetensors"], "nothing: no images there"),
        (["embed", "MODEL", "DIR/latin.txt", "x.safetensors", "--texts"], "latin.txt: not UTF-8 (byte 3)"),
        (["embed", "MODEL", "DIR/empty.txt", "x.safetensors", "--texts"], "empty.txt: empty; expected one text a line"),
        (["embed", "MODEL", "PICTURES/broken.jpg", "DIR/y.safetensors"], "broken.jpg: not one image could be read"),
        (["search", "MODEL", "nowhere.safetensors", "--text", "x"], "nowhere.safetensors: not found; expected a file"),
        (["search", "MODEL", "DIR/garbage.safetensors", "--text", "x"], "garbage.safetensors: not a file of embedd"),
        (["search", "MODEL", "DIR/garbage.parquet", "--text", "x"], "garbage.parquet: not a file of embeddings"),
        (["search", "MODEL", "DIR/other.safetensors", "--text", "x"], "other.safetensors: not a file of embeddings"),
        (["search", "MODEL", "EMBEDDED"], "nothing to search by: give --text TEXT or --image IMAGE"),
        (["search", "MODEL", "EMBEDDED", "--text", "a", "--html", "no/where.html"], "--html no/where.html: no such"),
        (["classify", "MODEL", "PICTURES", "--labels", ","], "--labels: at least one expected"),
        (["classify", "MODEL", "PICTURES", "--labels", "a", "--templates", "b"], "templates 'b': expected openai80"),
        (["classify", "MODEL", "PICTURES/broken.jpg", "--labels", "a"], "not one of 1 images could be read"),
        (["rerank", "MODEL", "PICTURES", "--text", "\udce9"], "text 0: not valid UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    arguments: list[str], expected: str, model: str, pictures: Path, embedded: Path, tmp_path: Path
) -> None:
    for name, content in {
        "empty.tar": empty_tar(), "garbage.tar": b"garbage", "latin.txt": b"caf\xe9", "empty.txt": b"\n",
        "garbage.safetensors": b"garbage", "garbage.parquet": b"garbage",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    save_file({"other": np.zeros(3)}, tmp_path / "other.safetensors")
    assert "other" in load_file(tmp_path / "other.safetensors")
    places = {"MODEL": model, "PICTURES": str(pictures), "EMBEDDED": str(embedded), "DIR": str(tmp_path)}
    named = [re.sub("|".join(places), lambda m: places[m[0]], argument) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        main(named)
    assert str(stop.value).startswith("error: ") and expected in str(stop.value), stop.value
    assert "\n" not in str(stop.value)
    assert not list(Path().glob("x.*"))


def test_bars_count_every_image_text_and_chunk(
    embedded: Path, model: str, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Shown(tqdm):
        def __init__(self, *arguments: Any, **settings: Any):
            assert settings["disable"] is None and not settings["leave"]
            super().__init__(*arguments, **(settings | {"disable": False, "delay": 0}))

        def close(self) -> None:
            seen.append((self.desc, self.n, self.total))
            super().close()

    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr("clip_jax.progress.tqdm", Shown)
    paths = [str(path) for path in good_paths(pictures)[:2]]
    long = "one two three four five " * 20

    def bars(*arguments: Any) -> set[tuple[Any, ...]]:
        seen.clear()
        json.loads(run(capsys, *arguments, "--json", "--batch-size", 8))  # stdout has nothing else
        return set(seen)

    windows = ("--templates", f"{{}} {long}", "--long-texts", "average")
    all_images = ("images", 12, 12)
    assert bars("classify", model, pictures, "--labels", "a,b,c", *windows) == {all_images, ("texts", 3, 3)}
    assert bars("rerank", model, pictures, "--text", "a") == {all_images}
    found = bars("search", model, embedded, "--image", paths[0], "--image", paths[1])
    assert found == {("images", 1, 1), ("search", 1, 1)}
