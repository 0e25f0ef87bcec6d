"""CLIP for several visitors at once: what waits together is embedded together, and each gets an answer or a line.

Dimension letters: B requests, E width, k results.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from clip_jax.data.images import Images, Records, open_images
from clip_jax.embedding import Embedder, EmbeddingFile, Texts, embed_to_file
from clip_jax.errors import ConfigError, RecordError, UserError
from clip_jax.evaluation import prompts, zero_shot
from clip_jax.loading import Loaded
from clip_jax.search import CHUNK, Found, faiss_on_cpu, nearest, search_file, thumbnails
from launch.demonstration.uploads import MAX_FILES, Limits, Uploads

MAX_LABELS = 200
MAX_RESULTS = 48
TEMPLATES = ("openai7", "openai80")
REMEMBERED = 20_000  # embeddings of texts
Value = TypeVar("Value")
Answer: TypeAlias = Value | UserError


class Clip:
    """A loaded CLIP; `spec` names the pictures that are searched (see `open_images`), embedded at the start.

    Args:
      embeddings: what `clip-jax embed` wrote of pictures, instead of `spec`.
      batch_size: how many requests are answered together, and how many pictures are embedded together.
      folder: where the embeddings are kept.

    Raises DataError where there is nothing to search.
    """

    def __init__(
        self, loaded: Loaded, folder: Path, limits: Limits, spec: str, embeddings: Path | None = None,
        batch_size: int = 16,

    ):  # fmt: skip
        self.loaded, self.limits = loaded, limits
        # One picture alone should not pay for a batch.
        self.embedders = [Embedder(loaded, 1), Embedder(loaded, batch_size)]
        self._scale = self.embedders[0].logit_scale()
        self._remembered: dict[str, np.ndarray] = {}
        self._warm_up()
        many = self.embedders[1]
        if embeddings is not None:
            spec = EmbeddingFile(embeddings).metadata.get("source", "")
        self.images = open_images(spec)
        if embeddings is None:
            embeddings = folder / "pictures.safetensors"
            for line in embed_to_file(many, self.images, spec, embeddings):
                logging.warning("left out: %s", line)
        self.pictures, self.picture = EmbeddingFile(embeddings), thumbnails(self.images)
        texts = texts_of(self.images)
        if texts:
            embed_to_file(many, Texts(texts), spec, folder / "texts.safetensors")
        self.texts = EmbeddingFile(folder / "texts.safetensors") if texts else None
        (query,) = many.texts(["a picture"])
        search_file(many, self.pictures, ["a picture"], query[None], 1)  # of this model, or it says so

    def label(
        self, paths: Sequence[str | None], labels: Sequence[str], templates: Sequence[str]
    ) -> list[Answer[dict[str, float]]]:
        """The probability of each visitor's own labels for each one's picture."""
        questions = [_try(_question, *asked) for asked in zip(labels, templates, strict=True)]
        texts = self._texts([_try(lambda q: _value(q).prompts, question) for question in questions])
        pictures = self._pictures(paths)

        def shares(i: int) -> dict[str, float]:
            picture, (names, chosen, _), rows = _value(pictures[i]), _value(questions[i]), _value(texts[i])
            classes = zero_shot.class_embeddings(lambda _: rows, names, chosen)
            top, probabilities = zero_shot.top_probabilities(picture[None], classes, self._scale, len(names))
            return {names[c]: float(p) for c, p in zip(top[0], probabilities[0], strict=True)}

        return [_try(shares, i) for i in range(len(paths))]

    def by_text(self, texts: Sequence[str]) -> list[Answer[Found]]:
        """The pictures that fit each text best, at most `MAX_RESULTS`."""
        return self._search(self.pictures, texts, self._queries(texts))

    def by_picture(self, paths: Sequence[str | None]) -> list[Answer[tuple[Found, Found | None]]]:
        """(the pictures most like each visitor's, the texts that fit it best, where there are texts)."""
        names, queries = [Path(path or "").name for path in paths], self._pictures(paths)
        alike = self._search(self.pictures, names, queries)
        fitting = self._search(self.texts, names, queries) if self.texts else [None] * len(paths)

        def both(one: Answer[Found], other: Answer[Found] | None) -> tuple[Found, Found | None]:
            return _value(one), None if other is None else _value(other)

        return [_try(both, one, other) for one, other in zip(alike, fitting, strict=True)]

    def rerank(
        self, paths: Sequence[str], text: str, progress: Callable[[int], Any] | None = None
    ) -> tuple[Found, list[str]]:
        """(the visitor's pictures by how well they fit the text; a line for each that is left out)."""
        (query,) = map(_value, self._queries([text]))
        if not paths:
            raise RecordError("no pictures yet: choose some first")
        if len(paths) > MAX_FILES:
            raise RecordError(f"{len(paths)} pictures: 1 to {MAX_FILES} expected")
        embeddings, rows, rejected = self._embedder(len(paths)).images(Uploads(paths, self.limits), progress=progress)
        scores = embeddings @ query if rows else np.zeros(0, np.float32)
        order = np.argsort(-scores, kind="stable")
        found = Found(text, [rows[i][0] for i in order], [rows[i][1] for i in order], [float(scores[i]) for i in order])
        return found, rejected

    def _embedder(self, count: int) -> Embedder:
        return next((one for one in self.embedders if count <= one.batch_size), self.embedders[-1])

    def _pictures(self, paths: Sequence[str | None]) -> list[Answer[np.ndarray]]:
        """An embedding [E] for each picture, or why it is refused."""
        embeddings, rows, rejected = self._embedder(len(paths)).images(Uploads(paths, self.limits))
        found: dict[int, Answer[np.ndarray]] = {index: row for (_, index), row in zip(rows, embeddings, strict=True)}
        lines = iter(rejected)  # in the order of the pictures
        return [found[i] if i in found else RecordError(next(lines)) for i in range(len(paths))]

    def _queries(self, texts: Sequence[str]) -> list[Answer[np.ndarray]]:
        return [
            _try(lambda rows: _value(rows)[0], rows) for rows in self._texts([_try(_query, text) for text in texts])
        ]

    def _texts(self, groups: Sequence[Answer[list[str]]]) -> list[Answer[np.ndarray]]:
        """The embeddings [len, E] of each visitor's texts, or what is wrong with them."""
        checked = [_try(self._checked, group) for group in groups]
        every = dict.fromkeys(text for group in checked if not isinstance(group, UserError) for text in group)
        if len(self._remembered) > REMEMBERED:
            self._remembered.clear()
        if new := [text for text in every if text not in self._remembered]:
            self._remembered |= zip(new, self._embedder(len(new)).texts(new), strict=True)
        return [_try(lambda group: np.stack([self._remembered[t] for t in _value(group)]), group) for group in checked]

    def _checked(self, texts: Answer[list[str]]) -> list[str]:
        self.loaded.tokenizer(_value(texts))
        return _value(texts)

    def _search(
        self, file: EmbeddingFile, names: Sequence[str], queries: Sequence[Answer[np.ndarray]]
    ) -> list[Answer[Found]]:
        good = [query for query in queries if not isinstance(query, UserError)]
        results = iter(self._nearest(file, np.stack(good)) if good else [])

        def answer(query: Answer[np.ndarray], name: str) -> Found:
            _value(query)
            scores, rows = next(results)
            keys = [file.key(int(row)) for row in rows]
            return Found(name, keys, file.indices[rows].tolist(), scores.tolist())

        return [_try(answer, query, name) for query, name in zip(queries, names, strict=True)]

    def _nearest(self, file: EmbeddingFile, queries_QxE: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(scores [k], rows [k]) for each query."""
        embedder = self._embedder(len(queries_QxE))
        # As many queries each time as the compiled program has.
        padded = np.pad(queries_QxE, [(0, -len(queries_QxE) % embedder.batch_size), (0, 0)], mode="edge")
        found = nearest(padded, file.chunks(CHUNK), MAX_RESULTS, embedder.mesh, faiss=faiss_on_cpu())
        return list(zip(*found, strict=True))[: len(queries_QxE)]

    def _warm_up(self) -> None:
        """Compiles what visitors would wait for."""
        blank = Image.new("RGB", (8, 8))
        for embedder in self.embedders:
            embedder.images(_Same(blank, embedder.batch_size))
            embedder.texts(["a picture"] * embedder.batch_size)


@dataclass(frozen=True)
class _Same:
    """One picture, several times."""

    image: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return str(index), self.image


class Question(NamedTuple):
    names: list[str]
    templates: Sequence[str]
    prompts: list[str]


def _question(labels: str, template: str) -> Question:
    """Labels with commas or line ends between, each once, in every template. Raises ConfigError for what is wrong."""
    names = list(dict.fromkeys(name.strip() for name in labels.replace("\n", ",").split(",") if name.strip()))
    if not names or len(names) > MAX_LABELS:
        raise ConfigError(f"{len(names)} labels: 1 to {MAX_LABELS} expected, with commas or line ends between them")
    # In a list: a text that names a file here is not read.
    templates = prompts.get_templates(template if template in TEMPLATES else [template or "{}"])
    return Question(names, templates, [one.format(name) for name in names for one in templates])


def _query(text: str) -> list[str]:
    if not text.strip():
        raise RecordError("no text yet: write one first")
    return [text.strip()]


def texts_of(images: Images) -> list[str]:
    """The texts that a data source has for its pictures, each once."""
    if not isinstance(images, Records):
        return []
    found: dict[str, None] = {}
    for i in range(len(images)):
        try:
            pair = images.source[i]
        except RecordError:
            continue
        found |= dict.fromkeys(text for text in pair.captions or (pair.text,) if text.strip())
    return list(found)


def _try(get: Callable[..., Value], *arguments: Any) -> Answer[Value]:
    try:
        return get(*arguments)
    except UserError as error:
        return error


def _value(answer: Answer[Value]) -> Value:
    if isinstance(answer, UserError):
        raise answer
    return answer
