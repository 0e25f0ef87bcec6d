"""A model measured on folders and data sets, against scikit-learn, PyTorch's features and the model by itself."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ORACLES, ROOT
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from test_cli import save_model
from test_training import environment

from clip_jax import sharding
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.sources import ASSETS, Folder, Pair, PairSource, TfdsSource, open_source
from clip_jax.data.tokenizer import openai_tokenizer
from clip_jax.data.writing import write_tfds
from clip_jax.errors import ConfigError, DataError
from clip_jax.evaluation import benchmark, retrieval
from clip_jax.evaluation.encoder import feature_encoder
from clip_jax.interop import open_clip
from clip_jax.loading import Loaded, load
from clip_jax.models.variants import build_two_tower

COLOURS = {"cherry": "red", "grass": "lime", "sky": "blue", "snow": "white", "coal": "black", "lemon": "yellow"}
COUNTS = (7, 5, 6, 1, 4, 9)  # of each class, unequal on purpose
MESH = {"replica": 2, "fsdp": 2, "tensor": 2}


def picture(colour: str, seed: int) -> Image.Image:
    image = Image.new("RGB", (40 + seed, 50), colour)
    image.paste(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (25, 20, 3), np.uint8)), (3, seed))
    return image


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`classes/NAME/*.png`, one broken; `captions/*.png` with 1 to 3 captions, three bad; `named/*.png` with one."""
    root = tmp_path_factory.mktemp("folders")
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / "classes" / name / "deeper").mkdir(parents=True)
        for i in range(COUNTS[number]):
            seed = 20 * number + i
            picture(colour, seed).save(root / "classes" / name / ("deeper" if i % 2 else "") / f"{i}.png")
    (root / "classes" / "sky" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (root / "captions").mkdir()
    for i in range(13):
        picture(list(COLOURS.values())[i % 6], i).save(root / "captions" / f"{i:02d}.png")
        lines = [f"caption {j} of picture {i}" for j in range(1 + i % 3)]
        (root / "captions" / f"{i:02d}.txt").write_text("\n\n".join(lines) + "\n")
    (root / "captions" / "03.png").write_bytes(b"no picture")
    (root / "captions" / "04.txt").write_bytes(b"caf\xe9")
    (root / "captions" / "05.txt").unlink()
    (root / "named").mkdir()
    for i, name in enumerate([*COLOURS] * 2):
        picture(COLOURS[name], 50 + i).save(root / "named" / f"{i}.png")
        (root / "named" / f"{i}.txt").write_text(name)
    return root


@pytest.fixture(scope="module")
def by_itself(workdir: Path) -> tuple[Any, Any]:
    """The model on one device, one example at a time, without the machinery of the evaluation."""
    loaded = load(workdir)

    def image(path: Path) -> np.ndarray:
        pixels = jnp.asarray(loaded.preprocess(path)[None])
        return np.asarray(loaded.encode_image(loaded.params, pixels))[0].astype(np.float64)

    def text(string: str) -> np.ndarray:
        ids = jnp.asarray(loaded.tokenizer([string]))
        return np.asarray(loaded.encode_text(loaded.params, ids))[0].astype(np.float64)

    return image, text


def measure(workdir: Path, source: PairSource, *tasks: str, **options: Any) -> dict[str, Any]:
    mesh = sharding.make_mesh(MESH)
    with sharding.use_mesh(mesh):
        return benchmark.evaluate(load(workdir, mesh=mesh), mesh, source, tasks, batch_size=8, threads=1, **options)


def test_zero_shot_is_scikit_learns_on_the_models_own_embeddings(
    workdir: Path, folders: Path, by_itself: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    image, text = by_itself
    templates = ("a photo of a {}.", "the {}")
    results = measure(workdir, Folder(folders / "classes"), templates=templates)
    names = sorted(COLOURS)
    paths = sorted((folders / "classes").rglob("*.png"))
    labels = [names.index(p.relative_to(folders / "classes").parts[0]) for p in paths]
    classes = np.stack([sum(text(t.format(name)) for t in templates) for name in names])
    scores = np.stack([image(p) for p in paths]) @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    got, best = results["zero_shot"], scores.argmax(axis=1)
    assert (results["images"], results["rejected"], got["classes"], got["templates"]) == (32, 1, 6, 2)
    assert "broken.jpg: the image does not decode" in caplog.text
    for k in (1, 5):
        assert got[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(6)))
    assert got["mean_per_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, best))
    assert got["mean_per_class_accuracy"] != pytest.approx(got["top1"])
    assert {entry["name"]: entry["images"] for entry in got["per_class"]} == dict(zip(COLOURS, COUNTS, strict=True))
    mean = np.average([e["top1"] for e in got["per_class"]], weights=[e["images"] for e in got["per_class"]])
    assert mean == pytest.approx(got["top1"])
    assert "| zero_shot | top1 |" in benchmark.table(results) and "| 16.67% |" in benchmark.table(results)

    renamed = measure(workdir, Folder(folders / "classes"), class_names=[f"very {name}" for name in names])
    assert [e["name"] for e in renamed["zero_shot"]["per_class"]] == [f"very {name}" for name in names]


def test_retrieval_of_several_captions_is_that_of_brute_force(
    workdir: Path, folders: Path, by_itself: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    image, text = by_itself
    results = measure(workdir, Folder(folders / "captions"))
    kept = [i for i in range(13) if i not in (3, 4, 5)]
    owners = [i for i in kept for _ in range(1 + i % 3)]
    texts = [f"caption {j} of picture {i}" for i in kept for j in range(1 + i % 3)]
    images = np.stack([image(folders / "captions" / f"{i:02d}.png") for i in kept])
    scores = images @ np.stack([text(t) for t in texts]).T
    to_text = [1 + [owners[m] for m in np.argsort(-row)].index(i) for i, row in zip(kept, scores, strict=True)]
    to_image = [1 + [kept[n] for n in np.argsort(-row)].index(i) for i, row in zip(owners, scores.T, strict=True)]
    got = results["retrieval"]
    assert (results["images"], results["rejected"], got["captions"]) == (10, 3, len(texts))
    for way, ranks in (("", to_image), ("image_to_text_", to_text)):
        for k in (1, 5, 10):
            assert got[f"{way}recall_at_{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
        assert got[f"{way}mean_rank"] == pytest.approx(np.mean(ranks))
        assert got[f"{way}median_rank"] == np.floor(np.median(ranks))
    for reason in ("03.png: the image does not", "04.txt: not UTF-8 (byte 3)", "05.txt: can't be read (No such file"):
        assert reason in caplog.text


def test_what_chance_finds() -> None:
    """Against all orders of 5 candidates of which 2 are relevant, and 1."""
    import itertools

    orders = list(itertools.permutations(range(5)))
    for k in (1, 2, 3, 5):
        two = np.mean([min(order.index(0), order.index(1)) < k for order in orders])
        one = np.mean([order.index(0) < k for order in orders])
        assert retrieval.chance_of_recall(np.array([2, 1]), 5, k) == pytest.approx((one + two) / 2)
    assert retrieval.chance_of_recall(np.array([1, 1]), 2, 10) == 1.0


@pytest.mark.parametrize("case", ["openai_clip_vit", "openai_clip_rn"])
def test_a_probe_looks_at_pytorchs_features(case: str) -> None:
    """Of a ViT before the projection, of a ResNet after its attention pool: either gives PyTorch's features."""
    inputs, expected = (np.load(ORACLES / case / f"{part}.npz") for part in ("inputs", "expected"))
    model = open_clip.read_open_clip(ORACLES / case, preprocess="clip")
    vit = case.endswith("vit")
    as_they_are = Preprocess(model.config["vision"]["image_size"], mean=(0.0,) * 3, std=(1 / 255,) * 3)
    loaded = Loaded(build_two_tower(model.config), model.variables, as_they_are, openai_tokenizer(), {})
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        pixels = inputs["image"].transpose(0, 2, 3, 1)
        got = np.asarray(feature_encoder(loaded, mesh, 4, 1).function(loaded.params, {}, {"image": pixels}))
    if vit:
        assert got.shape == (4, 40)
        got = got @ model.variables["params"]["vision"]["projection"]
    assert np.abs(got - expected["image_features"]).max() <= 1e-5 * np.abs(expected["image_features"]).max()


def test_a_linear_probe_tells_colours_apart(workdir: Path, folders: Path, tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for i in range(6):
            picture(colour, 200 + i).save(tmp_path / name / f"{i}.png")
    source, train = Folder(folders / "classes"), Folder(tmp_path)
    results = measure(workdir, source, "linear_probe", train=train)
    got = results["linear_probe"]
    assert (got["classes"], got["train_images"], got["test_images"]) == (6, 36, 32)
    assert got["accuracy"] > 0.8 and got["mean_per_class_accuracy"] > 0.8  # a newborn model's features hold colours
    assert {e["inverse_regularisation"] for e in got["sweep"]} >= {1e-6, 1.0, 1e6}
    assert "zero_shot" not in results and "| linear_probe | accuracy |" in benchmark.table(results)


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels = np.array([0] * 10 + [1] * 4 + [2])
    held = benchmark.held_out(labels)
    assert [held[labels == c].sum() for c in range(3)] == [2, 1, 0]
    assert np.array_equal(held, benchmark.held_out(labels))


def test_what_a_task_lacks_is_said_in_one_line(workdir: Path, folders: Path) -> None:
    nameless = [Pair("a", (folders / "classes" / "coal" / "0.png").read_bytes(), " ")]
    classes, captions = Folder(folders / "classes"), Folder(folders / "captions")
    cases: list[tuple[PairSource, tuple[str, ...], dict[str, Any], type[Exception], str]] = [
        (classes, ("classify",), {}, ConfigError, "task 'classify': expected one of zero_shot, retrieval, linear"),
        (classes, ("linear_probe",), {}, ConfigError, "a linear probe needs training data"),
        (classes, ("zero_shot",), {"train": classes}, ConfigError, "a linear probe needs training data"),
        (classes, ("retrieval",), {}, DataError, "retrieval needs captions"),
        (classes, (), {"class_names": ["a"]}, ConfigError, "1 class names; the source has 6 classes"),
        (captions, ("zero_shot",), {}, DataError, "classes expected, one for an image; there are several captions"),
        (nameless, (), {}, DataError, "not one of 1 records has both an image and a text"),
    ]  # fmt: skip
    for source, tasks, options, error, message in cases:
        with pytest.raises(error, match=message):
            measure(workdir, source, *tasks, **options)


def test_folders_that_are_none(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="no images there"):
        Folder(tmp_path)
    picture("red", 0).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"loose.png: expected in the folder of its class, or with captions beside"):
        Folder(tmp_path)


def test_tfds_by_name_with_class_labels_and_several_captions(tmp_path: Path) -> None:
    data = (ASSETS / "openai" / "NOTICE").read_bytes()  # no image is decoded here
    animals = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog", "cow"])}
    records = [{"image": data, "label": 1}, {"image": data, "label": 0}]
    write_tfds({"test": records}, tmp_path / "animals" / "1.0.0", "animals", animals, "")
    several = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
    captions = [{"id": i, "text": text} for i, text in enumerate(("one", "two"))]
    coco = {"image": tfds.features.Image(), "captions": several}
    write_tfds({"val": [{"image": data, "captions": captions}]}, tmp_path / "several" / "1.0.0", "several", coco, "")

    source = open_source("tfds:animals/test", tmp_path)
    assert isinstance(source, TfdsSource) and source.classes == ["cat", "dog", "cow"]
    assert [source[i].text for i in range(2)] == ["dog", "cat"]
    assert open_source("tfds:several/val", tmp_path)[0].captions == ("one", "two")
    for spec, message in [
        ("tfds:nothing/test", "tfds:nothing/test: Could not find"),
        ("tfds:animals/train", "no split 'train'; expected one of test"),
        ("tfds:animals", "expected tfds:DIRECTORY#SPLIT or tfds:NAME/SPLIT"),
    ]:
        with pytest.raises(DataError, match=message) as refused:
            open_source(spec, tmp_path)
        assert "\n" not in str(refused.value)


def evaluate(workdir: Path, folders: Path, output: Path, processes: int) -> dict[str, Any]:
    """What `python -m launch.evaluate` writes, of all three tasks together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hosts = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.evaluate", "--model", str(workdir), "--data", str(folders / "named"),
             "--tasks", "zero_shot,retrieval,linear_probe", "--train-data", f"folder:{folders}/classes",
             "--templates", "openai7", "--batch-size", "8", "--output", str(output)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(8 // processes) | (hosts | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
        )
        for i in range(processes)
    ]  # fmt: skip
    printed = []
    for process in running:
        out, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-2000:]
        printed.append([line for line in out.splitlines() if line.startswith("|")])  # Gloo prints, too
    assert printed[0][0] == "| task | figure | value | chance |" and not any(printed[1:])
    assert (output / "results.md").read_text().splitlines() == printed[0]
    assert sorted(file.name for file in output.iterdir()) == ["results.json", "results.md"]
    return json.loads((output / "results.json").read_text())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(workdir: Path, folders: Path, tmp_path: Path) -> None:
    one, two = (evaluate(workdir, folders, tmp_path / str(n), n) for n in (1, 2))
    assert one == two and one["images"] == one["retrieval"]["captions"] == 12 and one["zero_shot"]["classes"] == 6
    assert one["linear_probe"]["train_images"] == 32
