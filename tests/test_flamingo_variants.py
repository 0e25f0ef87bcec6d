"""Named sizes against the numbers of parameters that are published; nothing is allocated."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from clip_jax import sharding
from flamingo_jax.interop.open_flamingo import initial_params
from flamingo_jax.models.language_model import DecoderSpec, LanguageModel
from flamingo_jax.models.variants import LANGUAGE_MODELS, get_variant

# What huggingface.co says of each model's safetensors, all tensors counted.
LANGUAGE = {
    "LLaMA-7B": 6_738_415_616,
    "LLaMA-65B": 65_285_660_672,
    "MPT-7B": 6_649_286_656,
    "RedPajama-INCITE-3B": 2_775_864_320,
    "SmolLM2-135M": 134_515_008,
}
GPT: dict[str, Any] = dict(norm="layer", biases=True)
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {  # sizes that this project has no name for
    "TinyLlama-1.1B": (
        1_100_048_384,
        dict(vocab_size=32000, width=2048, layers=22, heads=32, kv_heads=4, mlp_width=5632, tied=False),
    ),
    "GPT-2": (
        124_439_808,
        GPT | dict(vocab_size=50257, width=768, layers=12, heads=12, kv_heads=12, mlp_width=3072, positions="learned",
                   max_positions=1024, activation="gelu_tanh"),
    ),
    "OPT-125M": (
        125_239_296,
        GPT | dict(vocab_size=50272, width=768, layers=12, heads=12, kv_heads=12, mlp_width=3072, positions="learned",
                   max_positions=2048, position_offset=2, activation="relu"),
    ),
    "Pythia-1.4B": (
        1_414_647_808,
        GPT | dict(vocab_size=50304, width=2048, layers=24, heads=16, kv_heads=16, mlp_width=8192, activation="gelu",
                   rotary_fraction=0.25, parallel_residual=True, tied=False),
    ),
}  # fmt: skip


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(sharding.unbox(tree)))


def count_of(module: nn.Module, *inputs: tuple[tuple[int, ...], Any]) -> int:
    arguments = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs)
    return count(jax.eval_shape(module.init, jax.random.key(0), *arguments))


def language_model(fields: dict[str, Any]) -> int:
    return count_of(LanguageModel(DecoderSpec(**fields)), ((1, 1), jnp.int32))


@pytest.mark.parametrize("name", [*LANGUAGE, *OTHERS])
def test_language_models_have_the_published_numbers(name: str) -> None:
    expected, fields = OTHERS[name] if name in OTHERS else (LANGUAGE[name], LANGUAGE_MODELS[name])
    assert language_model(fields) == expected


@pytest.mark.parametrize(("name", "billions"), [("Chinchilla-1.4B", 1.4), ("Chinchilla-70B", 70), ("MPT-1B", 1.3)])
def test_language_models_have_the_size_in_their_name(name: str, billions: float) -> None:
    """Chinchilla's blocks hold 13·D² parameters: 4 of attention, 1 of relative positions, 8 of the feed-forward."""
    fields = LANGUAGE_MODELS[name]
    got, D = language_model(fields), fields["width"]
    assert float(f"{got / 1e9:.2g}") == billions
    matrices = (13 if "Chinchilla" in name else 12) * fields["layers"] * D**2 + fields["vocab_size"] * D
    assert math.isclose(got, matrices, rel_tol=1e-3)


def test_flamingo_3b_has_the_papers_trained_parts() -> None:
    """arXiv 2204.14198: 1.2 B in the gated blocks, 194 M in the resampler, which looks at an NFNet-F6's 3072."""
    params = sharding.unbox(jax.eval_shape(lambda: initial_params(get_variant("Flamingo-3B"))))
    assert f"{count(params['gated']) / 1e9:.3f}" == "1.158"
    assert f"{count(params['resampler']) / 1e6:.1f}" == "193.6"
    assert count(params["vision"]) == 435_286_116 + 3072 * 1376  # timm's NFNet-F6, and the joint space's projection


@pytest.mark.parametrize(
    ("name", "blocks", "billions"),
    [
        ("Flamingo-9B", 10, None), ("Flamingo-80B", 12, None),
        ("OpenFlamingo-3B", 24, None), ("OpenFlamingo-4B", 16, None), ("OpenFlamingo-9B", 8, None),
        ("IDEFICS-9B", 8, 9), ("IDEFICS-80B", 20, 80),
    ],
)  # fmt: skip
def test_blocks_stand_where_they_are_published_to(name: str, blocks: int, billions: float | None) -> None:
    config = get_variant(name)
    params = sharding.unbox(jax.eval_shape(lambda: initial_params(config)))
    assert params["gated"]["query"]["kernel"].shape[0] == blocks
    if billions:
        assert round(count(params) / 1e9) == billions
