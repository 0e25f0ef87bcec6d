"""Training batches of 224² pixels from JPEGs of web sizes: ours, a bare loop of the fastest libraries on each core, and
PyTorch's DataLoader with webdataset and open_clip's transforms; the same files, cores and crops' sizes, in turns.

The pictures are the embedded emoji, many to a picture, on textured ground, with the grain of a camera.
"""

import io
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.progress import brief
from launch.benchmarking.peers import import_peers
from launch.benchmarking.rows import Result, Row, Settings, Skipped

SIZE, BATCH = 224, 128
PICTURES, TARS = 1024, 4
# Of the web's pictures as img2dataset stores them: most about 640×480.
SIZES = ((640, 480), (640, 480), (640, 427), (480, 640), (640, 426), (500, 375), (800, 600), (600, 600), (1024, 768),
         (1500, 1000))  # fmt: skip
PEERS = ".venv-peers/bin/python"

Rates = tuple[float, float]  # images a second, images a second of a core


def picture(rng: np.random.Generator, sprites: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Emoji of many sizes, turned, over a ground of soft colours, with noise."""
    width, height = size
    ground = rng.normal(0, 1, (height // 8 + 2, width // 8 + 2, 3)).cumsum(0).cumsum(1)
    ground = (ground - ground.min()) / np.ptp(ground) * 255
    image = Image.fromarray(ground.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for _ in range(25):
        sprite = sprites[int(rng.integers(len(sprites)))]
        side = int(rng.integers(height // 8, height // 2))
        sprite = sprite.resize((side, side), Image.Resampling.BICUBIC).rotate(float(rng.uniform(0, 360)))
        left, top = (int(rng.integers(-side // 2, limit - side // 2)) for limit in size)
        image.paste(sprite, (left, top), sprite)
    noise = rng.normal(0, float(rng.uniform(1, 7)), (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def make(folder: Path, pictures: int) -> float:
    """Writes `pairs-0000i.tar` as img2dataset does, and the same files to `pairs/`. Returns bytes a pixel."""
    from clip_jax.data.sources import open_source

    source, rng = open_source("emoji:train"), np.random.default_rng(0)
    some = [source[int(i)] for i in rng.integers(0, len(source), 200)]
    sprites = [Image.open(io.BytesIO(pair.image)).convert("RGBA") for pair in some]
    (folder / "pairs").mkdir()
    tars = [tarfile.open(folder / f"pairs-{i:05d}.tar", "w") for i in range(TARS)]  # noqa: SIM115 (closed below)
    bytes_, pixels = 0, 0
    for i in range(pictures):
        size, file = SIZES[i % len(SIZES)], io.BytesIO()
        picture(rng, sprites, size).save(file, "JPEG", quality=int(rng.choice([75, 80, 85, 90])))
        bytes_, pixels = bytes_ + file.tell(), pixels + math.prod(size)
        text = ", ".join(some[int(j)].text for j in rng.integers(0, len(some), 3)).encode()
        for suffix, data in (("jpg", file.getvalue()), ("txt", text)):
            (folder / "pairs" / f"{i:06d}.{suffix}").write_bytes(data)
            member = tarfile.TarInfo(f"{i:06d}.{suffix}")
            member.size = len(data)
            tars[i * TARS // pictures].addfile(member, io.BytesIO(data))
    for tar in tars:
        tar.close()
    return bytes_ / pixels


def core_seconds() -> float:
    """What this process and its children have used of the cores so far."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in (me, *children)]
    return sum(int(some[11]) + int(some[12]) for some in fields) / os.sysconf("SC_CLK_TCK")


def timed(batches: Iterator[Any], count: int, of: Callable[[Any], int]) -> Rates:
    """Of `count` batches, after some that are not counted: as many as may have been read ahead."""
    for _ in range(4):
        next(batches)
    start, used = time.perf_counter(), core_seconds()
    images = sum(of(next(batches)) for _ in range(count))
    return images / (time.perf_counter() - start), images / (core_seconds() - used)


def ours(spec: str, processes: int, count: int) -> Rates:
    """Images a second of the pipeline as a config of CLIP's sets it up."""
    from clip_jax.data.order import Order
    from clip_jax.data.pipeline import Batches, Draws, PairElements
    from clip_jax.data.sources import open_source
    from clip_jax.data.tokenizer import openai_tokenizer
    from clip_jax.data.transforms import Augmentation

    source = open_source(spec)
    draws = Draws(source, Order(len(source), 0))
    element = PairElements(draws, openai_tokenizer(), SIZE, 77, Augmentation())
    batches = Batches(element, BATCH, np.arange(BATCH), threads=1, workers=processes).read(0, 10**6)
    return timed(iter(batches), count, lambda batch: len(batch.arrays["image"]))


def bare_loop(files: Sequence[str], start: int, seconds: float) -> Rates:
    """What one core decodes, crops and resizes, and nothing else: the limit."""
    import simplejpeg

    data, rng = [Path(file).read_bytes() for file in files], np.random.default_rng(start)
    done, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        jpeg = data[done % len(data)]
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        area, ratio = rng.uniform(0.9, 1.0) * width * height, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        shrunk = min(math.ceil(8 * SIZE / min(w, h)), 8) / 8
        pixels = simplejpeg.decode_jpeg(
            jpeg, "RGB", min_height=math.ceil(height * shrunk), min_width=math.ceil(width * shrunk)
        )
        box = (left * shrunk, top * shrunk, min((left + w) * shrunk, pixels.shape[1]),
               min((top + h) * shrunk, pixels.shape[0]))  # fmt: skip
        np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))
        done += 1
    return done / (time.perf_counter() - began), done / (time.process_time() - used)


def bare(folder: str, processes: int, seconds: float) -> Rates:
    """The bare loop on so many cores at once."""
    files = [str(file) for file in sorted((Path(folder) / "pairs").glob("*.jpg"))]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(time.sleep, [0.1] * processes, chunksize=1)  # all have started
        parts = [(files[i::processes], i, seconds) for i in range(processes)]
        rates = pool.starmap(bare_loop, parts, chunksize=1)
    return sum(rate for rate, _ in rates), statistics.mean(rate for _, rate in rates)


def pytorch(folder: str, processes: int, count: int) -> Rates:
    """Images a second of DataLoader and webdataset, set up as open_clip's own training does."""
    import webdataset as wds

    import_peers()  # before torchvision
    from open_clip import get_tokenizer, image_transform

    transform, tokenizer = image_transform(SIZE, is_train=True), get_tokenizer("ViT-B-32")
    shards = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
    stages = [
        wds.ResampledShards(shards),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=1000, initial=200),
        wds.decode("pilrgb"),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    ]
    loader = wds.WebLoader(wds.DataPipeline(*stages), batch_size=None, shuffle=False, num_workers=processes)
    return timed(iter(loader), count, lambda batch: len(batch[0]))


@contextmanager
def folder_of_pictures(pictures: int) -> Iterator[tuple[Path, float]]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name), make(Path(name), pictures)


def in_python(python: str, function: str, *arguments: Any) -> Rates:
    """A function of this file in an interpreter of its own, which may be another's. Raises UserError where it fails."""
    program = Path(__file__).parent.parent.parent
    run = f"if __name__ == '__main__': print('=', *f(*{arguments!r}))"
    code = f"from launch.benchmarking.data import {function} as f\n{run}"
    paths = [str(program), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise UserError(f"{function} by {python}: {ran.stderr.strip().splitlines()[-1]}")
    rate, of_a_core = ran.stdout.rsplit("=", 1)[1].split()
    return float(rate), float(of_a_core)


def rows(settings: Settings) -> Iterator[Result]:
    """Seconds an image: by the clock beside PyTorch's, and of a core beside the bare loop's.

    PyTorch runs in `.venv-peers`, or here where that is not; without it its row is left out.
    """
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    python = PEERS if Path(PEERS).exists() else sys.executable
    batches = 4 if settings.quick else 10
    with folder_of_pictures(PICTURES) as (folder, density):
        where = str(folder)
        sides: dict[str, Callable[[], Rates]] = {
            "bare loop": partial(in_python, sys.executable, "bare", where, processes, 2.0 if settings.quick else 8.0),
            "ours": partial(in_python, sys.executable, "ours", f"tar:{where}/pairs-*.tar", processes, batches),
            "PyTorch": partial(in_python, python, "pytorch", where, processes, batches),
        }
        found: dict[str, list[Rates]] = {side: [] for side in sides}
        left_out = ""
        for _ in brief(range(settings.rounds), total=settings.rounds, desc="data", unit="turn"):
            for side, run in sides.items():
                if side == "PyTorch" and left_out:
                    continue
                try:
                    found[side].append(run())
                except UserError as error:
                    if side != "PyTorch":
                        raise
                    left_out = str(error)
    name = f"training batches of {SIZE}² from JPEGs of {density:.2f} bytes a pixel, {processes} cores: an image"
    bare, ours, torch = ([[1 / rate for rate in rates] for rates in zip(*runs, strict=True)] for runs in found.values())
    if left_out:
        yield Skipped(name, left_out)
    else:
        yield Row(name, "webdataset and open_clip's transforms", ours[0], torch[0], 1.5,
                  limit=statistics.median(bare[0]), limit_name="bare loop of decode, crop, resize")  # fmt: skip
    yield Row("the same, time of a core", "bare loop of decode, crop, resize", ours[1], bare[1], 0.9)
