"""The other side of `decode.py` for OpenFlamingo's design: open_flamingo 2.0.1 around transformers' LLaMA.

Not in the extra `peers`, as it pins versions of its own: `pip install --no-deps open_flamingo einops einops_exts`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarking.peers import IMAGES, NEW, SIZE, TOKENS, Said, Watch, import_peers

V, INTERVAL = 32000, 4
EOC, IMAGE, ADDED = V, V + 1, 3
CLIP: dict[str, Any] = dict(
    embed_dim=64,
    quick_gelu=True,
    vision_cfg=dict(image_size=SIZE, layers=12, width=384, patch_size=14, head_width=64),
    text_cfg=dict(context_length=8, vocab_size=64, width=64, heads=1, layers=1),
)
SIZES = {
    "small": dict(
        vocab_size=V, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8
    )
}  # fmt: skip


def inputs(batch: int) -> dict[str, np.ndarray]:
    """As OpenFlamingo takes them: every image's tag opens a fifth of the prompt."""
    rng = np.random.default_rng(0)
    text = rng.integers(3, V, (batch, TOKENS))
    text[:, :: TOKENS // IMAGES] = IMAGE
    pixels = rng.normal(size=(batch, IMAGES, 1, 3, SIZE, SIZE)).astype(np.float32)
    return {"vision_x": pixels, "lang_x": text, "attention_mask": np.ones_like(text)}


def _assemble(clip: Any, lm: Any) -> Any:
    from open_flamingo.src import flamingo, flamingo_lm, utils

    theirs = flamingo_lm.FlamingoLMMixin.forward

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
        return theirs(self, input_ids, attention_mask, **rest)  # transformers 5 leaves out a mask of ones

    flamingo_lm.FlamingoLMMixin.forward = forward
    clip.visual.output_tokens = True
    utils.extend_instance(lm, flamingo_lm.FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.layers")
    lm.resize_token_embeddings(V + ADDED, mean_resizing=False)
    width = CLIP["vision_cfg"]["width"]
    return flamingo.Flamingo(clip, lm, EOC, IMAGE, vis_dim=width, cross_attn_every_n_layers=INTERVAL).eval()


def save_weights(directory: Path, config: dict[str, Any]) -> Any:
    """Random ones, with gates half open. Returns the number of parameters when called."""
    torch, transformers = import_peers()
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    clip, lm = open_clip.CLIP(**CLIP), transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    (directory / "vision").mkdir()
    (directory / "vision" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    save_file(clip.state_dict(), directory / "vision" / "open_clip_model.safetensors")
    lm.save_pretrained(directory / "lm")
    model = _assemble(clip, lm)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)
    trained = ("perceiver.", "gated_cross_attn_layer.", "embed_tokens.", "lm_head.")
    kept = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if any(part in key for part in trained) and "gated_cross_attn_layers." not in key and "old_decoder" not in key
    }
    torch.save(kept, directory / "checkpoint.pt")
    text_tower = set(map(id, clip.parameters())) - set(map(id, clip.visual.parameters()))
    total = sum(p.numel() for p in model.parameters() if id(p) not in text_tower)
    return lambda: total


def peer_run(directory: Path, batches: tuple[int, ...]) -> Any:
    torch, transformers = import_peers()
    import open_clip
    from safetensors.torch import load_file

    clip = open_clip.CLIP(**CLIP)
    clip.load_state_dict(load_file(directory / "vision" / "open_clip_model.safetensors"))
    model = _assemble(clip, transformers.LlamaForCausalLM.from_pretrained(directory / "lm"))
    left = model.load_state_dict(torch.load(directory / "checkpoint.pt"), strict=False)
    assert not left.unexpected_keys
    prepared = {batch: {key: torch.tensor(x) for key, x in inputs(batch).items()} for batch in batches}

    def run(batch: int) -> Said:
        watch = Watch()
        with torch.inference_mode():
            said = model.generate(
                **prepared[batch], max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
                streamer=watch,
            )  # fmt: skip
        return watch.said(said[:, TOKENS:].numpy())

    return run


def read(directory: Path) -> Any:
    """The same weights as ours; the tower's tokens after `ln_post`, as a fresh install of open_flamingo has them."""
    from flamingo_jax.interop.open_flamingo import read_open_flamingo

    vision = f"open_clip:{directory / 'vision'}"
    return read_open_flamingo(
        directory / "checkpoint.pt", vision, directory / "lm", norm_tokens=True, preprocess="clip"
    )  # fmt: skip


def our_batch(batch: int) -> dict[str, np.ndarray]:
    given = inputs(batch)
    text = given["lang_x"].astype(np.int32)
    latest = np.cumsum(text == IMAGE, axis=1)
    return {
        "media": given["vision_x"].transpose(0, 1, 2, 4, 5, 3),
        "frame_mask": np.ones((batch, IMAGES, 1), bool),
        "text": text,
        "text_mask": np.ones(text.shape, bool),
        "media_mask": latest[..., None] == np.arange(1, IMAGES + 1),
    }
