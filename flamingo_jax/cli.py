"""`flamingo-jax`: a Flamingo put to use on images and texts.

flamingo-jax caption --model runs/quickstart/flamingo photos/
flamingo-jax caption --model idefics:idefics-9b photo.jpg --shots shots.jsonl --beams 3
flamingo-jax answer --model runs/quickstart/flamingo photo.jpg --question "what colour is this?"
flamingo-jax chat --model idefics:idefics-9b-instruct
flamingo-jax score --model runs/quickstart/flamingo photo.jpg --text "a dog" --text "a cat"
flamingo-jax import idefics:idefics-9b runs/idefics-9b
flamingo-jax import hf:mpt-1b-redpajama-200b runs/mpt-1b
flamingo-jax export runs/idefics-9b idefics exported
flamingo-jax info open_flamingo:checkpoint.pt --language-model hf:mpt-1b --vision openai:ViT-L-14.pt
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clip_jax.command_line import Parser, positive, report_rejected, run
from clip_jax.errors import ConfigError, DataError, RecordError
from clip_jax.files import is_file, numbered_lines


def main(argv: Sequence[str] | None = None) -> None:
    run(parser(), argv)


def parser() -> Parser:
    top = Parser("flamingo-jax", __doc__ or "")
    any_model = "a run's workdir, a checkpoint, idefics:DIR or open_flamingo:CHECKPOINT.pt"

    def talking(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        one = top.command(name, function, text)
        one.add_argument("--model", required=True, metavar="SPEC", help=any_model)
        one.add_argument("--int8", action="store_true", help="hold frozen weights in int8: a quarter of the memory")
        loading(one)
        return one

    def loading(one: argparse.ArgumentParser) -> None:
        group = one.add_argument_group("of a model from elsewhere")
        group.add_argument("--language-model", metavar="SPEC", help="OpenFlamingo's: hf:DIR")
        group.add_argument(
            "--vision", metavar="SPEC", help="OpenFlamingo's: open_clip:DIR (or FILE,CONFIG.json), openai:FILE, hf:DIR"
        )
        group.add_argument(
            "--norm-tokens",
            action="store_true",
            help="feed the tower's tokens after ln_post, as a fresh OpenFlamingo does",
        )
        group.add_argument("--preprocess", choices=("clip", "siglip"), help="where no file beside the weights says it")
        group.add_argument("--tokenizer", metavar="PATH", help="where none is beside the weights")
        group.add_argument(
            "--allow", action="append", default=[], metavar="REGEX", help="tensors that may be missing or unused"
        )

    def choosing(one: argparse.ArgumentParser, new_tokens: int) -> None:
        group = one.add_argument_group("how words are chosen")
        group.add_argument(
            "--max-new-tokens", type=positive, default=new_tokens, metavar="N", help=f"default: {new_tokens}"
        )
        group.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the most likely word")
        group.add_argument(
            "--top-k", type=int, default=0, metavar="N", help="draw from the N most likely; default: from all"
        )
        group.add_argument(
            "--top-p",
            type=float,
            default=1.0,
            metavar="P",
            help="draw from the most likely, of probability P together; default: 1",
        )
        group.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
        group.add_argument("--beams", type=positive, default=1, metavar="N", help="search with N beams; default: 1")
        group.add_argument(
            "--length-penalty", type=float, default=1.0, help="of beams; default: 1; above: longer texts"
        )
        group.add_argument(
            "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated"
        )

    def prompting(one: argparse.ArgumentParser, prompt: str, shots: str) -> None:
        one.add_argument("--prompt", metavar="TEXT", help=f"{prompt}; by default the family's own words")
        one.add_argument("--shots", type=Path, metavar="FILE", help=f"examples to stand first, JSON lines of {shots}")
        one.add_argument("--show-prompt", action="store_true", help="print what the model reads of the first image")
        one.add_argument("--json", action="store_true", help="print JSON")

    def batching(one: argparse.ArgumentParser) -> None:
        one.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
        one.add_argument("--threads", type=positive, default=4, metavar="N", help="that decode images; default: 4")

    images = "folders, globs, .tar files, images, videos or data sources (emoji:train, tfds:DIRECTORY#SPLIT)"
    caption = talking("caption", caption_command, "Says what images show.")
    caption.add_argument("images", nargs="+", help=images)
    answer = talking("answer", answer_command, "Answers a question about an image, or about each of several.")
    answer.add_argument("images", nargs="+", help=images)
    answer.add_argument("--question", required=True, metavar="TEXT", help="what is asked")
    prompting(caption, "what stands between an image and its caption", '{"image": PATH, "text": CAPTION}')
    prompting(
        answer, "what stands after an image, with {} for the question", '{"image": PATH, "question": …, "answer": …}'
    )
    for one in (caption, answer):
        batching(one)
        choosing(one, 32)

    chat = talking("chat", chat_command, "Talks in the terminal, about images too.")
    choosing(chat, 128)

    score = talking("score", score_command, "Says how likely texts are as the caption of an image, or as an answer.")
    score.add_argument("image", help="an image or a video")
    score.add_argument("--text", action="append", required=True, help="one of the texts; may be repeated")
    score.add_argument("--question", metavar="TEXT", help="what the texts answer; by default they are captions")
    prompting(score, "what stands between the image and a text", "what `caption` or `answer` takes")

    weights = "idefics:DIR or open_flamingo:CHECKPOINT.pt"
    one = top.command("import", import_command, "Turns published weights into a checkpoint of this project.")
    one.add_argument("model", help=f"{weights}, or hf:DIR, a language model alone, for a Flamingo to freeze")
    one.add_argument("workdir", type=Path, help="a new directory")
    one.add_argument("--json", action="store_true", help="print JSON: how many tensors were used, missing, unused")
    loading(one)
    one = top.command("export", export_command, "Writes a model as others' libraries read it.")
    one.add_argument("model", help=any_model)
    one.add_argument("format", choices=("idefics", "open_flamingo"), help="whose")
    one.add_argument("output", type=Path, help="a new directory; of open_flamingo a new file, .pt or .safetensors")
    loading(one)
    one = top.command("info", info_command, "Says what a model is: family, sizes, parameters, preprocessing, tokens.")
    one.add_argument("model", help=any_model)
    one.add_argument("--json", action="store_true", help="print JSON")
    loading(one)
    return top


def caption_command(arguments: argparse.Namespace) -> None:
    say(arguments, None)


def answer_command(arguments: argparse.Namespace) -> None:
    say(arguments, arguments.question)


def say(arguments: argparse.Namespace, question: str | None) -> None:
    """Captions, or answers to the question, of all images."""
    from tqdm import tqdm

    from clip_jax.data.images import open_images

    sources = [open_images(spec) for spec in arguments.images]
    where = [(source, i) for source in sources for i in range(len(source))]
    shots = read_shots(arguments.shots, question)
    speaker = speaker_of(arguments, min(arguments.batch_size, len(where)))
    opening = opened(speaker, arguments, shots, question)
    results, rejected = list[dict[str, str]](), list[str]()
    # Off a terminal there is no bar.
    with tqdm(total=len(where), desc=arguments.command, unit="images", disable=None, dynamic_ncols=True) as bar:
        for batch in read_ahead(where, speaker, arguments.threads):
            good = [entry for entry in batch if isinstance(entry, tuple)]
            rejected += [entry for entry in batch if isinstance(entry, str)]
            bar.update(len(batch))
            if not good:
                continue
            prompts = [opening.ask(media, question) for _, media in good]
            if arguments.show_prompt and not results:
                logging.info("%s", prompts[0])
            shape = speaker.shape(prompts)  # the same for all, but where videos stand among images
            for (key, _), text in zip(good, speaker.say(prompts, shape), strict=True):
                results.append({"image": key, "answer" if question else "caption": text})
                if not arguments.json:
                    bar.write(f"{key}\t{text}" if len(where) > 1 else text, file=sys.stdout)
    if arguments.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    report_rejected(rejected, len(where))
    if rejected:
        logging.warning("%d of %d images left out", len(rejected), len(where))


def score_command(arguments: argparse.Namespace) -> None:
    import numpy as np

    from flamingo_jax.data.prompts import see

    if not all(text.strip() for text in arguments.text):
        raise ConfigError("--text: empty; something to score expected")
    if not is_file(arguments.image):
        raise DataError(f"{arguments.image}: not found; expected an image")
    shots = read_shots(arguments.shots, arguments.question)
    speaker = speaker_of(arguments, 1)
    image = see(arguments.image, speaker.loaded.preprocess)
    prompt = opened(speaker, arguments, shots, arguments.question).ask(image, arguments.question)
    if arguments.show_prompt:
        logging.info("%s", prompt)
    likelihoods, tokens = speaker.score(prompt, arguments.text)
    probabilities = np.exp(likelihoods - np.logaddexp.reduce(likelihoods))
    results = [
        {"text": text, "log_likelihood": round(float(each), 4), "tokens": int(n), "probability": round(float(p), 6)}
        for text, each, n, p in zip(arguments.text, likelihoods, tokens, probabilities, strict=True)
    ]
    results.sort(key=lambda result: -result["probability"])
    if arguments.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return
    for result in results:
        print(f"  {result['probability']:7.2%}  {result['log_likelihood']:9.3f}  {result['text']}")


def chat_command(arguments: argparse.Namespace) -> None:
    from flamingo_jax.chat import HELP, Chat

    speaker = speaker_of(arguments, 1)
    terminal = sys.stdin.isatty()
    if terminal:
        print(HELP)

    def lines() -> Iterator[str]:
        while True:
            try:
                yield input("> " if terminal else "")
            except EOFError:
                return

    def write(text: str) -> None:
        print(text, end="", flush=True)

    Chat(speaker, write).run(lines())


def import_command(arguments: argparse.Namespace) -> None:
    from flamingo_jax.interop.commands import import_language_model, import_model

    kind, _, directory = arguments.model.partition(":")
    if kind == "hf":
        checkpoint, report = import_language_model(directory, arguments.workdir, allow=arguments.allow)
    else:
        checkpoint, found = import_model(arguments.model, arguments.workdir, **load_options(arguments))
        report = found.model.whole_report
    if arguments.json:
        print(json.dumps({"wrote": str(checkpoint), "tensors": report.counts()}, indent=1))
        return
    print(f"{arguments.model}: {report.summary()}")
    print(f"wrote {checkpoint}")


def export_command(arguments: argparse.Namespace) -> None:
    from flamingo_jax.interop.commands import export_model

    files = export_model(arguments.model, arguments.format, arguments.output, **load_options(arguments))
    print(f"wrote {', '.join(map(str, files))}")


def info_command(arguments: argparse.Namespace) -> None:
    from flamingo_jax.interop.commands import info

    about = info(arguments.model, **load_options(arguments))
    if arguments.json:
        print(json.dumps(about, indent=1))
        return
    for key, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:,}" if key == "parameters" else f"{k} {v}" for k, v in value.items())
        print(f"{key:16}{value}")


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `flamingo_jax.load` is told beside the model's name."""
    names = ("language_model", "vision", "norm_tokens", "preprocess", "tokenizer", "allow")
    return {name: value for name in names if (value := getattr(arguments, name))}


def speaker_of(arguments: argparse.Namespace, batch_size: int) -> Any:
    from clip_jax import sharding
    from flamingo_jax.data.prompts import begin
    from flamingo_jax.loading import load
    from flamingo_jax.speaker import Manner, Speaker

    mesh = sharding.make_mesh()
    loaded = load(arguments.model, mesh=mesh, int8=arguments.int8, **load_options(arguments))
    if arguments.command == "score":
        return Speaker(loaded, mesh)
    grammar = begin(loaded.convention).grammar
    template = {"caption": grammar.caption, "answer": grammar.question, "chat": grammar.turn}[arguments.command]
    manner = Manner(
        max_new_tokens=arguments.max_new_tokens, num_beams=arguments.beams, length_penalty=arguments.length_penalty,
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed,
        stop=(*template.stop, *arguments.stop),
    )  # fmt: skip
    return Speaker(loaded, mesh, manner, batch_size)


def opened(speaker: Any, arguments: argparse.Namespace, shots: Sequence[dict[str, Any]], question: str | None) -> Any:
    """A prompt with the shots in it."""
    from flamingo_jax.data.prompts import see

    words = {"caption" if question is None else "question": arguments.prompt}
    prompt = speaker.begin(**words)
    for shot in shots:
        image = see(shot["image"], speaker.loaded.preprocess)
        prompt = prompt.shot(image, shot["answer" if question else "text"], shot.get("question"))
    return prompt


def read_shots(path: Path | None, question: str | None) -> list[dict[str, Any]]:
    """Examples from JSON lines; paths are relative to the file. Raises DataError, naming the line, for a wrong one."""
    if path is None:
        return []
    keys, shots = {"image", "text"} if question is None else {"image", "question", "answer"}, []
    for number, line in numbered_lines(path):
        try:
            shot = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: not JSON ({error})") from None
        if not isinstance(shot, dict) or set(shot) != keys or not all(isinstance(v, str) for v in shot.values()):
            raise DataError(f"{path}: line {number}: expected an object of texts with {', '.join(sorted(keys))}")
        image = path.parent / shot["image"]
        if not is_file(image):
            raise DataError(f"{path}: line {number}: {image}: not found; expected an image")
        shots.append(shot | {"image": image})
    return shots


def read_ahead(where: Sequence[tuple[Any, int]], speaker: Any, threads: int) -> Iterator[list[Any]]:
    """Batches of (key, image), or of a line that says what is wrong with one; the next is read meanwhile."""
    from flamingo_jax.data.prompts import see

    def read(place: tuple[Any, int]) -> Any:
        try:
            key, data = place[0][place[1]]
            return key, see(data, speaker.loaded.preprocess, key)
        except RecordError as error:
            return str(error)

    size = speaker.batch_size
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(read, place) for place in where[:size]]
        for start in range(size, len(where) + size, size):
            done = [future.result() for future in waiting]
            waiting = [pool.submit(read, place) for place in where[start : start + size]]
            yield done


if __name__ == "__main__":
    main()
