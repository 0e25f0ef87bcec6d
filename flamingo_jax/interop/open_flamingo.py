"""OpenFlamingo's checkpoints (github.com/mlfoundations/open_flamingo, arXiv 2308.01390).

A `checkpoint.pt` holds what was trained: the resampler, the gated blocks and the language model's embedding, with
rows for the added tokens: `<|endofchunk|>`, `<image>` and, where the tokenizer had no padding, `<PAD>`. The rest
comes from a CLIP and from a Hugging Face directory.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import CheckpointError
from clip_jax.interop import published
from clip_jax.interop.mapping import Report, Row, fill, norm
from clip_jax.interop.tensors import Tensors, read_tensors
from flamingo_jax.interop import huggingface
from flamingo_jax.interop.families import FAMILIES, Family
from flamingo_jax.models.variants import build_flamingo, language_model_fields

PyTree = Any
HEADS, HEAD_SIZE = 8, 64  # of the resampler and of the gated blocks
ADDED_TOKENS = {"opt": 2}  # its tokenizer has <pad>
GATED = ".gated_cross_attn_layer."


@dataclass(frozen=True)
class ImportedFlamingo:
    """`config` has `flamingo_jax.models.variants.get_variant`'s shape, `variables` are the model's, numpy arrays;
    `preprocess` has the fields of `clip_jax.data.preprocess.Preprocess`, or is None where no file says them;
    `report` says what became of each tensor of the checkpoint.
    """

    config: dict[str, Any]
    variables: PyTree
    preprocess: dict[str, Any] | None
    report: Report


def read_open_flamingo(
    checkpoint: str | Path,
    vision: str,
    language_model: str | Path,
    *,
    added_tokens: int | None = None,
    norm_tokens: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
) -> ImportedFlamingo:
    """A whole Flamingo from OpenFlamingo's checkpoint and the two models that it was trained around.

    Args:
      checkpoint: `checkpoint.pt`, bare or as the trainer writes it.
      vision: the CLIP, as `clip_jax.interop.published.read` takes it: "openai:FILE", "open_clip:DIR", …
      language_model: a Hugging Face directory.
      added_tokens: how many of the embedding's last rows are added tokens; 3, or 2 for OPT, where none is given.
      norm_tokens: whether the resampler looks at the tower's tokens after `ln_post`, as a fresh install of
        OpenFlamingo has it. The released checkpoints were trained on those before.
      preprocess: see `clip_jax.interop.huggingface.read_directory`.
      allow: see `clip_jax.interop.mapping.fill`.

    The output rows of added tokens, where the checkpoint holds none (LLaMA), are zero.

    Raises:
      CheckpointError: a file or tensor is missing, damaged, left over, or of another shape.
      ConfigError: sizes that do not fit each other.
    """
    label = str(checkpoint)
    tensors = {key.removeprefix("module."): value for key, value in read_tensors(checkpoint).items()}
    clip, lm = published.read(vision, preprocess=preprocess), huggingface.read(language_model)
    family = FAMILIES[lm.family]
    added = ADDED_TOKENS.get(lm.family, 3) if added_tokens is None else added_tokens
    report = Report()
    words = _vocabulary(lm, family, tensors, added, report, label)
    interval = _interval(tensors, lm.fields["layers"], label)
    latents = tensors.get("perceiver.latents", np.zeros((0, 0)))
    blocks = {match[1] for key in tensors if (match := re.match(r"perceiver\.layers\.(\d+)\.", key))}
    if latents.ndim != 2 or not len(latents):
        raise CheckpointError(f"{label}: no perceiver.latents of two dimensions; is it a checkpoint of OpenFlamingo?")

    config = dict(
        vision=clip.config["vision"] | ({"norm_tokens": norm_tokens} if clip.config["vision"]["kind"] == "vit" else {}),
        embed_dim=clip.config["embed_dim"],
        activation=clip.config["activation"],
        dtype="float32",
        language_model=language_model_fields(lm.fields) | {"vocab_size": len(words["embedding"])},
        interval=interval,
        first_block=interval - 1,
        heads=HEADS,
        head_size=HEAD_SIZE,
        class_token=False,
        extra_tokens=added,
        gated=dict(media_norm=False, activation="gelu"),
        resampler=dict(
            width=latents.shape[1],
            layers=len(blocks),
            heads=HEADS,
            head_size=HEAD_SIZE,
            latents=len(latents),
            frames=1,
            time_embedding=False,
            activation="gelu",
        ),
        remat=False,
    )  # fmt: skip

    def initial() -> PyTree:
        params = initial_params(config)
        return {name: params[name] for name in ("resampler", "gated")}

    rows = [*_RESAMPLER, *_gated_rows(f"lang_encoder.{_layers(family)}", interval)]
    trained, found = fill(rows, initial, tensors, label, allow=allow)
    found.used |= report.used
    params = dict(
        **trained,
        vision=clip.variables["params"]["vision"],
        extra_embedding=words.pop("extra_embedding"),
        extra_head=words.pop("extra_head"),
        language_model=lm.params | words,
    )  # fmt: skip
    variables = {"params": params}
    variables |= {key: {"vision": value["vision"]} for key, value in clip.variables.items() if key != "params"}
    return ImportedFlamingo(config, variables, clip.preprocess, found)


def initial_params(config: Mapping[str, Any]) -> PyTree:
    """The parameters of a Flamingo of `get_variant`'s shape, drawn from seed 0."""
    size, frames = config["vision"]["image_size"], config["resampler"]["frames"]
    batch = {
        "media": jnp.zeros((1, 1, frames, size, size, 3)),
        "frame_mask": jnp.ones((1, 1, frames), bool),
        "text": jnp.zeros((1, 2), jnp.int32),
        "text_mask": jnp.ones((1, 2), bool),
        "media_mask": jnp.ones((1, 2, 1), bool),
    }
    return build_flamingo(config).init(jax.random.key(0), batch)["params"]


def _layers(family: Family) -> str:
    """The name of the list of blocks: "transformer.blocks"."""
    return family.prefix + next(row.theirs for row in family.rows if "*" in row.theirs).split(".*")[0]


def _interval(tensors: Tensors, layers: int, label: str) -> int:
    """n, where gated blocks stand before blocks n-1, 2n-1, …"""
    found = sorted({int(key.split(GATED)[0].split(".")[-1]) for key in tensors if GATED in key})
    interval = found[0] + 1 if found else 0
    if not found or found != list(range(interval - 1, layers, interval)):
        raise CheckpointError(
            f"{label}: gated blocks before blocks {found} of {layers}; expected n-1, 2n-1, … for some n"
        )
    return interval


def _vocabulary(
    lm: huggingface.ImportedLanguageModel, family: Family, tensors: Tensors, added: int, report: Report, label: str
) -> dict[str, np.ndarray]:
    """The embedding and the output rows, the added tokens' apart. What is used of `tensors` is taken out."""
    names = {"embedding": f"lang_encoder.{family.embedding}", "head": f"lang_encoder.{family.head}"}
    if names["embedding"] not in tensors:
        raise CheckpointError(f"{label}: no {names['embedding']}; is it a checkpoint for a {lm.family}?")
    rows = {key: tensors.pop(name) for key, name in names.items() if name in tensors}
    width, embedding = lm.fields["width"], rows["embedding"]
    for key, value in rows.items():
        if value.shape != (len(embedding), width) or len(value) <= added:
            raise CheckpointError(f"{label}: {names[key]} has shape {list(value.shape)}; expected [V, {width}]")
        report.used[names[key]] = [f"params/language_model/{key}", f"params/extra_{key}"]
    V = len(embedding) - added
    out = {"embedding": embedding[:V], "extra_embedding": embedding[V:]}
    if lm.fields["tied"]:
        if not np.array_equal(rows.get("head", embedding), embedding):
            raise CheckpointError(f"{label}: {names['head']} differs from {names['embedding']}, to which it is tied")
        out["extra_head"] = embedding[V:]
    elif "head" in rows:
        out |= {"head": rows["head"][:V], "extra_head": rows["head"][V:]}
    else:
        if len(lm.params["head"]) < V:
            raise CheckpointError(f"{label}: {V} known tokens; the language model's head has {len(lm.params['head'])}")
        out |= {"head": lm.params["head"][:V], "extra_head": np.zeros((added, width), embedding.dtype)}
    positions = f"lang_encoder.{family.prefix}embed_positions.weight"
    if positions in tensors:  # OPT's, spared by a filter that looks for "embed"
        out["position_embedding"] = tensors.pop(positions)
        if out["position_embedding"].shape != lm.params["position_embedding"].shape:
            raise CheckpointError(f"{label}: {positions} has not the shape of the language model's")
        report.used[positions] = ["params/language_model/position_embedding"]
    return out


def _attention(ours: str, theirs: str, every: tuple[int, int] = (0, 1)) -> list[Row]:
    """Linear maps without biases; keys and values in one matrix."""
    split, joint = "d h k -> (h k) d", "d h k -> (n h k) d"
    return [
        Row(f"{ours}/query/kernel", f"{theirs}.to_q.weight", split, every=every),
        Row(f"{ours}/key/kernel", f"{theirs}.to_kv.weight", joint, (0, 2), every),
        Row(f"{ours}/value/kernel", f"{theirs}.to_kv.weight", joint, (1, 2), every),
        Row(f"{ours}/out/kernel", f"{theirs}.to_out.weight", "h k d -> d (h k)", every=every),
    ]


def _feed_forward(ours: str, theirs: str, every: tuple[int, int] = (0, 1)) -> list[Row]:
    return [
        *(row._replace(every=every) for row in norm(f"{ours}/mlp_norm", f"{theirs}.0")),
        Row(f"{ours}/mlp/up/kernel", f"{theirs}.1.weight", "d m -> m d", every=every),
        Row(f"{ours}/mlp/down/kernel", f"{theirs}.3.weight", "m d -> d m", every=every),
    ]


_RESAMPLER = (
    Row("resampler/latents", "perceiver.latents"),
    *norm("resampler/blocks/features_norm", "perceiver.layers.*.0.norm_media"),
    *norm("resampler/blocks/latents_norm", "perceiver.layers.*.0.norm_latents"),
    *_attention("resampler/blocks", "perceiver.layers.*.0"),
    *_feed_forward("resampler/blocks", "perceiver.layers.*.1"),
    *norm("resampler/final_norm", "perceiver.norm"),
)


def _gated_rows(layers: str, interval: int) -> list[Row]:
    theirs, every = f"{layers}.*{GATED}"[:-1], (interval - 1, interval)
    return [
        Row("gated/attention_gate", f"{theirs}.attn_gate", "-> 1", every=every),
        Row("gated/mlp_gate", f"{theirs}.ff_gate", "-> 1", every=every),
        *(row._replace(every=every) for row in norm("gated/text_norm", f"{theirs}.attn.norm")),
        *_attention("gated", f"{theirs}.attn", every),
        *_feed_forward("gated", f"{theirs}.ff", every),
    ]
