"""OpenFlamingo's checkpoints (github.com/mlfoundations/open_flamingo, arXiv 2308.01390).

A `checkpoint.pt` holds what was trained: the resampler, the gated blocks and the language model's embedding, with
rows for the added tokens: `<|endofchunk|>`, `<image>` and, where the tokenizer had no padding, `<PAD>`. The rest
comes from a CLIP and from a Hugging Face directory.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.files import replacing
from clip_jax.interop import published
from clip_jax.interop.imported import require
from clip_jax.interop.mapping import Report, Row, fill, norm, to_theirs
from clip_jax.interop.tensors import Tensors, read_tensors
from flamingo_jax.interop import huggingface
from flamingo_jax.interop.families import FAMILIES, Family
from flamingo_jax.interop.imported import ImportedFlamingo, PyTree, initial_params, require_same
from flamingo_jax.models.variants import language_model_fields

HEADS, HEAD_SIZE = 8, 64  # of the resampler and of the gated blocks
ADDED_TOKENS = {"opt": 2}  # its tokenizer has <pad>
GATED = ".gated_cross_attn_layer."


def read_open_flamingo(
    checkpoint: str | Path,
    vision: str,
    language_model: str | Path,
    *,
    known_tokens: int | None = None,
    norm_tokens: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
) -> ImportedFlamingo:
    """A whole Flamingo from OpenFlamingo's checkpoint and the two models that it was trained around.

    Args:
      checkpoint: `checkpoint.pt`, bare or as the trainer writes it.
      vision: the CLIP, as `clip_jax.interop.published.read` takes it: "openai:FILE", "open_clip:DIR", …
      language_model: a Hugging Face directory.
      known_tokens: how many ids its tokenizer has; the embedding's rows after them are the 2 or 3 added tokens'.
        Where none is given, 3 are taken for added, of OPT 2.
      norm_tokens: whether the resampler looks at the tower's tokens after `ln_post`, as a fresh install of
        OpenFlamingo has it. The released checkpoints were trained on those before.
      preprocess: see `clip_jax.interop.huggingface.read_directory`.
      allow, allow_nan: see `clip_jax.interop.mapping.fill` and `clip_jax.interop.tensors.read_tensors`.

    The output rows of added tokens, where the checkpoint holds none (LLaMA), are zero.

    Raises:
      CheckpointError: a file or tensor is missing, damaged, left over, or of another shape.
      ConfigError: sizes that do not fit each other.
    """
    label = str(checkpoint)
    tensors = {
        key.removeprefix("module."): value for key, value in read_tensors(checkpoint, allow_nan=allow_nan).items()
    }
    clip = published.read(vision, preprocess=preprocess, allow=allow)
    if "vision" not in clip.towers:
        raise ConfigError(f"{vision}: a text tower by itself; expected a CLIP or a vision tower")
    lm = huggingface.read(language_model, allow=allow, allow_nan=allow_nan)
    family = FAMILIES[lm.family]
    report = Report()
    words = _vocabulary(lm, family, tensors, known_tokens, report, label)
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
        remat=False,
        **_trained(interval, len(words["extra_embedding"]), latents.shape[1], len(blocks), len(latents)),
    )

    def initial() -> PyTree:
        params = initial_params(config)
        return {name: params[name] for name in ("resampler", "gated")}

    rows = [*_RESAMPLER, *_gated_rows(f"lang_encoder.{_layers(family)}", interval)]
    trained, found = fill(rows, initial, tensors, label, allow=allow)
    found.used |= report.used
    parts = {
        "language_model": _without(lm.report, words.keys()),
        "vision": _without(clip.report, {"params/text", "params/logit_scale", "params/logit_bias"}),
    }
    params = dict(
        **trained,
        vision=clip.variables["params"]["vision"],
        extra_embedding=words.pop("extra_embedding"),
        extra_head=words.pop("extra_head"),
        language_model=lm.params | words,
    )
    variables = {"params": params}
    variables |= {key: {"vision": value["vision"]} for key, value in clip.variables.items() if key != "params"}
    return ImportedFlamingo(config, variables, clip.preprocess, found, "open_flamingo", parts)


def _trained(interval: int, added: int, width: int, layers: int, latents: int) -> dict[str, Any]:
    """The fields of what OpenFlamingo trains; `width`, `layers` and `latents` are the resampler's."""
    return dict(
        interval=interval,
        first_block=interval - 1,
        heads=HEADS,
        head_size=HEAD_SIZE,
        class_token=False,
        extra_tokens=added,
        gated=dict(media_norm=False, activation="gelu"),
        resampler=dict(
            width=width,
            layers=layers,
            heads=HEADS,
            head_size=HEAD_SIZE,
            latents=latents,
            frames=1,
            time_embedding=False,
            activation="gelu",
        ),
    )


def _without(report: Report, replaced: Collection[str]) -> Report:
    """The report of a model of which these parts are not used."""

    def kept(path: str) -> bool:
        return not any(path == part or path.startswith(f"{part}/") for part in replaced)

    used = {key: ours for key, ours in report.used.items() if any(map(kept, ours))}
    return dataclasses.replace(report, used=used, unused=[*report.unused, *(k for k in report.used if k not in used)])


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
    lm: huggingface.ImportedLanguageModel,
    family: Family,
    tensors: Tensors,
    known: int | None,
    report: Report,
    label: str,
) -> dict[str, np.ndarray]:
    """The embedding and the output rows, the added tokens' apart. What is used of `tensors` is taken out."""
    names = {"embedding": f"lang_encoder.{family.embedding}", "head": f"lang_encoder.{family.head}"}
    if names["embedding"] not in tensors:
        raise CheckpointError(f"{label}: no {names['embedding']}; is it a checkpoint for a {lm.family}?")
    rows = {key: tensors.pop(name) for key, name in names.items() if name in tensors}
    width, embedding = lm.fields["width"], rows["embedding"]
    added = ADDED_TOKENS.get(lm.family, 3) if known is None else len(embedding) - known
    if known is not None and added not in (2, 3):
        raise CheckpointError(
            f"{label}: {names['embedding']} has {len(embedding)} rows; expected the tokenizer's {known} and 2 or 3 more"
        )
    for key, value in rows.items():
        if value.shape != (len(embedding), width) or len(value) <= added:
            raise CheckpointError(f"{label}: {names[key]} has shape {list(value.shape)}; expected [V, {width}]")
        report.used[names[key]] = [f"language_model/{key}", f"extra_{key}"]
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
        report.used[positions] = ["language_model/position_embedding"]
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


def write_open_flamingo(path: str | Path, config: Mapping[str, Any], variables: PyTree) -> None:
    """Writes what OpenFlamingo's `checkpoint.pt` holds; the CLIP and the language model remain their own files.

    Args:
      path: a new file. `.pt`, for `torch.load`, needs PyTorch; `.safetensors` does not, and is read there by
        `model.load_state_dict(safetensors.torch.load_file(PATH), strict=False)`.
      config, variables: as the fields of `ImportedFlamingo`.

    Raises ConfigError where the file exists, PyTorch is missing, or OpenFlamingo has no words for this model.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path}: exists already; name a new file")
    require(path.suffix in (".pt", ".safetensors"), f"{path}: expected a name that ends in .pt or .safetensors")
    if path.suffix == ".pt":
        try:
            import torch
        except ImportError:
            raise ConfigError(f"{path}: .pt is PyTorch's own format and needs it; name a .safetensors file") from None
    tensors = to_open_flamingo(config, variables)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            torch.save({key: _as_torch(value) for key, value in tensors.items()}, temporary)


def _as_torch(value: np.ndarray) -> Any:
    import torch

    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def to_open_flamingo(config: Mapping[str, Any], variables: PyTree) -> Tensors:
    """The tensors of a checkpoint. Raises ConfigError where OpenFlamingo has no words for this model."""
    resampler = config["resampler"]
    sizes = (resampler[key] for key in ("width", "layers", "latents"))
    require_same(config, {**config, **_trained(config["interval"], config["extra_tokens"], *sizes)}, "OpenFlamingo")
    family = FAMILIES[family_of(config["language_model"])]
    params = variables["params"]
    lm = params["language_model"]
    rows = [*_RESAMPLER, *_gated_rows(f"lang_encoder.{_layers(family)}", config["interval"])]
    tensors = to_theirs(rows, {name: params[name] for name in ("resampler", "gated")})

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(lm[name]), np.asarray(params[f"extra_{name}"])])

    tensors[f"lang_encoder.{family.embedding}"] = joined("embedding")
    extra_head = np.asarray(params["extra_head"])
    if config["language_model"]["tied"]:
        require(
            np.array_equal(extra_head, np.asarray(params["extra_embedding"])),
            "extra_head differs from extra_embedding: OpenFlamingo ties the one to the other with this language model",
        )
        tensors[f"lang_encoder.{family.head}"] = joined("embedding")
    elif extra_head.any():  # zeros stand for rows that were never trained and never saved
        tensors[f"lang_encoder.{family.head}"] = joined("head")
    if "position_embedding" in lm and family is FAMILIES["opt"]:
        positions = next(row.theirs for row in family.rows if row.ours == "position_embedding")
        tensors[f"lang_encoder.{family.prefix}{positions}"] = np.array(lm["position_embedding"])
    return tensors


def family_of(language_model: Mapping[str, Any]) -> str:
    """The Hugging Face family whose language models have such fields."""
    fields = language_model_fields(language_model)
    if fields["positions"] == "learned":
        return "opt" if fields["position_offset"] else "gpt2"
    if fields["positions"] == "alibi":
        return "mpt"
    return "gpt_neox" if fields["norm"] == "layer" else "llama"
