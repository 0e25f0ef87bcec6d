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

# The numbers of all parameters that the models' pages on huggingface.co, their cards or their papers give.
LANGUAGE = {
    "LLaMA-7B": 6_738_415_616,
    "LLaMA-13B": 13_015_864_320,
    "LLaMA-30B": 32_528_943_616,
    "LLaMA-65B": 65_285_660_672,
    "LLaMA-2-7B": 6_738_415_616,
    "LLaMA-2-13B": 13_015_864_320,
    "LLaMA-2-70B": 68_976_648_192,
    "LLaMA-3-8B": 8_030_261_248,
    "LLaMA-3-70B": 70_553_706_496,
    "LLaMA-3.1-8B": 8_030_261_248,
    "LLaMA-3.1-70B": 70_553_706_496,
    "LLaMA-3.1-405B": 405_853_388_800,
    "LLaMA-3.2-1B": 1_235_814_400,
    "LLaMA-3.2-3B": 3_212_749_824,
    "MPT-7B": 6_649_286_656,
    "RedPajama-INCITE-3B": 2_775_864_320,
    "SmolLM2-135M": 134_515_008,
    "GPT-2": 124_439_808,
    "GPT-2-medium": 354_823_168,
    "GPT-2-large": 774_030_080,
    "GPT-2-xl": 1_557_611_200,
    "OPT-125M": 125_239_296,
    "OPT-1.3B": 1_315_758_080,
    "OPT-2.7B": 2_651_596_800,
    "OPT-6.7B": 6_658_473_984,
    "OPT-13B": 12_853_473_280,
    "OPT-30B": 29_974_540_288,
    "Pythia-70M": 70_426_624,
    "Pythia-160M": 162_322_944,
    "Pythia-410M": 405_334_016,
    "Pythia-1B": 1_011_781_632,
    "Pythia-1.4B": 1_414_647_808,
    "Pythia-2.8B": 2_775_208_960,
    "Pythia-6.9B": 6_857_302_016,
    "Pythia-12B": 11_846_072_320,
    "GPT-NeoX-20B": 20_554_567_680,
}


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(sharding.unbox(tree)))


def count_of(module: nn.Module, *inputs: tuple[tuple[int, ...], Any]) -> int:
    arguments = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs)
    return count(jax.eval_shape(module.init, jax.random.key(0), *arguments))


def language_model(fields: dict[str, Any]) -> int:
    return count_of(LanguageModel(DecoderSpec(**fields)), ((1, 1), jnp.int32))


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_have_the_published_numbers(name: str) -> None:
    assert language_model(LANGUAGE_MODELS[name]) == LANGUAGE[name]


@pytest.mark.parametrize(
    ("name", "billions"), [("Chinchilla-1.4B", 1.4), ("Chinchilla-70B", 70), ("MPT-1B", 1.3), ("OPT-66B", 66)]
)
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
