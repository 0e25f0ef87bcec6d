"""Pages of HTML as documents in the manner of M3W (arXiv 2204.14198, A.3.1): images at their place in the text.

Read by the standard library's parser, which runs nothing and fetches nothing. Three rules remove boilerplate:
elements that are none of the text (DROPPED, hidden ones), elements by the names of their class or id (BOILERPLATE),
and blocks that are links for the most part (as in Kohlschütter et al., "Boilerplate detection using shallow text
features", 2010). Only images in the folder are used.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from clip_jax.data import transforms
from clip_jax.data.sources.records import MAX_IMAGE
from clip_jax.errors import DataError, RecordError
from flamingo_jax.data.documents import Text, with_ends
from flamingo_jax.data.filters import LeftOutError, cut_options, read_options
from flamingo_jax.data.media import Page, Raw
from flamingo_jax.data.shards import inside
from flamingo_jax.data.web import joined, plain


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SUFFIXES = {".html", ".htm", ".xhtml"}
MAX_BYTES, MAX_DEPTH = 1 << 22, 1000  # of a page; a larger or deeper one is none
MAX_TAG = 8192  # characters: the parser's time grows with the square of what is open
OF_ADDRESSES = ("punycode", "idna")  # Python's encodings of names, in time that grows with the square of the length
LINKED = 0.5  # the share of a block's characters in links from which on it is boilerplate
VOID = _words("area base br col embed hr img input link meta param source track wbr")
DROPPED = _words(
    "script style noscript template head title nav header footer aside form button select option textarea iframe frame "
    "frameset object applet canvas svg math audio video map dialog menu"
)
INLINE = _words(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img input ins kbd label mark picture q s samp small "
    "source span strike strong sub sup time tt u var wbr"
)
BOILERPLATE = _words(
    "nav navbar navheader navfooter navigation menu sidebar footer header breadcrumb breadcrumbs cookie cookies banner "
    "advert advertisement ads share social toc pagination pager comments comment popup modal subscribe newsletter "
    "legalnotice"
)
CLOSED_BY = {  # what the start of an element ends, where it is open and innermost
    "li": {"li", "p"}, "dt": {"dt", "dd", "p"}, "dd": {"dt", "dd", "p"}, "td": {"td", "th", "p"},
    "th": {"td", "th", "p"}, "tr": {"td", "th", "tr", "p"},
}  # fmt: skip
ROLES = _words("navigation banner contentinfo search complementary dialog menu menubar toolbar")


@dataclass(frozen=True)
class Limits:
    """What is left out: images of a side under `min_side` or an aspect over `max_aspect` (as the paper: 64, 3), and of
    one colour; pages of fewer characters than `min_text`, of no image or more than `max_images`.
    """

    min_side: int = 64
    max_aspect: float = 3.0
    min_text: int = 100
    max_images: int = 30


@dataclass(frozen=True)
class Source:
    """An image as a page names it."""

    src: str


class HtmlPages:
    """`html:FOLDER?LIMIT=VALUE&…`: the pages in a folder and below, in the order of their paths; see `Limits`."""

    def __init__(self, spec: str):
        where, _, options = cut_options(spec)
        self.limits: Limits = read_options(Limits, options, f"html:{spec}")
        self.folder = Path(where)
        if not self.folder.is_dir():
            raise DataError(f"{where}: no such folder")
        if not self.paths:
            raise DataError(f"{where}: no pages there (expected {', '.join(sorted(SUFFIXES))})")

    @cached_property
    def paths(self) -> list[Path]:
        root = self.folder.resolve()
        found = [path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        return sorted(path for path in found if path.resolve().is_relative_to(root))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Page:
        """Raises LeftOutError for a page that the limits leave out, RecordError for one that can't be read."""
        path = self.paths[index]
        key = str(path)
        parts: list[Raw | Text] = []
        dropped = []
        for part in parse(read_html(path), key):
            if isinstance(part, Text):
                parts.append(part)
                continue
            found = self._image(part.src, path)
            if isinstance(found, str):
                dropped.append(found)
            else:
                parts.append(found)
        parts = joined(parts)
        self._check(parts, key)
        return Page(key, with_ends(parts), dropped)

    def _check(self, parts: Sequence[Raw | Text], key: str) -> None:
        texts = [part.text for part in parts if isinstance(part, Text)]
        images, characters = len(parts) - len(texts), sum(map(len, texts))
        if characters < self.limits.min_text:
            least = self.limits.min_text
            raise LeftOutError(
                f"{key}: {characters} characters of text; at least {least} expected", reason="too_little_text"
            )
        if not images:
            raise LeftOutError(f"{key}: no images left", reason="no_images")
        if images > self.limits.max_images:
            most = self.limits.max_images
            raise LeftOutError(f"{key}: {images} images; at most {most} expected", reason="too_many_images")

    def _image(self, src: str, page: Path) -> Raw | str:
        """The image, or why it is left out."""
        path = self._local(src, page)
        if isinstance(path, str):
            return path
        try:
            if path.stat().st_size > MAX_IMAGE:
                return "too_large"
            data = path.read_bytes()
        except OSError:
            return "not_there"
        if path.suffix.lower() in (".svg", ".svgz") or data[:256].lstrip().startswith((b"<svg", b"<?xml")):
            return "svg"
        try:
            pixels = np.asarray(transforms.decode(data, src))
        except RecordError:
            return "does_not_decode"
        shorter, longer = sorted(pixels.shape[:2])
        if shorter < self.limits.min_side:
            return "too_small"
        if longer > self.limits.max_aspect * shorter:
            return "too_elongated"
        return "of_one_colour" if (pixels == pixels[0, 0]).all() else Raw(data)

    def _local(self, src: str, page: Path) -> Path | str:
        """The file that an address names, which has to be in the folder of all pages, links followed."""
        try:
            address = urlsplit(src.strip())
        except ValueError:
            return "no_address"
        if address.scheme == "data":
            return "data_address"
        if address.netloc or address.scheme in ("http", "https"):
            return "elsewhere"
        if address.scheme or address.path.startswith(("/", "\\")):
            return "outside_the_folder"
        name = unquote(address.path)
        if not name or "\0" in name or "\\" in name:
            return "no_address"
        root = self.folder.resolve()
        try:
            path = (page.parent / name).resolve()
            if not path.is_relative_to(root):
                return "outside_the_folder"
            below = inside(root, str(path.relative_to(root)))
            return below if below is not None and below.is_file() else "not_there"
        except (OSError, RuntimeError):
            return "not_there"


def read_html(path: Path) -> str:
    """Raises RecordError. UTF-8, or what a `charset` in its beginning says; what is wrong of it is U+FFFD."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror})", reason="can_not_be_read") from None
    if len(data) > MAX_BYTES:
        raise RecordError(f"{path}: more than {MAX_BYTES:,} bytes", reason="page_too_large")
    charset = re.search(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", data[:2048])
    name = charset[1].decode("ascii").lower() if charset else "utf-8"
    try:
        return data.decode("utf-8" if name in OF_ADDRESSES else name, "replace")
    except (LookupError, UnicodeError):
        return data.decode("utf-8", "replace")


def parse(html: str, key: str = "page") -> list[Text | Source]:
    """The texts and images of a page in their order, without its boilerplate.

    Raises RecordError for one that is nested too deep.
    """
    reader = _Reader(key)
    try:
        reader.feed(tamed(html))
        reader.close()
    except AssertionError as error:  # what the parser makes of some broken declarations
        raise RecordError(f"{key}: not HTML ({str(error)[:80]})", reason="not_html") from None
    reader.end_block()
    return reader.parts


def tamed(html: str) -> str:
    """HTML without what is no text and can be long (scripts, styles, comments, data in addresses), in which no `<` is
    without its `>`: on others the parser would spend hours. Linear in the length.
    """
    kept, place = [], 0
    while start := _OPENING.search(html, place):
        kept.append(html[place : start.start()])
        end = _ENDS[start[0].lower()].search(html, start.end())
        place = end.end() if end else len(html)
    kept.append(html[place:])
    pieces = re.sub(r"data:[^\"'<>\s]*", "data:", " ".join(kept)).split(">")
    for i, piece in enumerate(pieces[:-1]):
        if (cut := len(piece) - MAX_TAG) > 0:
            pieces[i] = piece[:cut].replace("<", "&lt;") + piece[cut:]
    last = re.sub(r"<[a-zA-Z/!?].*", "", pieces[-1], flags=re.DOTALL)  # a tag that is cut off
    return ">".join([*pieces[:-1], last.replace("<", "&lt;")])


_ENDS = {
    start: re.compile(end, re.IGNORECASE)
    for start, end in {"<!--": "-->", "<script": r"</script\s*>", "<style": r"</style\s*>"}.items()
}
_OPENING = re.compile("|".join(_ENDS), re.IGNORECASE)


class _Reader(HTMLParser):
    """Blocks of text and images; nothing within an element that is left out."""

    def __init__(self, key: str):
        super().__init__(convert_charrefs=True)
        self.parts: list[Text | Source] = []
        self._key = key
        self._open: list[tuple[str, bool]] = []  # (element, whether it is left out, or within one that is)
        self._links = 0  # open ones
        self._block: list[str | Source] = []
        self._characters, self._linked = 0, 0

    @property
    def _skipping(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in INLINE:
            self.end_block()
            while self._open and self._open[-1][0] in CLOSED_BY.get(tag, {"p"}):
                self._open.pop()
        attributes = {name: value or "" for name, value in reversed(attrs)}  # the first of equal names counts
        if tag == "img" and not self._skipping and not _hidden(attributes):
            src = attributes.get("src") or attributes.get("data-src") or ""
            self._block.append(Source(src))
        if tag in VOID:
            return
        if len(self._open) >= MAX_DEPTH:
            raise RecordError(f"{self._key}: more than {MAX_DEPTH} open elements", reason="nested_too_deep")
        self._links += tag == "a"
        self._open.append((tag, self._skipping or tag in DROPPED or _hidden(attributes) or _boilerplate(attributes)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in INLINE:
            self.end_block()
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place][0] == tag:
                self._links -= sum(name == "a" for name, _ in self._open[place:])
                del self._open[place:]
                return

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        self._block.append(data)
        letters = len(data.strip())
        self._characters += letters
        self._linked += letters * bool(self._links)

    def end_block(self) -> None:
        """Takes up the texts and images since the last block, unless the texts are links for the most part."""
        boilerplate = self._characters and self._linked > LINKED * self._characters
        texts: list[str] = []
        for part in [*self._block, None]:
            if isinstance(part, str):
                texts.append(part)
                continue
            text = re.sub(r"\s+", " ", "".join(texts)).strip()
            texts = []
            if text and not boilerplate:
                self.parts.append(Text(plain(text)))
            if part is not None:
                self.parts.append(part)
        self._block = []
        self._characters = self._linked = 0


def _hidden(attributes: dict[str, str]) -> bool:
    style = attributes.get("style", "").replace(" ", "").lower()
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or "display:none" in style
        or "visibility:hidden" in style
    )


def _boilerplate(attributes: dict[str, str]) -> bool:
    names = re.split(r"[\s_-]+", f"{attributes.get('class', '')} {attributes.get('id', '')}".lower())
    return attributes.get("role", "").lower() in ROLES or not BOILERPLATE.isdisjoint(names)
