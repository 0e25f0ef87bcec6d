"""Flamingos by name: the peers' logits and tokens from what their users pass; in as checkpoints of ours, and out."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import ORACLES
from flamingo_models import IDEFICS, IDEFICS_TOKENS, OPEN_FLAMINGO, arguments, write_tokenizer
from PIL import Image
from safetensors.numpy import save_file
from test_flamingo_interop import assert_close
from test_flamingo_interop import load as oracle

import flamingo_jax
from clip_jax.errors import CheckpointError, ConfigError, DataError, UserError
from clip_jax.interop import huggingface
from clip_jax.interop import published as clip_published
from clip_jax.interop.tensors import read_tensors
from clip_jax.sharding import make_mesh, unbox
from clip_jax.training import checkpoint
from configs.flamingo import quickstart
from flamingo_jax import loading
from flamingo_jax.data.tokenizer import open_tokenizer
from flamingo_jax.interop import commands, published
from flamingo_jax.interop.imported import initial_variables
from flamingo_jax.loading import Loaded
from flamingo_jax.models.variants import get_variant
from flamingo_jax.training.flamingo_task import FlamingoTask


def load(case: str, directory: Path, **changed: Any) -> Loaded:
    spec, given = arguments(case, directory, **changed)
    return flamingo_jax.load(spec, **given)


@pytest.mark.parametrize(("case", "expected"), [("of_mpt", "logits"), ("of_neox", "logits_post_ln")])
def test_open_flamingos_inputs_give_its_logits(case: str, expected: str, tmp_path: Path) -> None:
    inputs, outputs, meta = oracle(case)
    model = load(case, tmp_path, norm_tokens=expected == "logits_post_ln")
    batch = model.make_batch(inputs["vision_x"], inputs["lang_x"], inputs["attention_mask"])
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.logits(model.params, batch))
    assert_close(logits, outputs[expected], batch["text_mask"], meta["tolerance"]["value"])
    config = meta["config"]
    assert model.convention.image == (config["media_token_id"],) and model.convention.end_id == config["eoc_token_id"]
    assert model.convention.pad_id == config["pad_token_id"] == model.tokenizer.special_id("<PAD>")
    assert model.tokenizer.encode("w3 <image> w4<|endofchunk|>", special=True) == [
        3, config["media_token_id"], 4, config["eoc_token_id"],
    ]  # fmt: skip
    report = str(model.report)
    assert "used     perceiver.latents → resampler/latents\n" in report
    assert "unused   vision: text_projection\n" in report  # of the CLIP only its tower is taken
    name = "transformer.wte" if case == "of_mpt" else "gpt_neox.embed_in"
    assert f"unused   language_model: {name}.weight\n" in report  # the checkpoint has its own
    assert model.report.summary() in report and not model.report.missing


def test_a_tokenizer_may_hold_the_added_tokens_already(tmp_path: Path) -> None:
    plain = load("of_opt", tmp_path)
    whole = write_tokenizer(tmp_path / "whole", plain.convention.end_id, ("<|endofchunk|>", "<image>"))
    assert load("of_opt", tmp_path, tokenizer=whole).convention == plain.convention


def test_a_tower_from_another_format(tmp_path: Path) -> None:
    clip = clip_published.read(f"open_clip:{ORACLES / 'of_opt' / 'vision'}", preprocess="clip")
    huggingface.write_directory(tmp_path / "clip", clip.config, clip.variables, clip.preprocess)
    model = load("of_opt", tmp_path, vision=f"hf:{tmp_path / 'clip'}", preprocess=None)
    assert same(model.params, load("of_opt", tmp_path).params)
    assert "used     vision: vision_model.post_layernorm.weight → params/vision/ln_post/scale\n" in str(model.report)


def test_idefics_inputs_give_its_logits_and_tokens(tmp_path: Path) -> None:
    inputs, outputs, meta = oracle("hf_idefics_vector")
    model = load("hf_idefics_vector", tmp_path)
    batch = model.make_batch(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
    theirs = inputs["image_attention_mask"].astype(bool)
    np.testing.assert_array_equal(batch["media_mask"][:2], theirs[:2])  # the third row sees all images so far
    batch["media_mask"] = theirs
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.logits(model.params, batch))
        tokens = model.generate(model.params, batch, max_new_tokens=8, stop_ids=())
    assert_close(logits, outputs["logits"], batch["text_mask"], meta["tolerance"]["value"])
    np.testing.assert_array_equal(tokens, outputs["generated"])
    assert model.tokenizer.start_ids == [1] and model.convention.end_id == 2
    assert model.preprocess.resize_mode == "squash"


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize("case", [*OPEN_FLAMINGO, *IDEFICS])
def test_in_as_a_checkpoint_and_out_again_the_same_bits(case: str, tmp_path: Path) -> None:
    spec, given = arguments(case, tmp_path / "tokenizer")
    path, _ = commands.import_model(spec, tmp_path / "run", **given)
    (tmp_path / "run").rename(tmp_path / "moved")
    first, again = flamingo_jax.load(spec, **given), flamingo_jax.load(tmp_path / "moved")
    assert path == tmp_path / "run" / "checkpoints" / "00000000"
    assert same(again.params, first.params) and again.model == first.model
    assert (again.convention, again.preprocess) == (first.convention, first.preprocess)
    assert again.tokenizer.digest() == first.tokenizer.digest() and again.tokenizer.bos == first.tokenizer.bos
    assert again.metadata["imported"] == first.report.summary()

    if case in IDEFICS:
        commands.export_model(tmp_path / "moved", "idefics", tmp_path / "out")
        original, written = read_tensors(ORACLES / case), read_tensors(tmp_path / "out")
        third = flamingo_jax.load(f"idefics:{tmp_path / 'out'}")  # it brings its tokenizer and preprocessing
        assert (third.convention, third.preprocess) == (first.convention, first.preprocess)
        assert same(third.params, first.params) and third.model == first.model
    else:
        commands.export_model(tmp_path / "moved", "open_flamingo", tmp_path / "out.safetensors")
        written = read_tensors(tmp_path / "out.safetensors")
        original = {k.removeprefix("module."): v for k, v in read_tensors(ORACLES / case / "checkpoint.pt").items()}
    assert written.keys() == original.keys() and same(written, original)


@pytest.fixture(scope="module")
def our_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir of the quickstart's Flamingo, as its task describes it."""
    config = quickstart.get_config("debug")
    task = FlamingoTask(config, make_mesh({"fsdp": 1}, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    shapes = unbox(jax.eval_shape(lambda: initial_variables(config.model)))
    variables = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    items = {f"params.{name}": {name: tree} for name, tree in variables.pop("params").items()} | {"state": variables}
    workdir = tmp_path_factory.mktemp("run")
    path = workdir / "checkpoints" / "00000004"
    path.parent.mkdir()
    checkpoint.write(path, items, {"model": task.metadata(), "config": config.to_dict(), "step": 4})
    return workdir


def test_our_own_run(our_run: Path, tmp_path: Path) -> None:
    """By its workdir, computing in bfloat16 when asked to; pictures by path, clips as frames, rows of any length."""
    model = flamingo_jax.load(our_run, dtype="bfloat16")
    assert model.model.dtype == jax.numpy.bfloat16 and model.params["params"]["gated"]["attention_gate"].dtype == "f4"
    assert model.convention.end_id == 4096 and model.tokenizer.start_ids == [1]
    size = model.preprocess.image_size
    picture, tag = tmp_path / "a.png", model.tokenizer.encode("<image>")
    Image.new("RGB", (40, 30), "red").save(picture)
    clip = np.zeros((2, 50, 20, 3), np.uint8)
    rows = [[1, *tag, 7, *tag, 8], [1, *tag]]
    batch = model.make_batch([[picture, clip], [Image.open(picture)]], rows)
    assert batch["media"].shape == (2, 2, 2, size, size, 3) and batch["media"].dtype == np.float32
    assert batch["frame_mask"].tolist() == [[[True, False], [True, True]], [[True, False], [False, False]]]
    np.testing.assert_array_equal(batch["media"][0, 0, 0], model.preprocess(picture))
    L = len(rows[0])
    assert batch["text_mask"].sum(axis=1).tolist() == [L, len(rows[1])] and batch["text_mask"][:, -1].all()
    seen = np.where(batch["media_mask"].any(-1), batch["media_mask"].argmax(-1) + 1, 0)
    assert seen.tolist() == [
        [0, *[1] * (len(tag) + 1), *[2] * (len(tag) + 1)],
        [*[0] * (L - len(tag)), *[1] * len(tag)],
    ]
    logits = jax.eval_shape(model.logits, model.params, batch)
    assert logits.shape == (2, L, 4097) and logits.dtype == np.float32
    blind = model.make_batch(None, [[1, 5]])
    assert blind["media"].shape == (1, 1, 1, size, size, 3) and not blind["media_mask"].any()
    assert commands.info(our_run)["source"] == "trained here"


def test_adapters_are_merged_and_frozen_parts_may_be_in_int8(our_run: Path, tmp_path: Path) -> None:
    """Of a run with low-rank adapters: the kernels are the sums, before they are held in int8."""
    plain = flamingo_jax.load(our_run)
    metadata = checkpoint.metadata(checkpoint.latest(our_run))
    kernel = plain.params["params"]["language_model"]["blocks"]["query"]["kernel"]  # [layers, D, H, K]
    rng = np.random.default_rng(0)
    a = rng.normal(size=(*kernel.shape[:2], 2)).astype(np.float32)
    b = rng.normal(size=(kernel.shape[0], 2, *kernel.shape[2:])).astype(np.float32)
    factors = {"language_model": {"blocks": {"query": {"kernel": {"a": a, "b": b}}}}}
    items = {f"params.{name}": {name: tree} for name, tree in {**plain.params["params"], "adapters": factors}.items()}
    items |= {"state": {key: value for key, value in plain.params.items() if key != "params"}}
    about = metadata["model"] | {"adapters": {"patterns": ["…"], "rank": 2, "alpha": 6.0}}
    path = tmp_path / "checkpoints" / "00000004"
    path.parent.mkdir()
    checkpoint.write(path, items, metadata | {"model": about})

    expected = kernel + 3 * np.einsum("ldr,lrhk->ldhk", a, b)
    merged = flamingo_jax.load(tmp_path).params["params"]
    assert "adapters" not in merged
    np.testing.assert_allclose(merged["language_model"]["blocks"]["query"]["kernel"], expected, rtol=1e-4, atol=1e-4)
    small = flamingo_jax.load(tmp_path, int8=True).params["params"]["language_model"]["blocks"]["query"]["kernel"]
    assert small.qvalue.dtype == np.int8
    np.testing.assert_allclose(small.qvalue * small.scale, expected, atol=float(np.abs(expected).max()) / 250)


def test_over_a_mesh_each_device_holds_its_part(our_run: Path, tmp_path: Path) -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    ours = flamingo_jax.load(our_run)
    for whole, spread in (
        (ours, flamingo_jax.load(our_run, mesh=mesh)),
        (load("hf_idefics_float", tmp_path), load("hf_idefics_float", tmp_path, mesh=mesh)),
    ):
        assert same(whole.params, spread.params)
        table = spread.params["params"]["language_model"]["embedding"]
        assert table.sharding.shard_shape(table.shape) == (table.shape[0] // 2, table.shape[1] // 4)


def refusal(run: Any) -> str:
    with pytest.raises(UserError) as error:
        run()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_does_not_fit_is_one_line_before_anything_is_computed(our_run: Path, tmp_path: Path) -> None:
    short = write_tokenizer(tmp_path / "short", 50)
    plain = write_tokenizer(tmp_path / "plain", 93)
    shifted = write_tokenizer(tmp_path / "shifted", 80, IDEFICS_TOKENS)
    long = write_tokenizer(tmp_path / "long", 91, IDEFICS_TOKENS)
    spec, given = arguments("of_opt", tmp_path / "of")
    eye = f"open_clip:{ORACLES / 'openai_clip_vit'}"
    none, other = tmp_path / "none", tmp_path / "other"
    checkpoint.write(other, {"params.text": {"text": {"x": np.zeros(1)}}}, {"model": {"family": "clip"}})
    none.mkdir()
    for run, message in [
        (lambda: flamingo_jax.load(spec, **given | {"language_model": None}), "pass language_model=hf:DIR; the"),
        (lambda: flamingo_jax.load(spec, **given | {"vision": None}), "pass vision=open_clip:FILE,CONFIG.json; the"),
        (lambda: flamingo_jax.load(spec, **given | {"language_model": "x"}), "language_model=x: expected hf:DIR"),
        (lambda: flamingo_jax.load(spec, **given | {"tokenizer": None}), "no tokenizer there (tokenizer.json, "),
        (lambda: flamingo_jax.load(spec, **given | {"tokenizer": short}), "97 rows; expected the tokenizer's 50 and 2"),
        (lambda: flamingo_jax.load(spec, **given | {"dtype": "float33"}), "dtype 'float33': expected float32"),
        (lambda: flamingo_jax.load(spec, **given | {"vision": eye}), "a tower of width 40; "),
        (lambda: flamingo_jax.load("open_flamingo:"), "open_flamingo:: a path after the colon expected"),
        (lambda: load("hf_idefics_float", tmp_path, tokenizer=plain), "no token <fake_token_around_image>"),
        (lambda: load("hf_idefics_float", tmp_path, tokenizer=shifted), "is 80; the model's trained tokens are 90 to"),
        (lambda: load("hf_idefics_float", tmp_path, tokenizer=long), "has 94 ids; the model has 90 + 3"),
        (lambda: load("hf_idefics_float", tmp_path, vision="openai:x"), "vision and norm_tokens are for open_flamingo"),
        (lambda: flamingo_jax.load(f"idefics:{none}"), "no tokenizer there"),
        (lambda: flamingo_jax.load(other), "a clip checkpoint; expected one of a Flamingo"),
        (lambda: flamingo_jax.load(none), "no finished checkpoint there"),
        (lambda: flamingo_jax.load(our_run, preprocess="clip"), "are for published weights only (idefics:PATH, open"),
        (lambda: flamingo_jax.load(our_run, tokenizer=short), "no token <|bos|> in the vocabulary; name one: token"),
        (lambda: commands.import_model(str(our_run), none / "x"), "expected one of idefics:PATH, open_flamingo:PATH"),
        (lambda: commands.import_model(spec, tmp_path / "of", **given), "not empty; name a new directory"),
        (lambda: commands.export_model(our_run, "onnx", none / "x"), "'onnx': expected one of idefics, open_flamingo"),
        (lambda: commands.export_model(our_run, "idefics", none / "x"), "a tower of kind resnet: IDEFICS has vit"),
        (
            lambda: commands.export_model(our_run, "open_flamingo", none / "x.safetensors"),
            "OpenFlamingo has no words for this model: its resampler.heads is 2, there it is 8",
        ),
        (lambda: commands.export_model(our_run, "open_flamingo", none / "x.bin"), "ends in .pt or .safetensors"),
    ]:
        assert message in refusal(run)
    assert not list(none.iterdir())


def test_a_pt_file_without_pytorch_says_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    spec, given = arguments("of_opt", tmp_path)
    model = published.read(spec, **given).model
    with pytest.raises(ConfigError, match=r"x\.pt: \.pt is PyTorch's own format and needs it; name a \.safetensors"):
        commands.write_open_flamingo(tmp_path / "x.pt", model.config, model.variables)


def test_an_import_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    spec, given = arguments("hf_idefics_float", tmp_path / "tokenizer")
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(OSError, match="no space left"):
        commands.import_model(spec, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_missing_and_unused_tensors_are_named_and_may_be_allowed(tmp_path: Path) -> None:
    for file in (ORACLES / "hf_idefics_float").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_tokenizer(tmp_path, 90, IDEFICS_TOKENS, pad_token="w0")
    tensors = read_tensors(ORACLES / "hf_idefics_float")
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds values that are no numbers \(NaN\); allow_nan"):
        flamingo_jax.load(f"idefics:{tmp_path}")
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(first: model\.norm\.weight\), 1 tensors unused"):
        flamingo_jax.load(f"idefics:{tmp_path}", allow_nan=True)
    model = flamingo_jax.load(f"idefics:{tmp_path}", allow=["model.norm", "model.extra"], allow_nan=True)
    assert model.report.missing == ["model.norm.weight"] and model.report.unused == ["model.extra"]
    assert "missing  model.norm.weight\nunused   model.extra\n" in str(model.report)
    assert (model.params["params"]["language_model"]["final_norm"]["scale"] == 1).all()


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load("hf_idefics_float", tmp_path_factory.mktemp("tokenizer"))


PICTURE = np.zeros((30, 20, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "ids", "mask", "message"),
    [
        ([[PICTURE]], [[1, 5]], None, "row 0: 0 image tags for 1 images"),
        ([[]], [[1, 91]], None, "row 0: 1 image tags for 0 images"),
        ([[], [PICTURE]], [[1, 5], [91, 91]], None, "row 1: 2 image tags; 1 images given"),
        ([[PICTURE]], [[1, 91], [1, 5]], None, "images of 1 rows for 2 rows of text"),
        (np.ones((1, 2, 28, 28, 3), np.float32), [[1, 91]], None, "row 0: 1 image tags for 2 images"),
        (np.ones((1, 2, 3, 14, 14), np.float32), [[1, 91]], None, r"images of shape \[1, 2, 3, 14, 14\]; \[B, T, 28"),
        (np.ones((1, 1, 28, 28, 3), np.int64), [[1, 91]], None, "images of type int64; uint8, or normalised floats"),
        ([[np.ones((28, 28, 3))]], [[1, 91]], None, r"row 0, image 0: float64 \[28, 28, 3\]; uint8"),
        ([[[]]], [[1, 91]], None, "row 0, image 0: a clip without frames"),
        ([["nowhere.png"]], [[1, 91]], None, r"nowhere\.png: can't be read"),
        (None, [[1, 93]], None, "row 0: the id 93; this model has 0 to 92"),
        (None, [[1.5, 2.5]], None, r"text_ids of shape \[1, 2\] and type float64; whole numbers"),
        (None, [[1, 5]], [[1]], r"text_mask of shape \[1, 1\] for text_ids of shape \[1, 2\]"),
        (None, [[1, 5], [3, 4]], [[1, 1], [0, 0]], "row 1: no tokens, only padding"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(idefics: Loaded, images: Any, ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        idefics.make_batch(images, ids, mask)


def test_generation_asks_for_what_it_can_do(idefics: Loaded) -> None:
    for mask, settings, message in [
        ([[1, 1]], dict(max_new_tokens=0), "max_new_tokens 0, num_beams 1: expected at least 1"),
        ([[1, 1]], dict(max_new_tokens=2, num_beams=0), "num_beams 0"),
        ([[1, 0]], dict(max_new_tokens=2), "prompt 0 ends in padding: expected padding on the left"),
    ]:
        with pytest.raises(ConfigError, match=message):
            idefics.generate(idefics.params, idefics.make_batch(None, [[1, 5]], mask), **settings)


def test_a_replica_of_another_shape_cannot_be_told_to_idefics(tmp_path: Path) -> None:
    """The first field that differs is named."""
    spec, given = arguments("hf_idefics_float", tmp_path)
    model = published.read(spec, **given)
    for changed, message in (
        (model.model.config | {"class_token": False}, "its class_token is False, there it is True"),
        (model.model.config | {"first_block": 1}, "its first_block is 1, there it is 0"),
        (model.model.config | {"vision": dict(get_variant("Flamingo-3B").vision)}, "a tower of kind nfnet"),
    ):
        with pytest.raises(ConfigError, match=message):
            commands.write_idefics(
                tmp_path / "out", changed, model.model.variables, model.model.preprocess, model.tokenizer,
                model.convention,
            )  # fmt: skip


def test_the_package_alone_loads_nothing() -> None:
    assert flamingo_jax.__all__ == ["load"]
    with pytest.raises(AttributeError, match="no attribute 'save'"):
        _ = flamingo_jax.save


def test_logits_are_compiled_anew_under_other_sharding_rules() -> None:
    under: list[Any] = []

    def apply(params: Any, batch: Any) -> Any:
        under.append(nn.get_logical_axis_rules())
        return params

    nothing: Any = None
    model: Any = SimpleNamespace(apply=apply)
    one = Loaded(model, nothing, nothing, nothing, nothing, {}, nothing)
    for rules in ((), (("batch", "data"),), ()):
        with nn.logical_axis_rules(rules):
            one.logits(1.0, {})  # type: ignore[arg-type]
    assert under == [(), (("batch", "data"),)]


def test_a_checkpoints_tokenizer_may_be_named_by_its_directory(tmp_path: Path) -> None:
    given = open_tokenizer("wordnet/tokenizer.json")
    given.save(tmp_path / "tokenizer.json")
    metadata = {
        "config": {"data": {"tokenizer": "nowhere.json"}}, "model": {"tokenizer": {"sha256": given.digest()}},
    }  # fmt: skip
    assert loading._tokenizer(Path("run"), metadata, tmp_path).digest() == given.digest()
    with pytest.raises(DataError, match="none/tokenizer.json: not found.*; name one: tokenizer=PATH"):
        (tmp_path / "none").mkdir()
        loading._tokenizer(Path("run"), metadata, tmp_path / "none")
