"""More than a thousand bad pictures: each decodes or is refused for a reason, in bounded memory; training goes on."""

import io
import resource
import struct
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.order import Order, generator
from clip_jax.data.pipeline import Batches, Draws, PairElements
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.sources import ASSETS, Pair, open_source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.transforms import Augmentation, open_image, training_image, whole
from clip_jax.errors import RecordError

REASONS = {"empty_image", "not_an_image", "truncated_image", "damaged_image", "large_image", "unknown_range"}
MIB = 2**20


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *others: bytes) -> bytes:
    """A PNG that says how large it is, with a little data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(others)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    source = open_source("emoji:train")
    return [transforms.decode(source[i].image, "emoji").resize((72, 64)) for i in range(0, 120, 5)]


def other_things() -> Iterator[tuple[str, bytes]]:
    """What is no good picture of a usual kind, whatever its name says."""
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    yield "empty", b""
    yield "svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "html", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "script", b"#!/bin/sh\ntouch /tmp/was-run\n"
    yield (
        "postscript",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(was-run) (w) file closefile\nshowpage\n%%EOF\n",
    )
    yield "pdf", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n"
    yield "json", b'{"error": "forbidden"}'
    yield "zeros", bytes(4096)
    yield "bomb", png(30_000, 30_000)
    yield "bomb of one side", png(2**31 - 1, 1)
    yield "bomb of text", png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 * MIB), 9)))
    yield "bomb of a profile", png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(80 * MIB), 9)))
    yield "long chunk", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR"
    yield "gif that lies", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20)
    yield "jpeg that lies", b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    yield (
        "bmp that lies",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    for kind in ("GIF", "PNG", "WEBP"):
        yield f"animated {kind}", encode(image, kind, save_all=True, append_images=[image.rotate(90)] * 3)
    yield "16 bits", encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG")
    yield "32 bits", encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    yield "cmyk", encode(image.convert("CMYK"), "JPEG")
    yield "grey", encode(image.convert("L"), "JPEG")
    yield "progressive", encode(image, "JPEG", progressive=True)
    yield "palette", encode(image.convert("P"), "PNG", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "turned", encode(image, "JPEG", exif=exif)
    yield "comment", b"\xff\xd8\xff\xfe\xff\xff" + b"<script>" * 8191 + encode(image, "JPEG")[2:]
    yield "two pictures", encode(image, "MPO", save_all=True, append_images=[image])


def corpus(pictures: list[Image.Image]) -> Iterator[tuple[str, bytes]]:
    """Pictures with some bits turned, cut off, or with a hole; and other things."""
    rng = np.random.default_rng(0)
    for number, image in enumerate(pictures):
        for kind in ("JPEG", "PNG", "WEBP"):
            data = np.frombuffer(encode(image, kind, quality=80), np.uint8)
            for i in range(16):
                if i % 2:
                    bad = data.copy()
                    places = rng.integers(0, len(data) if i % 4 == 1 else min(64, len(data)), 1 + i // 3)
                    bad[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
                elif i % 4:
                    bad = data[: int(rng.integers(0, len(data)))]
                else:
                    start = int(rng.integers(0, len(data)))
                    bad = np.concatenate([data[:start], data[start + 40 :]])
                yield f"{kind} {number}/{i}", bad.tobytes()
    yield from other_things()


def test_a_thousand_bad_pictures_decode_or_are_refused_for_a_reason(pictures: list[Image.Image]) -> None:
    preprocess, found, before = Preprocess(32), Counter[str](), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (name, data) in enumerate(corpus(pictures)):
        try:
            seen = training_image(open_image(data, name), 32, Augmentation(), generator(number))
            assert seen.shape == (32, 32, 3)
            found["good"] += 1
        except RecordError as error:
            assert error.reason in REASONS and str(error).startswith(name) and "\n" not in str(error)
            found[error.reason] += 1
        try:
            assert preprocess.pixels(data, name).shape == (32, 32, 3)
        except RecordError as error:
            assert error.reason in REASONS, error
    assert found.total() > 1000
    assert all(found[reason] for reason in (REASONS | {"good"})), found
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown:.0f} MiB more than before"


def test_content_decides_and_nothing_is_run() -> None:
    good, bad = [], {}
    for name, data in other_things():
        try:
            good.append((name, whole(open_image(data, name)).size))
        except RecordError as error:
            bad[name] = error.reason
    assert [name for name, _ in good] == [
        "animated GIF", "animated PNG", "animated WEBP", "16 bits", "cmyk", "grey", "progressive", "palette", "turned",
        "comment", "two pictures",
    ]  # fmt: skip
    assert {size for _, size in good} == {(40, 30)}  # an EXIF orientation is ignored, as the peers do
    assert {name for name, reason in bad.items() if reason == "not_an_image"} >= {
        "svg", "html", "script", "postscript", "pdf", "json", "zeros"
    }  # fmt: skip
    assert bad["bomb"] == "large_image"
    assert bad.keys() >= {"bomb of one side", "bomb of text", "bomb of a profile"}
    assert bad.keys() >= {"gif that lies", "jpeg that lies", "bmp that lies", "long chunk"}


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        pixels = np.asarray(whole(open_image(data, kind))).astype(int)
        assert np.abs(pixels - np.array([255, 0, 0])).max() < 12


def test_a_stream_with_bad_pictures_goes_on_and_counts_them_exactly(pictures: list[Image.Image]) -> None:
    bad = []
    for name, data in corpus(pictures[:2]):
        try:
            training_image(open_image(data, name), 16, Augmentation(), generator(0))
        except RecordError as error:
            bad.append((data, error.reason))
    source = [Pair(f"good {i}", encode(image, "JPEG"), "good") for i, image in enumerate(pictures)]
    source += [Pair(f"bad {i}", data, "bad") for i, (data, _) in enumerate(bad[:: len(bad) // 12])]
    reasons = [""] * len(pictures) + [reason for _, reason in bad[:: len(bad) // 12]]
    order = Order(len(source), 2)
    tokenizer = Tokenizer.from_file(ASSETS / "emoji" / "tokenizer.json")
    batches = Batches(PairElements(Draws(source, order), tokenizer, 16, 8, Augmentation()), 8, np.arange(8))
    found, drawn = sum((batch.skips for batch in batches.read(0, 20)), start=Counter()), Counter[str]()
    for position in range(8 * 20):
        attempt = 0
        while reason := reasons[order.index(position, attempt)]:
            drawn[reason] += 1
            attempt += 1
    assert drawn.total() > 20 and len(drawn) > 2
    assert Counter({reason: count for (reason, _), count in found.items()}) == drawn
