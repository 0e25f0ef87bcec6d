"""The page's tabs of Flamingo: one picture, many pictures, a prompt built piece by piece, a chat."""

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from clip_jax.errors import ConfigError, RecordError, UserError
from clip_jax.search import thumbnails
from flamingo_jax.data.documents import END, Media, Part, Text
from flamingo_jax.data.prompts import Prompt
from launch.demonstration import look
from launch.demonstration.answering import Flamingo
from launch.demonstration.uploads import MAX_FILES, Uploads

MAX_PIECES = 64


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a prompt, and how it looks among the others."""

    part: Part
    shown: str


@dataclass(frozen=True, eq=False)
class Talk:
    """A chat so far: all that the model has read, and what the page shows of it."""

    prompt: Prompt | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)


def flamingo_tabs(flamingo: Flamingo, example: Callable[[], Any], question: str) -> None:
    """`question` stands there at the start."""
    # As many may wait; the thread behind `flamingo` answers them together.
    waiting: dict[str, Any] = dict(concurrency_id="flamingo", concurrency_limit=4 * flamingo.batch_size)
    with gr.Tab("Ask", elem_id="ask"):
        ask_tab(flamingo, example, question, waiting)
    with gr.Tab("Caption many", elem_id="many"):
        many_tab(flamingo, waiting)
    with gr.Tab("Few shots", elem_id="few_shots"):
        prompt_tab(flamingo, example, question, waiting)
    with gr.Tab("Chat", elem_id="chat"):
        chat_tab(flamingo, waiting)


def ask_tab(flamingo: Flamingo, example: Callable[[], Any], question: str, waiting: dict[str, Any]) -> None:
    gr.Markdown("What does the picture show? A caption, or the answer to a question, word by word as it comes.")
    with gr.Row():
        with gr.Column():
            picture = look.picture_input(label="Picture")
            other = gr.Button("Show me an example", size="sm")
        with gr.Column():
            asked = gr.Textbox(question, label="Question", max_length=1000)
            with gr.Row():
                answer = gr.Button("Answer", variant="primary", min_width=80)
                caption = gr.Button("Caption", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            said, line = gr.Textbox(label="Flamingo", lines=3, elem_classes="said"), look.line_output()
            read = gr.Textbox(label="What the model reads", lines=2, elem_classes="read")
    grammar = flamingo.begin().grammar

    def caption_of(path: str | None) -> Iterator[tuple[str, str, str]]:
        yield from stream(flamingo, lambda: flamingo.begin().ask(flamingo.see(path)), grammar.caption.stop)

    def answer_to(path: str | None, question: str) -> Iterator[tuple[str, str, str]]:
        def prompt() -> Prompt:
            if not question.strip():
                raise RecordError("no question yet: write one, or take a caption")
            return flamingo.begin().ask(flamingo.see(path), question)

        yield from stream(flamingo, prompt, grammar.question.stop)

    outputs = [said, read, line]
    running = [
        caption.click(caption_of, picture, outputs, api_name="caption", **waiting),
        gr.on([answer.click, asked.submit], answer_to, [picture, asked], outputs, api_name="answer", **waiting),
    ]
    stop.click(None, cancels=running)
    other.click(example, None, picture, api_visibility="private")


def many_tab(flamingo: Flamingo, waiting: dict[str, Any]) -> None:
    gr.Markdown("Several pictures at once, captioned together, or the same question about each.")
    with gr.Row():
        files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=180)
        with gr.Column():
            asked = gr.Textbox(label="Question", info="empty: captions", max_length=1000)
            button = gr.Button("Begin", variant="primary")
            line = look.line_output()
    grid = gr.HTML(elem_classes="found")
    grammar = flamingo.begin().grammar

    def describe(
        paths: list[str] | None, question: str, progress: Any = gr.Progress()  # noqa: B008
    ) -> Iterator[tuple[str, str]]:  # fmt: skip
        wanted, refused, prompts, kept = question.strip() or None, list[UserError](), list[Prompt](), list[str]()
        try:
            if not paths or len(paths) > MAX_FILES:
                raise RecordError(f"{len(paths or [])} pictures: 1 to {MAX_FILES} expected")
            for path in paths:
                try:
                    prompts.append(flamingo.begin().ask(flamingo.see(path), wanted))
                    kept.append(path)
                except RecordError as error:
                    refused.append(error)
            picture = thumbnails(Uploads(kept, flamingo.limits))
            cells = [(picture(i), "<p>…</p>") for i in range(len(kept))]
            lines = "".join(map(look.line, refused))
            yield look.grid(cells), lines
            stop = grammar.question.stop if wanted else grammar.caption.stop
            for done, (i, text) in enumerate(flamingo.ask_all(prompts, stop), 1):
                cells[i] = (cells[i][0], f"<p>{html.escape(text) or '<small>no words</small>'}</p>")
                progress((done, len(cells)), unit="pictures")
                yield look.grid(cells), lines
        except UserError as error:
            yield "", look.line(error)

    gr.on([button.click, asked.submit], describe, [files, asked], [grid, line], api_name="describe", **waiting)


def prompt_tab(flamingo: Flamingo, example: Callable[[], Any], question: str, waiting: dict[str, Any]) -> None:
    gr.Markdown(
        "A prompt of pictures with texts between them, piece by piece: a few examples show the model what is wanted. "
        "The last picture stands without its answer, which is what the model says."
    )
    pieces = gr.State([], time_to_live=3600)
    with gr.Row():
        with gr.Column():
            picture = look.picture_input(label="Picture")
            other = gr.Button("Show me an example", size="sm")
            asked = gr.Textbox(question, label="Question", info="empty: captions", max_length=1000)
            answer = gr.Textbox(label="Answer", info="empty: it is the model's to say", max_length=1000)
            add = gr.Button("Add picture, question and answer", variant="primary")
            with gr.Accordion("Or piece by piece", open=False):
                text = gr.Textbox(label="Text", max_length=2000)
                with gr.Row():
                    add_picture = gr.Button("Add picture", size="sm")
                    add_text = gr.Button("Add text", size="sm")
                    add_end = gr.Button("Add end", size="sm")
        with gr.Column():
            line = look.line_output()

            @gr.render(inputs=[pieces], show_progress="hidden")
            def rows(held: Sequence[Piece]) -> None:
                if not held:
                    gr.HTML("<p class='hint'>Nothing yet: add a picture.</p>")
                for i, piece in enumerate(held):
                    with gr.Row(elem_classes="piece", equal_height=True):
                        gr.HTML(piece.shown, min_width=120)
                        for sign, to in (("↑", i - 1), ("↓", i + 1), ("✕", None)):
                            button = gr.Button(
                                sign, size="sm", scale=0, min_width=36, interactive=to is None or 0 <= to < len(held)
                            )
                            button.click(
                                lambda held, i=i, to=to: moved(held, i, to), pieces, pieces, show_progress="hidden",
                                api_visibility="private",
                            )  # fmt: skip
                if held:
                    gr.Textbox(str(prompt_of(held)), label="What the model reads", lines=3, elem_classes="read")

            with gr.Row():
                go_on = gr.Button("Go on", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
                clear = gr.Button("Clear", min_width=80)
            said = gr.Textbox(label="Flamingo", lines=3, elem_classes="said")

    def prompt_of(held: Sequence[Piece]) -> Prompt:
        return replace(flamingo.begin(), parts=tuple(piece.part for piece in held))

    def shown(part: Part, path: str | None) -> str:
        if isinstance(part, Media):
            return f'<img src="{thumbnails(Uploads([path], flamingo.limits))(0)}" alt="">'
        return f"<code>{html.escape(part.text if isinstance(part, Text) else flamingo.begin().grammar.end)}</code>"

    def adder(parts: Callable[..., Sequence[Part]]) -> Callable[..., tuple[Any, ...]]:
        """Adds parts, made of the picture and texts, and empties what they were made of; or says what is wrong."""

        def with_them(held: Sequence[Piece], path: str | None, *words: str) -> tuple[Any, ...]:
            try:
                new = [Piece(part, shown(part, path)) for part in parts(path, *words)]
                if len(held) + len(new) > MAX_PIECES:
                    raise ConfigError(f"{len(held) + len(new)} pieces: at most {MAX_PIECES} expected")
                kept = None if any(isinstance(piece.part, Media) for piece in new) else path
                return [*held, *new], "", kept, *words[:-1], *[""] * len(words[-1:])
            except UserError as error:
                return held, look.line(error), path, *words

        return with_them

    def one_example(path: str | None, question: str, answer: str) -> Sequence[Part]:
        begun, media, asked = flamingo.begin(), flamingo.see(path), question.strip() or None
        return (begun.shot(media, answer, asked) if answer.strip() else begun.ask(media, asked)).parts

    def one_text(_: str | None, text: str) -> Sequence[Part]:
        if not text:
            raise RecordError("no text yet: write one first")
        return flamingo.begin().text(text).parts

    def go(held: Sequence[Piece]) -> Iterator[tuple[str, str]]:
        def prompt() -> Prompt:
            if not held:
                raise RecordError("no prompt yet: add a picture first")
            return prompt_of(held)

        for text, _, problem in stream(flamingo, prompt, flamingo.begin().grammar.caption.stop):
            yield text, problem

    for button, parts, words, name in (
        (add, one_example, [asked, answer], "add_example"),
        (add_picture, lambda path: [flamingo.see(path)], [], "add_picture"),
        (add_text, one_text, [text], "add_text"),
        (add_end, lambda path: [END], [], "add_end"),
    ):
        button.click(
            adder(parts), [pieces, picture, *words], [pieces, line, picture, *words], show_progress="hidden",
            api_name=name,
        )  # fmt: skip
    clear.click(lambda: ([], "", ""), None, [pieces, line, said], api_visibility="private")
    running = go_on.click(go, pieces, [said, line], api_name="go_on", **waiting)
    stop.click(None, cancels=[running])
    other.click(example, None, picture, api_visibility="private")


def moved(pieces: Sequence[Piece], which: int, to: int | None) -> list[Piece]:
    """With one piece elsewhere, or (`to` None) without it; what is no longer there stays away."""
    if which >= len(pieces):
        return list(pieces)
    rest = [piece for i, piece in enumerate(pieces) if i != which]
    return rest if to is None else [*rest[:to], pieces[which], *rest[to:]]


def chat_tab(flamingo: Flamingo, waiting: dict[str, Any]) -> None:
    talk = gr.State(Talk(), time_to_live=3600)
    window = gr.Chatbot(
        label="Chat", height=420, render_markdown=False, buttons=[], placeholder="Show a picture and ask about it."
    )
    line = look.line_output()
    box = gr.MultimodalTextbox(
        placeholder="A question; pictures by the button, by dropping or pasting them", file_count="multiple",
        file_types=["image"], show_label=False, max_plain_text_length=10_000,
    )  # fmt: skip
    with gr.Row():
        stop = gr.Button("Stop", size="sm")
        forget = gr.Button("Forget everything", size="sm")
    with gr.Accordion("What the model has read", open=False):
        read = gr.Textbox(show_label=False, lines=6, elem_classes="read")

    def answer(typed: dict[str, Any], talk: Talk) -> Iterator[tuple[Any, ...]]:
        words, files = typed["text"].strip(), typed["files"]
        if not words:
            yield talk.messages, talk, "", look.line("write something, too"), typed
            return
        try:
            media = [flamingo.see(path) for path in files]
            asked = (talk.prompt or flamingo.begin()).user(words, *media)
            messages = [*talk.messages, *({"role": "user", "content": {"path": path}} for path in files)]
            messages.append({"role": "user", "content": words})
            text = ""
            yield messages, talk, str(asked), "", None
            for text in flamingo.ask(asked, asked.grammar.turn.stop):
                yield [*messages, {"role": "assistant", "content": text}], talk, str(asked), "", None
            messages.append({"role": "assistant", "content": text or "…"})
            after = asked.said(text)
            yield messages, Talk(after, messages), str(after), "", None
        except UserError as error:
            yield talk.messages, talk, str(talk.prompt or ""), look.line(error), {"text": words, "files": []}

    running = box.submit(answer, [box, talk], [window, talk, read, line, box], api_name="chat", **waiting)
    stop.click(None, cancels=[running])
    gr.on(
        [forget.click, window.clear], lambda: ([], Talk(), "", ""), None, [window, talk, read, line],
        api_visibility="private",
    )  # fmt: skip


def stream(flamingo: Flamingo, prompt: Callable[[], Prompt], stop: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(the answer so far, what the model reads, what is wrong), again and again."""
    try:
        asked = prompt()
        yield "", str(asked), ""
        text = ""
        for text in flamingo.ask(asked, stop):
            yield text, str(asked), ""
        if not text:
            yield "", str(asked), look.line("the model has nothing to say here: its first token is the end")
    except UserError as error:
        yield "", "", look.line(error)
