"""The peers' own modules, built on the spot with random weights: into ours, compared, out again, compared."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP, build_model_from_openai_state_dict, resize_pos_embed

from clip_jax.interop import huggingface, mapping, published
from clip_jax.interop import open_clip as ours
from clip_jax.interop.imported import Imported
from clip_jax.models.variants import VARIANTS, build_two_tower

pytestmark = [  # of torch.jit.trace
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

TEXT = dict(context_length=12, vocab_size=60, width=64, heads=4, layers=2)
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "gelu": dict(
        embed_dim=24,
        vision_cfg=dict(image_size=28, patch_size=7, width=48, head_width=16, layers=3, mlp_ratio=4.3637),
        text_cfg=TEXT,
    ),
    "quick_gelu, end id, sigmoid": dict(
        embed_dim=24,
        quick_gelu=True,
        init_logit_bias=-10,
        vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2, norm_kwargs={"eps": 1e-6}),
        text_cfg=TEXT | dict(pool_type="eos", eos_id=41, mlp_ratio=3.0),
    ),
    "last, not causal": dict(
        embed_dim=24,
        vision_cfg=dict(image_size=32, patch_size=8, width=64, layers=2),
        text_cfg=TEXT | dict(pool_type="last", no_causal_mask=True),
    ),
    "resnet": dict(
        embed_dim=24, vision_cfg=dict(image_size=96, layers=[1, 2, 1, 1], width=8, head_width=64), text_cfg=TEXT
    ),
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights at which nothing is degenerate; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name == "logit_scale":
                value.fill_(2.3)
            elif value.dtype == torch.float32 and torch.isfinite(value).all():
                noise = torch.randn(value.shape, generator=generator)
                scale = (value.shape[-1] if value.ndim > 1 else 25) ** -0.5
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise * scale + (value == 1))
    return model.eval()


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn((3, 3, size, size), generator=generator)
    text = torch.randint(1, 41, (4, 12), generator=generator)
    text[torch.arange(4), torch.tensor([11, 5, 7, 9])] = 41  # the end, and the highest
    return image, text


def assert_close(got: Any, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    difference, largest = np.abs(np.asarray(got) - expected.numpy()).max(), np.abs(expected.numpy()).max()
    assert difference <= tolerance * largest, f"{difference} of {largest}"


def embed(model: Imported, image: torch.Tensor, text: torch.Tensor) -> tuple[Any, Any]:
    with jax.default_matmul_precision("highest"):
        batch = {"image": image.permute(0, 2, 3, 1).numpy(), "text": text.int().numpy()}
        return jax.jit(build_two_tower(model.config).apply)(model.variables, batch)[:2]


@torch.no_grad()
def their_embeddings(model: Any, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name: str, tmp_path: Path) -> None:
    config = OPEN_CLIP[name]
    theirs: Any = randomise(CLIP(**config))
    image, text = inputs(config["vision_cfg"]["image_size"])
    expected = their_embeddings(theirs, image, text)
    # As a training checkpoint, of a distributed run.
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 1, "name": "x", "state_dict": state}, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ours.read_open_clip(tmp_path / "weights.pt", tmp_path / "config.json", preprocess="clip")
    for got, wanted in zip(embed(model, image, text), expected, strict=True):
        assert_close(got, wanted)

    ours.write_open_clip(tmp_path / "out", model.config, model.variables, model.preprocess)
    again, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for got, wanted in zip(their_embeddings(again.eval(), image, text), expected, strict=True):
        assert torch.equal(got, wanted)
    if "init_logit_bias" in config:
        assert torch.equal(again.logit_bias, theirs.logit_bias)
    assert list(preprocess.transforms[-1].mean) == model.preprocess["mean"]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openais_torchscript_archive_in_half_precision(kind: str, tmp_path: Path) -> None:
    vision: dict[str, Any] = (
        dict(image_size=32, patch_size=8, width=128, layers=2)
        if kind == "vit"
        else dict(image_size=64, layers=[1, 1, 2, 1], width=8, head_width=64)
    )
    config = dict(embed_dim=24, quick_gelu=True, vision_cfg=vision, text_cfg=TEXT | dict(width=128, heads=2))
    theirs: Any = randomise(CLIP(**config))
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(theirs).pop(name, None)
        theirs.register_buffer(name, torch.tensor(vision["image_size"]))
    image, text = inputs(vision["image_size"])
    traced = torch.jit.trace_module(
        theirs,
        {"forward": (image, text), "encode_image": (image,), "encode_text": (text,)},
        check_trace=False,
    )
    traced.half().save(str(tmp_path / "model.pt"))
    model = ours.read_openai(tmp_path / "model.pt")
    assert {"input_resolution", "attn_mask"} <= set(model.report.ignored)
    state = {key: value for key, value in traced.state_dict().items() if key != "attn_mask"}
    reference = build_model_from_openai_state_dict(state).float().eval()
    for got, wanted in zip(embed(model, image, text), their_embeddings(reference, image, text), strict=True):
        assert_close(got, wanted)


def test_position_embeddings_are_resized_as_open_clip_does() -> None:
    table = torch.randn((1 + 49, 16), generator=torch.Generator().manual_seed(0))
    for grid in (4, 10):
        state = {"visual.positional_embedding": table}
        config = dict(image_size=8 * grid, patch_size=8, width=16, layers=1, head_width=8)
        resize_pos_embed(state, CLIP(8, config, TEXT))
        got = mapping.resize_positions(table.numpy(), grid, 1)
        assert_close(got, state["visual.positional_embedding"], 2e-6)


def test_the_table_of_sizes_is_open_clips(tmp_path: Path) -> None:
    names = [name for name in VARIANTS if "ViT-" in name and "/" not in name and name.startswith("ViT")]
    assert len(names) == 13
    for name in names:
        top = ours.Fields(open_clip.get_model_config(name), name)
        read, mine = ours._our_config(top, None), VARIANTS[name]
        for tower in ("vision", "text"):
            sizes = {"mlp_width": 4 * mine[tower]["width"]} | mine[tower]
            assert {key: read[tower][key] for key in sizes if key != "end_id"} == {
                key: value for key, value in sizes.items() if key != "end_id"
            }, name
        assert (read["embed_dim"], read["activation"]) == (mine["embed_dim"], mine["activation"])


TOWER = dict(hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4)


def hugging_face_model(family: str) -> tuple[Any, Any, int]:
    """(model, image processor, image size)."""
    if family == "clip":
        config = transformers.CLIPConfig(
            text_config=TOWER | dict(vocab_size=60, max_position_embeddings=12, eos_token_id=41, hidden_act="gelu"),
            vision_config=TOWER | dict(image_size=28, patch_size=7, hidden_act="gelu"),
            projection_dim=24,
        )
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
        return randomise(transformers.CLIPModel(config)), processor, 28
    config = transformers.SiglipConfig(
        text_config=TOWER | dict(hidden_size=40, vocab_size=60, max_position_embeddings=12, projection_size=48),
        vision_config=TOWER | dict(image_size=30, patch_size=7),
    )
    processor = transformers.SiglipImageProcessor(size={"height": 30, "width": 30})
    return randomise(transformers.SiglipModel(config)), processor, 30


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_hugging_face(family: str, tmp_path: Path) -> None:
    theirs, processor, size = hugging_face_model(family)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "in")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 1
    image, text = inputs(size)
    with torch.no_grad():
        expected = theirs(input_ids=text, pixel_values=image)
    model = published.read(f"hf:{tmp_path / 'in'}")
    assert model.preprocess["resize_mode"] == ("squash" if family == "siglip" else "shorter side, centre crop")
    got_image, got_text = embed(model, image, text)
    assert_close(got_image, expected.image_embeds)
    assert_close(got_text, expected.text_embeds)

    huggingface.write_directory(tmp_path / "out", model.config, model.variables, model.preprocess)
    again = type(theirs).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=text, pixel_values=image).logits_per_image, expected.logits_per_image)
    read = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    pixels = [p(picture, return_tensors="pt")["pixel_values"] for p in (read, processor)]
    assert torch.equal(*pixels)
