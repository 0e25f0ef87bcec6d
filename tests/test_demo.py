"""The demo's server as its visitors meet it: answers beside the models applied directly, and what it refuses."""

import asyncio
import html
import http.client
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import gradio_client  # type: ignore[import-untyped]
import httpx
import jax
import numpy as np
import pytest
from PIL import Image
from runs import write_run
from test_cli import direct, direct_text
from test_flamingo_cli import directly, ours  # noqa: F401  (a fixture)

from clip_jax import sharding
from clip_jax.errors import ConfigError, RecordError
from clip_jax.loading import Loaded, load
from clip_jax.training.clip_task import ClipTask
from configs.clip import quickstart
from launch import demo
from launch.demonstration import page
from launch.demonstration.flamingo_tabs import moved
from launch.demonstration.uploads import MAX_FILES, Guard, Limits

COLOURS = ["red", "lime", "blue", "white", "black", "yellow"]
HOSTILE = {
    "svg.png": "svg.png: no picture; PNG, JPEG, WEBP, GIF, BMP or AVIF expected",
    "text.png": "text.png: no picture; PNG, JPEG, WEBP, GIF, BMP or AVIF expected",
    "postscript.png": "postscript.png: no picture; PNG, JPEG, WEBP, GIF, BMP or AVIF expected",
    "wide.png": "wide.png: 5,000×5,000 pixels; at most 1,000,000 in all expected",
    "bomb.png": "bomb.png: far too many pixels; at most 1,000,000 expected",
    "cut.png": "cut.png: the image does not decode",
}


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels, all of them black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    pixels = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 images to search, and beside them a folder of what nobody should send."""
    directory, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (directory / "good").mkdir()
    (directory / "bad").mkdir()
    for i, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40 + 7 * i, 50), colour)
        image.paste(Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)), (3 * i, i))
        image.save(directory / "good" / f"{colour}.png")
    good = (directory / "good" / "red.png").read_bytes()
    for name, data in {
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "text.png": b"no picture",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        "wide.png": png(5000, 5000),
        "bomb.png": png(50_000, 10_000),
        "cut.png": good[: len(good) // 2],
        "large.png": good + bytes(2**20),
    }.items():
        (directory / "bad" / name).write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = quickstart.get_config("debug")
    workdir = tmp_path_factory.mktemp("clip")
    write_run(workdir, config, ClipTask(config, sharding.make_mesh()))
    return workdir


@pytest.fixture(scope="module")
def served(
    clip_run: Path,
    ours: Path,  # noqa: F811
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[demo.Served]:
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", lambda: mesh)
        folder = tmp_path_factory.mktemp("served")
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        line = (
            f"--clip {clip_run} --flamingo {ours} --images {pictures}/good --port {port} --max-upload 1 --max-pixels 1"
        )
        sizes = [
            "--batch-size",
            "4",
            "--talk-together",
            "2",
            "--max-new-tokens",
            "4",
            "--max-upload",
            "1",
            "--max-pixels",
            "1",
        ]
        arguments = demo.parser().parse_args([*line.split(), *sizes])
        found = demo.start(arguments, folder)
        yield found
        found.page.close(verbose=False)


@pytest.fixture(scope="module")
def loaded(clip_run: Path) -> Loaded:
    return load(clip_run)


@pytest.fixture(scope="module")
def visitor(served: demo.Served) -> gradio_client.Client:
    return visit(served)


def visit(served: demo.Served) -> gradio_client.Client:
    return gradio_client.Client(served.address, verbose=False, analytics_enabled=False)


def sent(path: Path) -> Any:
    return gradio_client.handle_file(str(path))


def shares(answer: Any) -> dict[str, float]:
    return {entry["label"]: entry["confidence"] for entry in answer["confidences"]}


def expected_shares(loaded: Loaded, path: Path, texts: dict[str, str]) -> dict[str, float]:
    """The softmax of scaled cosines, in float64."""
    (image,) = direct(loaded, [path]).astype(np.float64)
    scale = float(np.exp(np.asarray(loaded.params["params"]["logit_scale"], np.float64)))
    logits = [scale * image @ direct_text(loaded, text) for text in texts.values()]
    total = np.logaddexp.reduce(logits)
    return {label: float(np.exp(logit - total)) for label, logit in zip(texts, logits, strict=True)}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def captioned(served: demo.Served, path: Path) -> str:
    """One at a time, so that the model's logits are compiled for one shape."""
    return directly(served.flamingo.speaker.loaded, [[path]], "Output:")[0]


class Held:
    """A function that waits at its first call, so that what comes meanwhile must wait."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.sizes, self.entered, self.go = function, list[int](), threading.Event(), threading.Event()

    def __call__(self, rows: Any, *more: Any) -> Any:
        self.sizes.append(len(rows))
        self.entered.set()
        assert self.go.wait(120)
        return self.function(rows, *more)


def test_visitors_at_once_are_answered_together_and_each_rightly(
    served: demo.Served, loaded: Loaded, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(served.clip.label)
    monkeypatch.setattr(served.clip, "label", held)
    asked = [
        (pictures / "good" / "red.png", "a cat, a dog", "{}"),
        (pictures / "good" / "blue.png", "red\nblue\nthe sun", "a photo of a {}."),
        (pictures / "bad" / "text.png", "red, blue", "{}"),
        (pictures / "good" / "lime.png", "", "{}"),
        (pictures / "good" / "white.png", "red, blue", "no place"),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        jobs = []
        for path, *texts in asked:
            jobs.append(pool.submit(visit(served).predict, sent(path), *texts, api_name="/label"))
            assert held.entered.wait(60)
        until(lambda: len(served.page._queue.event_queue_per_concurrency_id["clip"].queue) == 4)
        held.go.set()
        answers = [job.result(60) for job in jobs]
    assert held.sizes == [1, 4]
    for (path, labels, template), (answer, line) in zip(asked[:2], answers[:2], strict=True):
        names = [name.strip() for name in re.split("[,\n]", labels)]
        expected = expected_shares(loaded, path, {name: template.replace("{}", name) for name in names})
        found = shares(answer)
        assert line == "" and found.keys() == expected.keys()
        assert all(abs(found[name] - expected[name]) < 1e-4 for name in names)
    lines = [line for _, line in answers[2:]]
    assert HOSTILE["text.png"] in lines[0] and "0 labels: 1 to 200 expected" in lines[1]
    assert "template &#x27;no place&#x27;: expected exactly one {}" in lines[2]


def test_searches_find_what_is_nearest(visitor: gradio_client.Client, loaded: Loaded, pictures: Path) -> None:
    paths = sorted((pictures / "good").iterdir())
    rows = direct(loaded, paths)
    line, _, grid = visitor.predict("a red apple", 4, api_name="/search_by_text")
    order = np.argsort(-(rows @ direct_text(loaded, "a red apple")), kind="stable")[:4]
    assert line == "" and re.findall(r"<small>(.*?)</small>", grid) == [paths[i].name for i in order]
    assert grid.count('src="data:image/webp;base64,') == 4 and str(pictures) not in grid
    line, _, grid = visitor.predict(sent(paths[2]), 6, api_name="/search_by_picture")
    order = np.argsort(-(rows @ rows[2]), kind="stable")
    assert line == "" and re.findall(r"<small>(.*?)</small>", grid) == [paths[i].name for i in order]
    assert "<b>1.000</b>" in grid
    assert visitor.predict(" ", 4, api_name="/search_by_text")[0] == "<p>no text yet: write one first</p>"


def test_own_pictures_are_reranked_and_the_bad_named(
    visitor: gradio_client.Client, loaded: Loaded, pictures: Path
) -> None:
    paths = [pictures / "good" / f"{colour}.png" for colour in COLOURS[:3]]
    mixed = [paths[0], pictures / "bad" / "bomb.png", *paths[1:]]
    line, grid = visitor.predict([sent(path) for path in mixed], "a dog", api_name="/rerank")
    order = np.argsort(-(direct(loaded, paths) @ direct_text(loaded, "a dog")), kind="stable")
    assert re.findall(r"<small>(.*?)</small>", grid) == [paths[i].name for i in order]
    assert line == f"<p>{HOSTILE['bomb.png']}</p>"
    many = [sent(paths[0])] * (MAX_FILES + 1)
    assert visitor.predict(many, "a dog", api_name="/rerank") == ("<p>65 pictures: 1 to 64 expected</p>", "")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_refused_in_one_line(name: str, visitor: gradio_client.Client, pictures: Path) -> None:
    answer, line = visitor.predict(sent(pictures / "bad" / name), "a, b", "{}", api_name="/label")
    assert not answer and line.startswith(f"<p>{HOSTILE[name]}") and line.count("<p>") == 1
    said, read, line = visitor.predict(sent(pictures / "bad" / name), api_name="/caption")
    assert (said, read) == ("", "") and line.startswith(f"<p>{HOSTILE[name]}")


def test_a_file_too_large_is_refused_at_the_door_and_behind_it(served: demo.Served, pictures: Path) -> None:
    large = pictures / "bad" / "large.png"
    reply = httpx.post(f"{served.address}gradio_api/upload", files={"files": (large.name, large.read_bytes())})
    assert reply.status_code == 413
    with pytest.raises(RecordError, match=re.escape("large.png: 1.0 MiB; at most 1 MiB expected")):
        Limits(2**20, 10**6).read(str(large))
    asked = http.client.HTTPConnection(urlsplit(served.address).netloc)
    asked.putrequest("POST", "/gradio_api/upload")
    asked.putheader("Content-Type", "multipart/form-data; boundary=x")
    asked.putheader("Content-Length", str(2**30))
    asked.endheaders()
    assert asked.getresponse().status == 403  # before any of it is read
    asked.close()
    assert httpx.post(f"{served.address}gradio_api/queue/join", content=b"[" * 2**21).status_code == 403


def test_a_request_in_chunks_is_refused_whatever_length_it_claims(tmp_path: Path) -> None:
    said: list[Any] = []

    async def unreached(*_: Any) -> Any:
        raise AssertionError("read or passed on")

    async def send(message: Any) -> None:
        said.append(message)

    for kind in (b"application/json", b"multipart/form-data; boundary=x"):
        headers = [(b"content-type", kind), (b"content-length", b"2"), (b"transfer-encoding", b"chunked")]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": headers}
        asyncio.run(Guard(unreached, tmp_path, Limits())(scope, unreached, send))
    assert [message["status"] for message in said if "status" in message] == [403, 403]


def test_no_file_of_the_server_can_be_read(served: demo.Served, pictures: Path) -> None:
    own = Path(demo.__file__).resolve()
    searched = pictures / "good" / "red.png"
    root = httpx.Client(base_url=served.address)
    for path in (
        "/etc/passwd",
        str(own),
        "launch/demo.py",
        str(searched),
        "../../../../etc/passwd",
        "/proc/self/environ",
    ):
        for written in (path, path.replace("/", "%2F"), path.replace("/", "/./")):
            for route in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/proxy=", "static/", "assets/"):
                reply = root.get(f"/{route}{written}")
                assert reply.status_code in (403, 404), (route, written, reply.status_code)
    assert root.get("/gradio_api/file=http://127.0.0.1:1/x").status_code == 403
    assert root.get("/gradio_api/proxy=https://example.com/").status_code == 403
    for named in ({"path": "/etc/passwd"}, {"path": str(searched)}, {"path": "http://127.0.0.1:1/x.png"},
                  {"path": "x.png", "url": "http://127.0.0.1:1/x.png"}):  # fmt: skip
        data = [{**named, "meta": {"_type": "gradio.FileData"}}, "a, b", "{}"]
        for route in ("gradio_api/call/label", "gradio_api/run/label", "gradio_api/queue/join"):
            reply = root.post(f"/{route}", json={"data": data, "fn_index": 0, "session_hash": "x"})
            assert reply.status_code == 403 and "is no uploaded file" in reply.text, (named, route)


def test_what_was_uploaded_is_shown_and_the_page_may_load_nothing_from_elsewhere(
    served: demo.Served, pictures: Path
) -> None:
    data = (pictures / "good" / "red.png").read_bytes()
    (path,) = httpx.post(f"{served.address}gradio_api/upload", files={"files": ("red.png", data)}).json()
    assert httpx.get(f"{served.address}gradio_api/file={path}").content == data
    page = httpx.get(served.address)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(f"{served.address}config").json()["analytics_enabled"] is False
    assert str(pictures) not in page.text and str(Path.cwd()) not in page.text


def test_a_template_that_names_a_file_is_not_read(visitor: gradio_client.Client, pictures: Path) -> None:
    _, line = visitor.predict(sent(pictures / "good" / "red.png"), "a, b", "/etc/passwd", api_name="/label")
    assert line == "<p>template &#x27;/etc/passwd&#x27;: expected exactly one {}, for the name</p>"


def test_an_answer_comes_in_pieces_and_is_the_models(
    served: demo.Served, visitor: gradio_client.Client, pictures: Path
) -> None:
    path = pictures / "good" / "red.png"
    expected = directly(served.flamingo.speaker.loaded, [[path]], "Question: what now? Answer:")[0]
    job = visitor.submit(sent(path), "what now?", api_name="/answer")
    said, read, line = job.result(60)
    assert (said, read, line) == (expected, "<image>Question: what now? Answer:", "")
    texts = [said for said, _, _ in job.outputs()]
    assert len(set(texts)) > 2 and all(expected.startswith(text) for text in texts)
    assert visitor.predict(sent(path), " ", api_name="/answer")[2].startswith("<p>no question yet")


def test_prompts_that_wait_are_answered_together_and_each_rightly(
    served: demo.Served, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is held; of four that come meanwhile two and two are answered at once."""
    flamingo = served.flamingo
    held = Held(flamingo._answer)
    monkeypatch.setattr(flamingo, "_answer", held)
    paths = [pictures / "good" / f"{colour}.png" for colour in COLOURS[:5]]
    expected = [captioned(served, path) for path in paths]
    with ThreadPoolExecutor(len(paths)) as pool:
        jobs = []
        for path in paths:
            jobs.append(pool.submit(visit(served).predict, sent(path), api_name="/caption"))
            assert held.entered.wait(60)
        until(lambda: len(flamingo._waiting) == 4)
        held.go.set()
        assert [job.result(60)[0] for job in jobs] == expected
    assert held.sizes == [1, 2, 2] and len(set(expected)) > 1


def test_many_pictures_are_captioned_and_the_bad_named(
    served: demo.Served, visitor: gradio_client.Client, pictures: Path
) -> None:
    paths = [pictures / "good" / f"{colour}.png" for colour in COLOURS[:3]]
    expected = [captioned(served, path) for path in paths]
    files = [sent(path) for path in [*paths[:2], pictures / "bad" / "svg.png", paths[2]]]
    grid, line = visitor.predict(files, "", api_name="/describe")
    assert re.findall("<p>(.*?)</p>", grid) == [html.escape(text) or "<small>no words</small>" for text in expected]
    assert line == f"<p>{HOSTILE['svg.png']}</p>"


def test_a_prompt_is_built_piece_by_piece(served: demo.Served, visitor: gradio_client.Client, pictures: Path) -> None:
    one, two = (pictures / "good" / f"{colour}.png" for colour in COLOURS[:2])
    assert visitor.predict(api_name="/go_on") == ("", "<p>no prompt yet: add a picture first</p>")
    visitor.predict(sent(one), "what?", "red", api_name="/add_example")
    visitor.predict(sent(two), api_name="/add_picture")
    assert visitor.predict(None, "an <image>", api_name="/add_text")[0] == (
        "<p>the text &#x27;an &lt;image&gt;&#x27; holds &lt;image&gt;, which only the prompt itself may write</p>"
    )
    visitor.predict(None, "Question: so? Answer:", api_name="/add_text")
    said, line = visitor.predict(api_name="/go_on")
    texts = ["Question: what? Answer: red", "Question: so? Answer:"]
    assert (said, line) == (directly(served.flamingo.speaker.loaded, [[one, two]], *texts)[0], "")
    assert visit(served).predict(api_name="/go_on")[1].startswith("<p>no prompt yet")  # another's is not this one's


def test_pieces_move_and_go() -> None:
    pieces: Any = ["a", "b", "c"]
    assert moved(pieces, 0, 1) == ["b", "a", "c"] and moved(pieces, 2, 1) == ["a", "c", "b"]
    assert moved(pieces, 1, None) == ["a", "c"] and moved(pieces, 3, None) == pieces


def test_a_chat_keeps_its_history_and_refuses_by_a_line(
    served: demo.Served, visitor: gradio_client.Client, pictures: Path
) -> None:
    one = pictures / "good" / "red.png"
    _, read, line, _ = visitor.predict({"text": "what?", "files": [sent(one)]}, api_name="/chat")
    first = directly(served.flamingo.speaker.loaded, [[one]], "Question: what? Answer:")[0]
    assert (read, line) == (f"<image>Question: what? Answer: {first}<EOC>", "")
    bad = {"text": "and?", "files": [sent(pictures / "bad" / "cut.png")]}
    _, after, line, _ = visitor.predict(bad, api_name="/chat")
    assert after == read and line.startswith(f"<p>{HOSTILE['cut.png']}")
    messages, read, _, _ = visitor.predict({"text": "so?", "files": []}, api_name="/chat")
    assert read.startswith(f"<image>Question: what? Answer: {first}<EOC>Question: so? Answer: ")
    assert [message["role"] for message in messages] == ["user", "user", "assistant", "user", "assistant"]
    long = {"text": "so? " * 600, "files": []}
    assert (
        "at most 1024 and 16 expected: forget the chat, or take pieces away"
        in visitor.predict(long, api_name="/chat")[2]
    )


def test_what_the_command_lacks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="nothing is trained in runs/quickstart/clip.*`make quickstart` does it"):
        demo.specs(None, None)
    (tmp_path / "runs/quickstart/clip/checkpoints/00000007").mkdir(parents=True)
    (tmp_path / "runs/quickstart/clip/checkpoints/00000007/manifest.json").touch()
    assert demo.specs(None, None) == ("runs/quickstart/clip", "") and demo.specs(None, "x") == ("", "x")
    given = demo.options(["preprocess=clip", "image_size=64", "allow=a", "allow=b"], "--clip-option", load)
    assert given == {"preprocess": "clip", "image_size": 64, "allow": ("a", "b")}
    with pytest.raises(ConfigError, match=r"--clip-option int8=True: expected KEY=VALUE with KEY one of image_size, "):
        demo.options(["int8=True"], "--clip-option", load)

    def start(*words: str) -> None:
        demo.start(demo.parser().parse_args(words), tmp_path)

    with pytest.raises(ConfigError, match=r"--embeddings a.safetensors: no CLIP to search it with; name one with --cl"):
        start("--flamingo", "x", "--embeddings", "a.safetensors")
    with pytest.raises(ConfigError, match=r"--embeddings and --images: one of them expected; the file names its image"):
        start("--clip", "x", "--embeddings", "a.safetensors", "--images", demo.IMAGES)


def test_a_port_that_is_taken_is_one_line(served: demo.Served, tmp_path: Path) -> None:
    port = int(served.address.rstrip("/").rpartition(":")[2])
    with gr.Blocks(analytics_enabled=False) as empty:
        pass
    with pytest.raises(ConfigError, match=f"--port {port}: taken, or no address of this machine; name another"):
        page.serve(empty, tmp_path, Limits(), "127.0.0.1", port)
