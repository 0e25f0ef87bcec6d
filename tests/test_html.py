"""Pages of HTML as documents: images at their place, no boilerplate, nothing run, fetched or read from elsewhere."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import DataError, RecordError
from flamingo_jax.data import html
from flamingo_jax.data.documents import END, Text
from flamingo_jax.data.filters import LeftOutError
from flamingo_jax.data.html import HtmlPages, Source, parse, read_html
from flamingo_jax.data.pages import open_pages

WORDS = "Some running text that is long enough. "


def said(page: str) -> str:
    """The texts of a page, a line for each, and its images in <>."""
    return "\n".join(f"<{part.src}>" if isinstance(part, Source) else part.text for part in parse(page))


def noise(width: int = 80, height: int = 80, format: str = "png") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<p>one <img src=a.png> two</p><p>three", "one\n<a.png>\ntwo\nthree"),
        ("<p>a<b>b</b>c&amp;d &eacute;\n\n e<br>f", "abc&d é e\nf"),
        ("<img src='1'><img src=2><figcaption>c</figcaption>", "<1>\n<2>\nc"),
        ("<picture><source srcset=x><img data-src=y></picture>", "<y>"),
        ("<title>t</title><script>if (a<b) {'<img src=x>'}</script><style>p {}</style>x", "x"),
        ("<!-- <img src=no> --><noscript><img src=no></noscript><svg><image href=x><text>t</text></svg>x", "x"),
        ("<nav><img src=no>a</nav><div class='main nav-bar'>b</div><div class=navheader>b</div><p>c", "c"),
        ("<div id=footer>a<div>b</div></div>c<p hidden>d</p><p style='display: none'>e</p>f", "c\nf"),
        ("<div role=navigation>a</div><p aria-hidden=true><img src=no></p><img src=no hidden>b", "b"),
        ("<ul><li><a href=x>Home</a><li><a href=y>News</a></ul><p>See <a href=z>it</a>, a text.", "See it, a text."),
        ("<p>a <nav>b</p>c</nav>d", "a\nd"),  # crossing elements
        ("<p>one<p>two" + "<p>x" * 3000, "one\ntwo" + "\nx" * 3000),  # that are never closed
        ("<table><tr><td>a<td>b<tr><td>c" + "<tr><td>x" * 2000, "a\nb\nc" + "\nx" * 2000),
        ("a &lt;image&gt; b", "a   b"),
        ("<p>a</p", "a"),
    ],
)  # fmt: skip
def test_texts_and_images_stand_in_their_order(page: str, expected: str) -> None:
    assert said(page) == expected


def test_hostile_pages_take_no_time() -> None:
    start = time.process_time()
    for piece in (
        "<a ",
        "<!--",
        "<!",
        "<?",
        "</",
        "<a b='",
        "<![CDATA[",
        "&#",
        "<script><",
        "<a b='>",
        "<p>",
        "<img a=b ",
    ):
        try:
            parse(piece * (100_000 // len(piece)))
        except RecordError as error:
            assert error.reason == "nested_too_deep"
    assert time.process_time() - start < 10  # of the parser alone, one of them takes minutes
    with pytest.raises(RecordError, match="^page: more than 1000 open elements$"):
        parse("<div>" * 1001)


def test_an_encoding_whose_time_grows_with_the_square_is_not_used(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_bytes(b"<meta charset=PunyCode><p>plain-" + b"a" * 400_000)
    start = time.process_time()
    assert read_html(page).startswith("<meta charset=PunyCode><p>plain-aaa")
    assert time.process_time() - start < 2  # Python's own decoder of it takes ten times as long


def test_only_images_in_the_folder_that_are_pictures(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(noise())
    (site / "link.png").symlink_to(tmp_path / "secret.png")
    files = {
        "good.png": noise(), "sub/also good.webp": noise(90, format="webp"), "icon.png": noise(16),
        "wide.png": noise(400, 80), "svg.svg": b"<svg/>", "xml.png": b"<?xml ?><svg/>",
        "script.png": b"<script>alert(1)</script>", "cut.png": noise()[:900], "empty.png": b"",
    }  # fmt: skip
    for name, data in files.items():
        (site / name).write_bytes(data)
    Image.new("RGB", (80, 80), "red").save(site / "red.png")
    with (site / "large.png").open("wb") as file:
        file.truncate((1 << 28) + 1)  # of holes: it takes no place
    refused = {
        "large.png": "too_large", "icon.png": "too_small",
        "wide.png": "too_elongated", "red.png": "of_one_colour", "svg.svg": "svg",
        "xml.png": "svg", "script.png": "does_not_decode",
        "cut.png": "does_not_decode", "empty.png": "does_not_decode",
        "none.png": "not_there", "../secret.png": "outside_the_folder", "%2e%2e/secret.png": "outside_the_folder",
        "link.png": "outside_the_folder", "/etc/passwd": "outside_the_folder", "C:\\x.png": "outside_the_folder",
        f"file://{tmp_path}/secret.png": "outside_the_folder", "..\\secret.png": "no_address", "": "no_address",
        "http://example.org/a.png": "elsewhere", "//example.org/a.png": "elsewhere", "http://[": "no_address",
        "data:image/png;base64,iVBORw0KGgo=": "data_address", "javascript:alert(1)": "outside_the_folder",
        "a\0b": "no_address", "x" * 5000: "not_there",
    }  # fmt: skip
    images = "".join(f'<p>{WORDS}<img src="{name}">' for name in refused)
    (site / "a.html").write_text(images + "<img src=good.png>")
    good = f'<img src="../good.png?size=1#top"><p>{WORDS * 9}<img src="also%20good.webp">'
    (site / "sub" / "page.html").write_text(good)
    pages = HtmlPages(str(site))
    assert [raw.where for raw in pages[1].media] == [files["good.png"], files["sub/also good.webp"]]
    page = pages[0]
    assert [raw.where for raw in page.media] == [files["good.png"]]
    assert dict(zip(refused, page.dropped, strict=True)) == refused
    assert page.parts[-1] is END and isinstance(page.parts[0], Text)


def test_pages_that_are_none_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(noise())
    image = "<img src=a.png>"
    pages = {
        "a.html": (image + WORDS * 9, ""),
        "b.htm": (image + "short", "too_little_text"),
        "c.html": (WORDS * 9, "no_images"),
        "d.html": (image * 31 + WORDS * 9, "too_many_images"),
        "e.xhtml": ("<div>" * 2000, "nested_too_deep"),
        "f.html": (" " * (html.MAX_BYTES + 1), "page_too_large"),
    }
    for name, (text, _) in pages.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "g.html").write_bytes(b"<meta charset=latin-1>" + image.encode() + b"caf\xe9 " * 40)
    (tmp_path / "h.html").write_bytes(b"<meta charset=no-such>" + image.encode() + b"caf\xe9 " * 40)
    source = HtmlPages(str(tmp_path))
    for i, (_, reason) in enumerate(pages.values()):
        if reason:
            with pytest.raises(RecordError) as error:
                source[i]
            assert error.value.reason == reason
            assert isinstance(error.value, LeftOutError) == (reason not in ("nested_too_deep", "page_too_large"))
    texts = [part.text for i in (6, 7) for part in source[i].parts if isinstance(part, Text)]
    assert texts == ["café " * 39 + "café", "caf\ufffd " * 39 + "caf\ufffd"]
    assert len(HtmlPages(f"{tmp_path}?max_images=31")[3].media) == 31
    assert HtmlPages(f"{tmp_path}?min_text=5")[1].media
    refilled = open_pages("interleaved", f"html:{tmp_path}")
    assert refilled[2].key in {
        str(tmp_path / name) for name in ("a.html", "g.html", "h.html")
    }  # in the place of c.html
    for spec, message in (
        (f"{tmp_path}/none", "no such folder"),
        (f"{tmp_path}?min_size=3", "option 'min_size': expected one of min_side, "),
        (f"{tmp_path}?min_side=x", "expected a number"),
    ):
        with pytest.raises(DataError, match=message):
            HtmlPages(spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pages there"):
        HtmlPages(f"{tmp_path}/empty")
