"""CLIP and Flamingo on a web page of your own.

    python -m launch.demo
    python -m launch.demo --clip runs/quickstart/clip --images photos/
    python -m launch.demo --clip openai:ViT-B-32.pt --flamingo idefics:idefics-9b-instruct
    python -m launch.demo --flamingo open_flamingo:checkpoint.pt --flamingo-option language_model=hf:mpt-1b \\
        --flamingo-option vision=openai:ViT-L-14.pt

Without arguments it shows the quickstart's models. Only this machine sees the page, unless --host says otherwise;
nothing is fetched from or sent to anywhere else. Needs the extra `demo`.
"""

import argparse
import ast
import inspect
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.command_line import positive, run
from clip_jax.errors import ConfigError

QUICKSTART = Path("runs/quickstart")
IMAGES = "emoji:held_out_style"


def parser() -> argparse.ArgumentParser:
    one = argparse.ArgumentParser(
        prog="python -m launch.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one.set_defaults(run=main)
    one.add_argument("--debug", action="store_true", help="show where an error came from")
    models = one.add_argument_group("models")
    models.add_argument("--clip", metavar="SPEC", help="a run's workdir, a checkpoint, or what clip_jax.load takes")
    models.add_argument("--flamingo", metavar="SPEC", help="the same of flamingo_jax.load")
    for flag in ("--clip-option", "--flamingo-option"):
        load = f"{flag[2:].removesuffix('-option')}_jax.load"
        models.add_argument(
            flag, action="append", default=[], metavar="KEY=VALUE", help=f"what {load} is told beside; may be repeated"
        )
    models.add_argument("--batch-size", type=positive, default=16, metavar="N", help="of CLIP; default: 16")
    models.add_argument("--talk-together", type=positive, default=4, metavar="N", help="of Flamingo; default: 4")
    models.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="of an answer; default: 48")
    searched = one.add_argument_group("what is searched")
    searched.add_argument(
        "--images", metavar="SPEC", help=f"a folder, a glob, a .tar file or a data source; default: {IMAGES}"
    )
    searched.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="instead of --images: what `clip-jax embed` made of images with this CLIP",
    )
    server = one.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0: whoever reaches this machine; default: 127.0.0.1")
    server.add_argument("--port", type=positive, default=7860, help="default: 7860")
    server.add_argument("--max-upload", type=positive, default=10, metavar="MiB", help="of a picture; default: 10")
    server.add_argument("--max-pixels", type=positive, default=25, metavar="MILLIONS", help="of a picture; default: 25")
    return one


def main(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="clip-flamingo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve() / "uploads")  # before a component reads it
        served = start(arguments, Path(folder).resolve())
        print(f"open {served.address}  (Ctrl-C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("closed")
        finally:
            served.page.close(verbose=False)


class Served(NamedTuple):
    page: Any
    address: str
    clip: Any
    flamingo: Any


def start(arguments: argparse.Namespace, folder: Path) -> Served:
    """Loads, compiles and serves what the arguments name; uploads lie in `folder`/uploads."""
    clip_spec, flamingo_spec = specs(arguments.clip, arguments.flamingo)
    if arguments.embeddings and not clip_spec:
        raise ConfigError(f"--embeddings {arguments.embeddings}: no CLIP to search it with; name one with --clip")
    if arguments.embeddings and arguments.images is not None:
        raise ConfigError("--embeddings and --images: one of them expected; the file names its images itself")
    images = IMAGES if arguments.images is None else arguments.images
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError("the demo needs the extra `demo` (gradio): pip install '.[demo]'") from None
    from clip_jax import sharding
    from clip_jax.data.images import open_images
    from clip_jax.loading import load
    from flamingo_jax import loading as flamingo_loading
    from flamingo_jax.speaker import Manner, Speaker
    from launch import command
    from launch.demonstration import page
    from launch.demonstration.answering import Flamingo
    from launch.demonstration.finding import Clip
    from launch.demonstration.uploads import Limits

    command.set_up()
    for noisy in ("httpx", "faiss"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    limits = Limits(arguments.max_upload * 2**20, arguments.max_pixels * 1_000_000)
    uploads, index = folder / "uploads", folder / "index"
    for one in (uploads, index):
        one.mkdir()
    clip, flamingo, examples = None, None, None
    if clip_spec:
        begun = time.perf_counter()
        loaded = load(clip_spec, **options(arguments.clip_option, "--clip-option", load))
        clip = Clip(loaded, index, limits, images, arguments.embeddings, arguments.batch_size)
        texts = f" and {len(clip.texts):,} texts" if clip.texts else ""
        logging.info(
            "CLIP %s: ready, with %s pictures%s to search (%.0f s, compilation included)",
            clip_spec, f"{len(clip.pictures):,}", texts, time.perf_counter() - begun,
        )  # fmt: skip
        examples = clip.images
    if flamingo_spec:
        begun, mesh = time.perf_counter(), sharding.make_mesh()
        chosen = options(arguments.flamingo_option, "--flamingo-option", flamingo_loading.load)
        model = flamingo_loading.load(flamingo_spec, mesh=mesh, **chosen)
        speaker = Speaker(model, mesh, Manner(max_new_tokens=arguments.max_new_tokens))
        flamingo = Flamingo(speaker, limits, arguments.talk_together)
        logging.info("Flamingo %s: ready (%.0f s, compilation included)", flamingo_spec, time.perf_counter() - begun)
    about = " · ".join(filter(None, (clip_spec and f"CLIP: {name_of(clip_spec)}",
                                     flamingo_spec and f"Flamingo: {name_of(flamingo_spec)}")))  # fmt: skip
    built = page.build(clip, flamingo, examples or open_images(images), about)
    return Served(built, page.serve(built, uploads, limits, arguments.host, arguments.port), clip, flamingo)


def specs(clip: str | None, flamingo: str | None) -> tuple[str, str]:
    """What is named or, where nothing is, what the quickstart has trained; "" for what there is not."""
    from launch.quickstart import newest_step

    if clip or flamingo:
        return clip or "", flamingo or ""
    runs = [QUICKSTART / name for name in ("clip", "flamingo")]
    found = [str(run) if newest_step(run) else "" for run in runs]
    if not any(found):
        raise ConfigError(
            f"no models: nothing is trained in {runs[0]} and {runs[1]} yet; `make quickstart` does it, or name yours "
            "with --clip and --flamingo"
        )
    for workdir, there in zip(runs, found, strict=True):
        if not there:
            logging.info("%s: not trained yet, so it is not shown; `make quickstart` does it", workdir)
    return found[0], found[1]


def options(words: Sequence[str], flag: str, load: Callable[..., Any]) -> dict[str, Any]:
    """KEY=VALUE of a flag as arguments of `load`. Raises ConfigError for a key that it does not take."""
    known = [name for name in inspect.signature(load).parameters if name not in ("spec", "mesh")]
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"{flag} {word}: expected KEY=VALUE with KEY one of {', '.join(known)}")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        found[key] = (*found.get(key, ()), value) if key == "allow" else value
    return found


def name_of(spec: str) -> str:
    """What visitors may know of where a model lies: the last part of its path."""
    kind, colon, path = spec.partition(":")
    return f"{kind}:{Path(path).name}" if colon else Path(spec).name


if __name__ == "__main__":
    run(parser(), None)
