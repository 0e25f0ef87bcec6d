"""`clip-jax`: a trained model put to use on images and texts.

clip-jax embed runs/quickstart/clip pictures/ pictures.safetensors
clip-jax search runs/quickstart/clip pictures.safetensors --text "a red apple" --html found.html
clip-jax classify openai:ViT-B-32.pt photo.jpg --labels "cat,dog" --templates "a photo of a {}."
clip-jax rerank hf:DIRECTORY pictures/ --text "a red apple"
clip-jax import openai:ViT-B-32.pt runs/vit-b-32
clip-jax import hf:DIRECTORY runs/siglip --tokenizer spiece.model
clip-jax export runs/quickstart/clip exported --format open_clip
clip-jax info openai:ViT-B-32.pt --json
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_jax.command_line import Parser, positive, report_rejected, run
from clip_jax.errors import ConfigError
from clip_jax.files import is_file, read_lines
from clip_jax.interop.commands import MODELS, add_commands


def main(argv: Sequence[str] | None = None) -> None:
    run(parser(), argv)


def parser() -> Parser:
    top = Parser("clip-jax", __doc__ or "")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        one = top.command(name, function, text)
        one.add_argument("model", help=MODELS)
        group = one.add_argument_group("how it runs")
        group.add_argument("--batch-size", type=positive, default=64, metavar="N", help="default: 64")
        group.add_argument("--threads", type=positive, default=4, metavar="N", help="that decode images; default: 4")
        group.add_argument(
            "--long-texts", choices=("truncate", "refuse", "average"), default="truncate",
            help="what to do with a text beyond the model's length: cut it (default), refuse it, average its windows",
        )  # fmt: skip
        return one

    images = "a folder, a glob, a .tar file, an image or a data source (emoji:train, tfds:DIRECTORY#SPLIT)"
    embed = command("embed", embed_command, "Embeds images, or the lines of a text file, into one file.")
    embed.add_argument("source", help=f"{images}; with --texts a text file of one text a line")
    embed.add_argument("output", type=Path, help="*.safetensors or *.parquet; a run that was stopped goes on")
    embed.add_argument("--texts", action="store_true", help="the source is a text file")
    embed.add_argument(
        "--rows-in-part", type=positive, default=4096, metavar="N", help="written at once; default: 4096"
    )

    classify = command("classify", classify_command, "Classifies images among given labels, without training.")
    classify.add_argument("source", help=images)
    classify.add_argument(
        "--labels", required=True, help="names with commas between, a text file of one a line, or `imagenet`"
    )
    classify.add_argument(
        "--templates", default="{}", help="openai80, openai7, a text with {} or a file of one a line; default: {}"
    )

    search = command("search", search_command, "Searches a file of embeddings by texts and images; compares every row.")
    search.add_argument("embeddings", type=Path, help="what `embed` wrote, with the same model")
    search.add_argument("--text", action="append", default=[], help="a text to search by; may be repeated")
    search.add_argument("--image", action="append", default=[], help="images to search by; may be repeated")
    search.add_argument("--html", type=Path, help="also write a page with pictures, which needs nothing beside it")

    rerank = command("rerank", rerank_command, "Orders images by how well they fit a text.")
    rerank.add_argument("source", help=images)
    rerank.add_argument("--text", required=True, help="the text")

    embed.add_argument("--json", action="store_true", help="print JSON")
    for one, number in ((classify, 5), (search, 10), (rerank, None)):
        one.add_argument(
            "-k", "--top", type=positive, default=number, metavar="N", help=f"results; default: {number or 'all'}"
        )
        one.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_commands(top)
    return top


def embedder_of(arguments: argparse.Namespace) -> Any:
    from clip_jax.embedding import Embedder
    from clip_jax.loading import load

    return Embedder(load(arguments.model), arguments.batch_size, arguments.threads)


def embed_command(arguments: argparse.Namespace) -> None:
    from clip_jax.data.images import open_images
    from clip_jax.embedding import Texts, embed_to_file

    spec = arguments.source
    source = Texts(read_lines(Path(spec))) if arguments.texts else open_images(spec)
    embedder = embedder_of(arguments)
    rejected = embed_to_file(
        embedder, source, spec, arguments.output, long_texts=arguments.long_texts, rows_in_part=arguments.rows_in_part
    )
    size = arguments.output.stat().st_size
    report_cut(embedder)
    if arguments.json:
        figures = {"output": str(arguments.output), "embeddings": len(source) - len(rejected), "bytes": size}
        print(json.dumps(figures | {"left_out": list(rejected)}, indent=1, ensure_ascii=False))
        return
    print(f"wrote {arguments.output}: {len(source) - len(rejected)} embeddings ({size / 1e6:.1f} MB)")
    if rejected:
        print(f"{len(rejected)} images left out, listed in {arguments.output}.rejected.txt; the first: {rejected[0]}")


def classify_command(arguments: argparse.Namespace) -> None:
    from clip_jax.data.images import open_images
    from clip_jax.evaluation import prompts, zero_shot
    from clip_jax.progress import brief

    if arguments.labels == "imagenet":
        labels = prompts.imagenet_classes()
    elif is_file(arguments.labels):
        labels = read_lines(Path(arguments.labels))
    else:
        labels = [name.strip() for name in arguments.labels.split(",") if name.strip()]
    if not labels:
        raise ConfigError("--labels: at least one expected")
    templates, images = prompts.get_templates(arguments.templates), open_images(arguments.source)
    embedder = embedder_of(arguments)

    def encode(texts: Sequence[str]) -> Any:  # every template with every label: as many as a data set's
        with brief(total=len(texts), desc="texts", unit=" texts") as bar:
            return embedder.texts(texts, arguments.long_texts, bar.update)

    embeddings, rows = embedded(embedder, images)
    classes = zero_shot.class_embeddings(encode, labels, templates)
    report_cut(embedder)
    top, probabilities = zero_shot.top_probabilities(embeddings, classes, embedder.logit_scale(), arguments.top)
    results = [
        {
            "image": key,
            "labels": [{"label": labels[c], "probability": round(float(p), 6)} for c, p in zip(best, ps, strict=True)],
        }
        for (key, _), best, ps in zip(rows, top, probabilities, strict=True)
    ]
    if arguments.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    for result in results:
        print(result["image"])
        for entry in result["labels"]:
            print(f"  {entry['probability']:7.2%}  {entry['label']}")


def search_command(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.data.images import open_images
    from clip_jax.embedding import EmbeddingFile
    from clip_jax.search import search_file, thumbnails, write_page

    if not arguments.text and not arguments.image:
        raise ConfigError("nothing to search by: give --text TEXT or --image IMAGE")
    if arguments.html and not arguments.html.absolute().parent.is_dir():
        raise ConfigError(f"--html {arguments.html}: no such folder")
    file = EmbeddingFile(arguments.embeddings)
    embedder = embedder_of(arguments)
    queries, embeddings = list(arguments.text), []
    if queries:
        embeddings.append(embedder.texts(queries, arguments.long_texts))
        report_cut(embedder)
    for spec in arguments.image:
        rows, keys = embedded(embedder, open_images(spec))
        embeddings.append(rows)
        queries += [key for key, _ in keys]
    found = search_file(embedder, file, queries, np.concatenate(embeddings), arguments.top)
    if arguments.html:
        picture = thumbnails(open_images(file.metadata["source"])) if file.metadata["kind"] == "image" else None
        write_page(arguments.html, f"{len(file):,} {file.metadata['kind']}s of {arguments.embeddings}", found, picture)
        logging.info("wrote %s", arguments.html)
    print_found(found, arguments.json)


def rerank_command(arguments: argparse.Namespace) -> None:
    import numpy as np

    from clip_jax.data.images import open_images
    from clip_jax.search import Found

    images = open_images(arguments.source)
    embedder = embedder_of(arguments)
    (query,) = embedder.texts([arguments.text], arguments.long_texts)
    report_cut(embedder)
    embeddings, rows = embedded(embedder, images)
    scores = embeddings @ query
    order = np.argsort(-scores, kind="stable")[: arguments.top]
    keys, indices = [rows[i][0] for i in order], [rows[i][1] for i in order]
    print_found([Found(arguments.text, keys, indices, [round(float(scores[i]), 4) for i in order])], arguments.json)


def embedded(embedder: Any, images: Any) -> tuple[Any, Any]:
    """(embeddings, (key, index) of each row), with a bar; names the images that are left out."""
    from clip_jax.progress import brief

    with brief(total=len(images), desc="images", unit=" images") as bar:
        embeddings, rows, rejected = embedder.images(images, progress=bar.update)
    report_rejected(rejected, len(images))
    return embeddings, rows


def report_cut(embedder: Any) -> None:
    if cut := embedder.loaded.tokenizer.truncated:
        logging.warning("%d texts were too long and cut; see --long-texts", cut)


def print_found(found: Sequence[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1, ensure_ascii=False))
        return
    for one in found:
        print(one.query)
        for key, score in zip(one.keys, one.scores, strict=True):
            print(f"  {score:7.4f}  {key}")


if __name__ == "__main__":
    main()
