"""`inspect`: a page of HTML about a data set: samples, sizes, aspects, lengths of texts, and what fails, by reason.

The page needs nothing beside it and runs nothing: pictures are made anew from decoded pixels, texts are escaped.
"""

import argparse
import base64
import hashlib
import io
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clip_jax.errors import ConfigError, RecordError
from launch.preparing import Outcome

THUMBNAIL = 176  # pixels, of the longer side
SHOWN_TEXT = 600  # characters of a text
EXAMPLES = 3  # of a reason


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="a page of HTML: samples of a data set, its figures, what fails in it")
    parser.add_argument("spec", metavar="SPEC", help="a data source, or a source of clips, pages or chats")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("-n", "--records", type=int, default=100, help="how many are drawn and read (default: 100)")
    parser.add_argument("--kind", help="pairs, clips, interleaved or chats; as a rule SPEC says it")
    parser.add_argument("--shown", type=int, default=60, help="how many of them the page shows (default: 60)")
    parser.add_argument("--frames", type=int, default=8, help="of a clip, one a second, as in training (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Outcome:
    from clip_jax.files import write_atomically

    if arguments.records < 1 or arguments.shown < 0 or arguments.frames < 1:
        raise ConfigError("inspect: expected at least one record and one frame, and none or more shown")
    if not arguments.output.parent.is_dir():
        raise ConfigError(f"{arguments.output.parent}: no such folder")
    kind = arguments.kind or kind_of(arguments.spec)
    findings = look(kind, arguments.spec, arguments.records, arguments.shown, arguments.frames, arguments.seed)
    write_atomically(arguments.output, page(findings))
    size = arguments.output.stat().st_size
    damaged, left_out = findings.of_kind("damaged"), findings.of_kind("left out")
    lines = [
        f"wrote {arguments.output} ({size / 1e6:.1f} MB): {findings.read:,} of {findings.records:,} records",
        f"{findings.sound:,} sound, {damaged} damaged, {left_out} left out",
        *(f"  {one.kind}: {one.words} {one.count:,} (first: {one.examples[0]})" for one in findings.reasons),
    ]
    figures = {"records": findings.records, "read": findings.read, "sound": findings.sound, "damaged": damaged}
    return Outcome(
        "\n".join(lines), figures | {"left_out": left_out, "reasons": [asdict(one) for one in findings.reasons]}
    )


def kind_of(spec: str) -> str:
    """The kind whose sources a spec is one of. Raises ConfigError where it may be of several."""
    from clip_jax.data.sources import SOURCES
    from flamingo_jax.data.pages import PAGES

    name = spec.partition(":")[0]
    kinds = [kind for kind, formats in (PAGES | {"pairs": SOURCES}).items() if name in formats]
    if len(kinds) > 1:
        raise ConfigError(f"{spec}: is it {', '.join(kinds[:-1])} or {kinds[-1]}? --kind says it")
    return kinds[0] if kinds else "pairs"


@dataclass
class Reason:
    """Why records failed: "damaged", or "left out" by a filter; or an image of a page, "image left out"."""

    kind: str
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        return self.reason.replace("_", " ")


@dataclass(frozen=True)
class Shown:
    """A sample: pieces are texts, and pictures as {uri, title}, clips with several; in their order."""

    key: str
    pieces: Sequence[str | Mapping[str, Any]]
    note: str = ""


@dataclass
class Findings:
    """What was found in the records that were read. Sizes are of images, or of a clip's frames, in pixels."""

    spec: str
    kind: str
    records: int
    read: int = 0
    sound: int = 0
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # bytes, encoded
    characters: list[int] = field(default_factory=list)  # of a record
    words: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # of a record
    formats: Counter[str] = field(default_factory=Counter)
    shown: list[Shown] = field(default_factory=list)
    failures: dict[tuple[str, str], Reason] = field(default_factory=dict)
    repeated: Counter[str] = field(default_factory=Counter)  # "images", "texts": seen before in this sample

    @property
    def reasons(self) -> list[Reason]:
        order = ("damaged", "left out", "image left out")
        return sorted(self.failures.values(), key=lambda found: (order.index(found.kind), -found.count, found.reason))

    def of_kind(self, kind: str) -> int:
        return sum(reason.count for reason in self.failures.values() if reason.kind == kind)

    def count(self, kind: str, reason: str, example: str) -> None:
        found = self.failures.setdefault((kind, reason), Reason(kind, reason))
        found.count += 1
        if len(found.examples) < EXAMPLES and example[:300] not in found.examples:
            found.examples.append(example[:300])


def look(kind: str, spec: str, records: int, shown: int, frames: int, seed: int) -> Findings:
    """Reads `records` that a keyed permutation draws; filters leave out, and replace nothing.

    Raises what opening the source raises; of records everything is counted.
    """
    from tqdm import tqdm

    from clip_jax.data.order import permute
    from flamingo_jax.data.filters import LeftOutError, Refilled
    from flamingo_jax.data.pages import open_pages

    source = open_pages(kind, spec)
    source = source.source if isinstance(source, Refilled) else source
    findings = Findings(spec, kind, len(source))
    drawn = sorted(permute(i, len(source), seed) for i in range(min(records, len(source))))
    seen: set[tuple[str, bytes]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of files that decode
        for index in tqdm(drawn, desc="inspect", unit="record", dynamic_ncols=True, disable=None):
            findings.read += 1
            try:
                _look_at(source[index], frames, findings, seen, len(findings.shown) < shown)
            except LeftOutError as error:
                findings.count("left out", error.reason, str(error))
            except RecordError as error:
                findings.count("damaged", error.reason, str(error))
    return findings


def _look_at(page: Any, frames: int, findings: Findings, seen: set[tuple[str, bytes]], show: bool) -> None:
    from flamingo_jax.data.documents import Text
    from flamingo_jax.data.media import Raw, decode

    pieces: list[str | Mapping[str, Any]] = []
    texts, images = [], []
    for part in page.parts:
        if isinstance(part, Text):
            texts.append(part.text)
            pieces.append(clipped(part.text))
        elif isinstance(part, Raw):
            data = part.read(page.key)
            pictures, form = decode(part, frames, page.key), format_of(part, data)
            width, height = pictures[0].size
            images.append((width, height, len(data), form, hashlib.sha256(data).digest()))
            title = f"{width}×{height} {form}, {amount(len(data))}" + (
                f", {len(pictures)} frames" if len(pictures) > 1 else ""
            )
            pieces.append({"uris": [thumbnail(p) for p in pictures] if show else [], "title": title})
    for reason in page.dropped:
        findings.count("image left out", reason, page.key)
    for width, height, size, form, _ in images:  # from here on the record is sound
        findings.widths.append(width)
        findings.heights.append(height)
        findings.sizes.append(size)
        findings.formats[form] += 1
    text = "\n".join(texts)
    findings.sound += 1
    findings.images.append(len(images))
    findings.characters.append(sum(map(len, texts)))
    findings.words.append(len(text.split()))
    for what, digests in (("images", [i[-1] for i in images]), ("texts", [hashlib.sha256(text.encode()).digest()])):
        for digest in digests:
            findings.repeated[what] += (what, digest) in seen
            seen.add((what, digest))
    if show:
        note = f"{len(page.dropped)} images left out" if page.dropped else ""
        findings.shown.append(Shown(page.key, pieces, note))


def format_of(raw: Any, data: bytes) -> str:
    from PIL import Image

    if raw.is_video:
        return Path(raw.path).suffix[1:].upper()
    with Image.open(io.BytesIO(data)) as image:
        return image.format or "image"


def clipped(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} … ({len(text):,} characters)"


def thumbnail(image: Any) -> str:
    """A small picture as a data URI, encoded anew."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "webp", quality=80)
    return data_uri(file.getvalue(), "webp")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def amount(size: float) -> str:
    """Bytes in words of three digits."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


def short(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def page(findings: Findings) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("inspect.html.j2")
    return template.render(f=findings, table=table(findings), histograms=histograms(findings))


def table(findings: Findings) -> list[tuple[str, list[str]]]:
    """Of each figure its smallest, 5 %, median, 95 % and largest value."""
    aspects = [w / h for w, h in zip(findings.widths, findings.heights, strict=True)]
    rows: list[tuple[str, Sequence[float], Any]] = [
        ("image width, pixels", findings.widths, "{:,.0f}".format),
        ("image height, pixels", findings.heights, "{:,.0f}".format),
        ("width / height", aspects, "{:.2f}".format),
        ("image, encoded", findings.sizes, amount),
        ("text, characters", findings.characters, "{:,.0f}".format),
        ("text, words", findings.words, "{:,.0f}".format),
    ]
    if findings.kind != "pairs":
        rows.append(("images a record", findings.images, "{:,.0f}".format))
    found = []
    for title, values, written in rows:
        if values:
            cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
            found.append((title, [written(v) for v in (min(values), cuts[0], cuts[9], cuts[18], max(values))]))
    return found


def histograms(findings: Findings) -> str:
    """Sizes, aspects, encoded sizes and lengths of texts, as one SVG in a data URI; "" where nothing was sound."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    aspects = [w / h for w, h in zip(findings.widths, findings.heights, strict=True)]
    shorter = [min(w, h) for w, h in zip(findings.widths, findings.heights, strict=True)]
    drawn: list[tuple[str, Sequence[float], bool]] = [
        ("shorter side, pixels", shorter, True),
        ("width / height", aspects, True),
        ("image, bytes", findings.sizes, True),
        ("text, characters", findings.characters, True),
    ]
    if findings.kind != "pairs":
        drawn.append(("images a record", findings.images, False))
    drawn = [(title, [v for v in values if v > 0 or not log], log) for title, values, log in drawn]
    drawn = [entry for entry in drawn if entry[1]]
    if not drawn:
        return ""
    figure = Figure(figsize=(2.6 * len(drawn), 2.4), layout="constrained")
    for place, (title, values, log) in enumerate(drawn, 1):
        ax = figure.add_subplot(1, len(drawn), place)
        low, high = min(values), max(values)
        if log:
            low, high = (low, high) if high > 1.2 * low else (low / 1.5, high * 1.5)  # of one value, a bar
            bins = np.geomspace(low, high, 25)
            ax.set_xscale("log")
        else:
            bins = np.arange(low - 0.5, high + 1) if high - low < 60 else np.linspace(low, high, 25)
        ax.hist(values, bins=bins.tolist(), color="#2a6f9d")
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        if log:
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 100 * low else (1.0,)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            ax.xaxis.set_minor_formatter(NullFormatter())
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "svg+xml")
