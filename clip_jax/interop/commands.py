"""`clip-jax import | export | info`: published weights as a checkpoint, a model in others' formats, what a model is."""

import argparse
import json
from pathlib import Path
from typing import Any

from clip_jax.command_line import Parser

PUBLISHED = "hf:DIR, openai:FILE, open_clip:FILE,CONFIG.json or open_clip:DIR"
MODELS = f"a run's workdir, a checkpoint, or {PUBLISHED}"


def add_commands(top: Parser) -> None:
    """Adds the three to `clip-jax`. (Nothing heavy is imported before one of them runs.)"""

    def command(name: str, run: Any, text: str, model: str) -> argparse.ArgumentParser:
        one = top.command(name, run, text)
        one.add_argument("model", help=model)
        group = one.add_argument_group("of weights from elsewhere")
        group.add_argument("--image-size", type=int, metavar="S", help="another resolution than the weights'")
        group.add_argument(
            "--preprocess", choices=("clip", "siglip", "imagenet"), help="where no file beside the weights says it"
        )
        group.add_argument(
            "--tokenizer", metavar="PATH", help="where none is beside the weights, if it is not OpenAI's"
        )
        group.add_argument(
            "--allow", action="append", default=[], metavar="REGEX", help="tensors that may be missing or unused"
        )
        if run is import_command:
            group.add_argument(
                "--embed-dim", type=int, metavar="E", help="of timm:FILE and bert:DIR: the joint space's width"
            )
        return one

    towers = f"{PUBLISHED}; a tower by itself: timm:FILE (NFNet) or bert:DIR"
    one = command("import", import_command, "Turns published weights into a checkpoint of this project.", towers)
    one.add_argument("workdir", type=Path, help="a new directory; start from it with --config.init.vision=WORKDIR")
    one.add_argument("--json", action="store_true", help="print JSON: how many tensors were used, missing, unused")
    one = command("export", export_command, "Writes a model as others' libraries read it.", MODELS)
    one.add_argument("directory", type=Path, help="a new directory")
    one.add_argument("--format", choices=("hf", "open_clip"), required=True, help="whose")
    one = command("info", info_command, "Says what a model is: sizes, parameters, preprocessing, tokenizer.", MODELS)
    one.add_argument("--json", action="store_true", help="print JSON")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return dict(image_size=arguments.image_size, preprocess=arguments.preprocess, allow=arguments.allow)


def _load(arguments: argparse.Namespace) -> Any:
    from clip_jax.loading import load

    return load(arguments.model, tokenizer=arguments.tokenizer, **_options(arguments))


def import_command(arguments: argparse.Namespace) -> None:
    from clip_jax.errors import ConfigError
    from clip_jax.interop import published

    if not published.is_published(arguments.model):
        raise ConfigError(f"{arguments.model}: expected one of {', '.join(f'{kind}:PATH' for kind in published.KINDS)}")
    model = published.read(arguments.model, embed_dim=arguments.embed_dim, **_options(arguments))
    where, tokenizer = "", None
    if "text" in model.towers:
        path = Path(arguments.model.partition(":")[2].partition(",")[0])
        where = published.find_tokenizer(model, path, arguments.tokenizer)
        tokenizer = published.open_tokenizer(where, model)
    checkpoint = published.save(model, tokenizer, where, arguments.workdir)
    if arguments.json:
        print(json.dumps({"wrote": str(checkpoint), "tensors": model.report.counts()}, indent=1))
        return
    print(f"{arguments.model}: {model.report.summary()}")
    print(f"wrote {checkpoint}")


def export_command(arguments: argparse.Namespace) -> None:
    import dataclasses

    from clip_jax.interop import published

    model = _load(arguments)
    config, fields = model.metadata["config"]["model"], dataclasses.asdict(model.preprocess)
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    published.WRITERS[arguments.format](arguments.directory, config, model.params, fields)
    print(f"wrote {', '.join(str(file) for file in sorted(arguments.directory.iterdir()))}")


def info_command(arguments: argparse.Namespace) -> None:
    import jax

    model = _load(arguments)
    about, params = model.metadata["model"], model.params["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in sorted(params.items())}
    info = {
        "family": about["family"],
        "source": model.metadata.get("source", "trained here"),
        "step": model.metadata.get("step", 0),
        "parameters": {"all": sum(counts.values()), **counts},
        "embed_dim": about["embed_dim"],
        "activation": about["activation"],
        "vision": about["towers"]["vision"],
        "text": about["towers"]["text"],
        "preprocess": about["preprocess"],
        "tokenizer": about["tokenizer"]["file"],
    }
    if arguments.json:
        print(json.dumps(info, indent=1))
        return
    for key, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:,}" if key == "parameters" else f"{k} {v}" for k, v in value.items())
        print(f"{key:12}{value}")
