"""The page's tabs of CLIP: labels, search, rerank."""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from clip_jax.errors import UserError
from clip_jax.search import Found, thumbnails
from launch.demonstration import look
from launch.demonstration.finding import MAX_RESULTS, TEMPLATES, Answer, Clip
from launch.demonstration.uploads import Uploads

Example = Callable[[], Any]  # a picture of those that are searched
TEMPLATE_CHOICES = [
    ("the label as it is", "{}"),
    ("a photo of a …", "a photo of a {}."),
    ("OpenAI's 7 for ImageNet, averaged", TEMPLATES[0]),
    ("OpenAI's 80 for ImageNet, averaged", TEMPLATES[1]),
]


def clip_tabs(clip: Clip, example: Example, labels: str, query: str) -> None:
    """`labels` and `query` stand there at the start."""
    # Requests that wait for the model are answered together.
    together: dict[str, Any] = dict(
        batch=True, max_batch_size=clip.embedders[-1].batch_size, concurrency_id="clip", concurrency_limit=1
    )
    with gr.Tab("Label", elem_id="label"):
        label_tab(clip, example, labels, together)
    with gr.Tab("Search", elem_id="search"):
        search_tab(clip, example, query, together)
    with gr.Tab("Rerank", elem_id="rerank"):
        rerank_tab(clip, query)


def label_tab(clip: Clip, example: Example, labels: str, together: dict[str, Any]) -> None:
    gr.Markdown("Any labels, in your words: the model says how well each fits the picture. Nothing is trained.")
    with gr.Row():
        with gr.Column():
            picture = look.picture_input(label="Picture")
            other = gr.Button("Show me an example", size="sm")
            names = gr.Textbox(labels, label="Labels", info="one a line, or with commas between", lines=2, max_lines=12)
            template = gr.Dropdown(
                TEMPLATE_CHOICES, value="{}", label="Template", info="choose, or write one with {} for the label",
                allow_custom_value=True,
            )  # fmt: skip
            button = gr.Button("Label it", variant="primary")
        with gr.Column():
            line = look.line_output()
            shares = gr.Label(label="How likely each label is")

    def label(paths: list[str], labels: list[str], templates: list[str]) -> tuple[list[Any], list[str]]:
        answers = clip.label(paths, labels, templates)
        return [None if isinstance(answer, UserError) else answer for answer in answers], lines(answers)

    inputs, outputs = [picture, names, template], [shares, line]
    picture.clear(lambda: (None, ""), None, outputs, show_progress="hidden", api_visibility="private")
    gr.on([button.click, picture.upload], label, inputs, outputs, api_name="label", **together)
    other.click(example, None, picture, api_visibility="private").then(
        label, inputs, outputs, api_visibility="private", **together
    )


def search_tab(clip: Clip, example: Example, query: str, together: dict[str, Any]) -> None:
    gr.Markdown(f"Finds among **{len(clip.pictures):,} pictures**; every one is compared.")
    with gr.Row():
        with gr.Column(scale=2):
            text = gr.Textbox(query, label="Find pictures by a text", max_length=1000)
            button = gr.Button("Find", variant="primary")
            count = gr.Slider(4, MAX_RESULTS, 12, step=4, label="Results")
        with gr.Column(scale=1):
            picture = look.picture_input(label="… or by a picture")
            other = gr.Button("Show me an example", size="sm")
    line, fitting, grid = look.line_output(), gr.HTML(elem_classes="fitting"), gr.HTML(elem_classes="found")

    def by_text(texts: list[str], counts: list[float]) -> tuple[list[str], list[str], list[str]]:
        answers = clip.by_text(texts)
        return lines(answers), [""] * len(answers), list(map(shown, answers, counts))

    def by_picture(paths: list[str], counts: list[float]) -> tuple[list[str], list[str], list[str]]:
        answers = clip.by_picture(paths)
        alike = [answer if isinstance(answer, UserError) else answer[0] for answer in answers]
        fitting = [None if isinstance(answer, UserError) else answer[1] for answer in answers]
        return lines(answers), list(map(look.texts, fitting, counts)), list(map(shown, alike, counts))

    def shown(answer: Answer[Found], count: float) -> str:
        return "" if isinstance(answer, UserError) else look.pictures(answer, clip.picture, int(count))

    outputs = [line, fitting, grid]
    gr.on([button.click, text.submit], by_text, [text, count], outputs, api_name="search_by_text", **together)
    picture.upload(by_picture, [picture, count], outputs, api_name="search_by_picture", **together)
    other.click(example, None, picture, api_visibility="private").then(
        by_picture, [picture, count], outputs, api_visibility="private", **together
    )


def rerank_tab(clip: Clip, query: str) -> None:
    gr.Markdown("Orders your own pictures by how well they fit a text.")
    with gr.Row():
        with gr.Column():
            files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=200)
        with gr.Column():
            text = gr.Textbox(query, label="Text", max_length=1000)
            button = gr.Button("Order them", variant="primary")
            line = look.line_output()
    grid = gr.HTML(elem_classes="found")

    def rerank(paths: list[str] | None, text: str, progress: Any = gr.Progress()) -> tuple[str, str]:  # noqa: B008
        paths, done = paths or [], 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            progress((done, len(paths)), unit="pictures")

        try:
            found, rejected = clip.rerank(paths, text, advance)
        except UserError as error:
            return look.line(error), ""
        picture = thumbnails(Uploads(paths, clip.limits))
        return "".join(map(look.line, rejected)), look.pictures(found, picture, len(paths))

    gr.on(
        [button.click, text.submit], rerank, [files, text], [line, grid], concurrency_id="clip", concurrency_limit=1,
        api_name="rerank",
    )  # fmt: skip


def lines(answers: Sequence[Answer[Any]]) -> list[str]:
    """For each visitor what is wrong, or nothing."""
    return [look.line(answer) if isinstance(answer, UserError) else "" for answer in answers]
