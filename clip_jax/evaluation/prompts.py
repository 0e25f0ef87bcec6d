"""Templates of prompts and names of classes, by name. Sources: data/assets/imagenet/NOTICE."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_jax.data.sources import ASSETS
from clip_jax.errors import ConfigError
from clip_jax.files import is_file, read_lines


def get_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Prompts with one `{}` each.

    Args:
      templates: a name ("openai80", "openai7"), a template, a text file of one a line, or a list of them.

    Raises:
      ConfigError: an unknown name, no template, or one without exactly one `{}`.
      DataError: a file that is empty or no UTF-8.
    """
    if isinstance(templates, str):
        named = _read("templates")
        if templates in named:
            return tuple(named[templates])
        if is_file(templates):
            templates = read_lines(Path(templates))
        elif "{" not in templates:
            raise ConfigError(
                f"templates {templates!r}: expected {', '.join(named)}, a text with {{}} or a file of such"
            )
        else:
            templates = (templates,)
    if not templates:
        raise ConfigError("templates: at least one expected")
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise ConfigError(f"template {template!r}: expected exactly one {{}}, for the name")
    return tuple(templates)


def imagenet_classes() -> list[str]:
    """The 1,000 names, in the order of ImageNet's labels."""
    return _read("classes")


def _read(name: str) -> Any:
    return json.loads((ASSETS / "imagenet" / f"{name}.json").read_text(encoding="utf-8"))
