"""How the page looks: colours, grids of pictures, and the line that says what is wrong. Fonts are the visitor's own."""

import html
from collections.abc import Callable, Iterable
from typing import Any

import gradio as gr

from clip_jax.errors import UserError
from clip_jax.search import Found

CSS = """
.gradio-container { max-width: 1160px !important; width: 100% !important; margin: 0 auto !important; }
.block.line:not(:has(p)), .block.fitting:not(:has(li)) { display: none; }
.block.found { min-height: 5rem; padding: 0; }
.title { padding: 0 !important; } .title h1 { margin: 0; } .title small { opacity: .65; }
.image-frame img { min-height: 150px; object-fit: contain; image-rendering: auto; }
.block.line { padding: .5rem .8rem; border-radius: 8px; background: #d9770622; border: 1px solid #d97706; }
.line p { margin: 0; overflow-wrap: anywhere; }
.grid { list-style: none; margin: 0; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.grid li { margin: 0; padding: .45rem; border: 1px solid #8884; border-radius: 10px; font-size: .78rem;
  overflow-wrap: anywhere; line-height: 1.35; }
.grid img { display: block; width: 100%; height: 110px; object-fit: contain; background: #fff; border-radius: 6px;
  margin-bottom: .35rem; }
.grid b { font-variant-numeric: tabular-nums; } .grid small { opacity: .65; } .grid p { margin: 0; font-size: .95rem; }
.fits { margin: 0; padding-left: 1.4rem; columns: 2; font-size: .9rem; }
.fits li { margin: .1rem 0; } .fits b { font-variant-numeric: tabular-nums; opacity: .65; margin-right: .5rem; }
.piece { align-items: center; margin: -.35rem 0; gap: .4rem !important; border: 1px solid #8884;
  border-radius: 10px; padding: .25rem .5rem; }
.piece img { height: 56px; width: 56px; object-fit: contain; background: #fff; border-radius: 6px; margin: 0; }
.piece code { white-space: pre-wrap; overflow-wrap: anywhere; }
.bubble-wrap button:is([title="Share"], [aria-label="Share"]) { display: none; }
.hint { opacity: .65; }
"""


def theme() -> gr.themes.Base:
    """Without a font that would have to be fetched."""
    return gr.themes.Default(
        primary_hue="emerald", secondary_hue="emerald", neutral_hue="slate",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip


def line(said: UserError | str) -> str:
    """What went wrong, or should be known, as one line; nothing for ""."""
    return f"<p>{html.escape(str(said))}</p>" if str(said) else ""


def grid(cells: Iterable[tuple[str, str]]) -> str:
    """Pictures (data URIs, "" for one that can't be read) with HTML below each."""
    images = ((f'<img src="{html.escape(uri)}" alt="">' if uri else "", below) for uri, below in cells)
    return '<ol class="grid">' + "".join(f"<li>{image}{below}</li>" for image, below in images) + "</ol>"


def pictures(found: Found, picture: Callable[[int], str], count: int) -> str:
    """What was found, best first."""
    rows = list(zip(found.keys, found.indices, found.scores, strict=True))[:count]
    return grid(
        (picture(index), f"<b>{score:.3f}</b> <small>{html.escape(short(key))}</small>") for key, index, score in rows
    )


def texts(found: Found | None, count: float) -> str:
    if found is None:
        return ""
    rows = zip(found.keys[: int(count)], found.scores, strict=False)
    return (
        "<h4>Texts that fit</h4><ol class='fits'>"
        + "".join(f"<li><b>{score:.3f}</b>{html.escape(text)}</li>" for text, score in rows)
        + "</ol>"
    )


def short(key: str) -> str:
    """The name of a file or record without the folders above it, which are nobody's business."""
    return key.encode("utf-8", "replace").decode().rpartition("/")[2]


def picture_input(**options: Any) -> gr.Image:
    """A place for a picture, which hands on where the upload lies, unread.

    Gradio's own way decodes it before anyone has looked at its size.
    """
    image = gr.Image(type="filepath", sources=["upload", "clipboard"], height=260, **options)
    setattr(image, "preprocess", lambda payload: payload and payload.path)  # noqa: B010  (mypy: a method)
    return image


def line_output() -> gr.HTML:
    return gr.HTML(elem_classes="line")
