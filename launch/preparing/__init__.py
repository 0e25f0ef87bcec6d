"""The subcommands of `launch.prepare`: each a module with `add_parser(commands)`, which sets `run`.

`run(arguments)` returns an Outcome.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What was done: in words, and (`--json`) in figures."""

    text: str
    figures: Mapping[str, Any]
