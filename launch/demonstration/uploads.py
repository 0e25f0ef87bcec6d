"""What visitors send and get: pictures within limits, read by few decoders, and what may pass the server's door."""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_jax.errors import RecordError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")  # Pillow's others call programs, or are rarely fuzzed
MAX_FILES = 64  # of one request
MAX_REQUEST = 2**20  # bytes of a request that holds no files


@dataclass(frozen=True)
class Limits:
    """Of one picture: the bytes of its file, and pixels, known before any is decoded."""

    size: int = 10 * 2**20
    pixels: int = 25_000_000

    def read(self, path: str | None) -> bytes:
        """The bytes of an uploaded picture. Raises RecordError, a line that names it, for one that is refused."""
        if not path:
            raise RecordError("no picture yet: choose one first")
        file = Path(path)
        try:
            found = file.stat().st_size
            if found > self.size:
                raise RecordError(f"{file.name}: {found / 2**20:.1f} MiB; at most {self.size / 2**20:g} MiB expected")
            data = file.read_bytes()
        except OSError as error:
            raise RecordError(f"{file.name}: can't be read ({error.strerror}); send it again") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            raise RecordError(f"{file.name}: far too many pixels; at most {self.pixels:,} expected") from None
        except Exception:  # decoders raise many kinds
            expected = ", ".join(FORMATS[:-1])
            raise RecordError(f"{file.name}: no picture; {expected} or {FORMATS[-1]} expected") from None
        if width * height > self.pixels:
            raise RecordError(f"{file.name}: {width:,}×{height:,} pixels; at most {self.pixels:,} in all expected")
        return data


@dataclass(frozen=True)
class Uploads:
    """Uploaded pictures as `clip_jax.data.images.Images`: each is read, and may be refused, by itself."""

    paths: Sequence[str | None]
    limits: Limits

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        path = self.paths[index]
        return Path(path or "picture").name, self.limits.read(path)


class Guard:
    """Around Gradio's application: no file but an upload can be named, no address is fetched, nothing huge comes in.

    Gradio refuses files outside its folders itself; it would fetch an address that is named instead of a file, and
    one wrong request would spoil those that are answered together with it.
    """

    def __init__(self, app: ASGIApp, folder: Path, limits: Limits):
        self.app, self.folder, self.limits = app, folder.resolve(), limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        headers = dict(scope["headers"])
        path, method = scope["path"], scope["method"]
        refusal = ""
        if "/proxy=" in path:
            refusal = "nothing is fetched from elsewhere"
        elif "/file=" in path:
            refusal = self.refused(path.split("/file=", 1)[1])
        elif method not in ("GET", "HEAD", "OPTIONS"):
            length = headers.get(b"content-length", b"")
            files = b"multipart/form-data" in headers.get(b"content-type", b"")
            most = MAX_FILES * self.limits.size + MAX_REQUEST if files else MAX_REQUEST
            if b"transfer-encoding" in headers:  # in chunks, it may be of any length, whatever length it claims
                length = b""
            if not length.isdigit() or int(length) > most:
                refusal = f"a request of {length.decode('latin-1') or 'unknown'} bytes; at most {most:,} expected"
            elif not files:
                body = await _whole(receive)
                refusal = next(filter(None, (self.refused(name) for name in named_files(body))), "")
                receive = _again(body, receive)
        if refusal:
            logging.warning("refused: %s", refusal)
            await PlainTextResponse(f"refused: {refusal}", 403)(scope, receive, sealed)
        else:
            await self.app(scope, receive, sealed)

    def refused(self, name: str) -> str:
        """Why a file may not be named by a visitor; "" where it may."""
        path = unquote(name)
        inside = "\0" not in path and Path(path).resolve().is_relative_to(self.folder)
        return "" if inside and "://" not in path else f"{name[:100]!r} is no uploaded file"


# Pages, and what runs in them, get nothing from any other server.
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        b"style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def named_files(body: bytes) -> Iterator[str]:
    """What a JSON request names as files: the values of `path` and `url`, at any depth."""
    try:
        waiting: list[Any] = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return  # Gradio says what it expected
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            if isinstance(path := value.get("path"), str) and path:
                yield path
            if isinstance(url := value.get("url"), str) and not url.startswith("data:") and "/file=" not in url:
                yield url
        elif isinstance(value, list):
            waiting += value


async def _whole(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    told = False

    async def repeat() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return repeat
