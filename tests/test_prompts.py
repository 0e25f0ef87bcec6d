"""ImageNet's prompts and names against what is published of them."""

from pathlib import Path

import pytest

from clip_jax.errors import ConfigError
from clip_jax.evaluation.prompts import get_templates, imagenet_classes


def test_the_published_ensembles() -> None:
    eighty, seven = get_templates("openai80"), get_templates("openai7")
    assert len(set(eighty)) == 80 and len(set(seven)) == 7  # arXiv 2103.00020 §3.1.4
    assert {"a bad photo of a {}.", "a photo of a cool {}.", "a tattoo of the {}."} <= set(eighty)
    assert "itap of a {}." in seven and set(seven) <= set(eighty)


def test_imagenets_classes() -> None:
    names = imagenet_classes()
    assert len(names) == 1000
    assert (names[0], names[1], names[207], names[999]) == ("tench", "goldfish", "Golden Retriever", "toilet paper")


def test_templates_of_ones_own(tmp_path: Path) -> None:
    assert get_templates("a drawing of {}") == ("a drawing of {}",)
    assert get_templates(["{}", "a {}."]) == ("{}", "a {}.")
    (tmp_path / "templates.txt").write_text("{}\n\nthe {}\n")
    assert get_templates(str(tmp_path / "templates.txt")) == ("{}", "the {}")


@pytest.mark.parametrize(
    ("templates", "expected"),
    [("imagenet", "openai80, openai7"), ([], "at least one"), (["a photo"], "a photo"), ("{} {}", "exactly one")]
    + [("{name}", "exactly one")],
)
def test_what_is_no_template_is_refused(templates: str | list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        get_templates(templates)
