"""Pages of any kind written as interleaved JSON lines with their images: `pages-00000.jsonl`, `images/` or tars.

A shard is a function of the pages that it is of, and counts as written with its `counts/00000.json`, which is written
last: the same call, started again after a kill, goes on. Images are named by their content, and nothing is written
outside the output folder.
"""

import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from clip_jax.data import transforms
from clip_jax.errors import ConfigError, RecordError
from clip_jax.files import replacing, write_atomically
from flamingo_jax.data.documents import IMAGE_TAG, Text
from flamingo_jax.data.filters import Refilled
from flamingo_jax.data.media import Page, PageSource, Raw
from flamingo_jax.data.pages import open_pages

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """What is written: interleaved pages of `spec` (see `open_pages`), `shard_size` of them read for a shard.

    tars: images in a tar for each shard, `images-00000.tar`, instead of in a folder.
    blocked: words; a page that holds one of them, whole and in whatever case, is left out.
    """

    spec: str
    shard_size: int = 1024
    tars: bool = False
    blocked: tuple[str, ...] = ()

    def open(self) -> PageSource:
        """The pages as they are: none stands in the place of one that a filter leaves out."""
        source = open_pages("interleaved", self.spec)
        return source.source if isinstance(source, Refilled) else source


def write_pages(job: Job, output: Path, workers: int = 1) -> dict[str, Any]:
    """Writes what is not written yet; returns the counts, which it leaves in `counts.json`, too.

    Counts: `read`, `written`, `images`, `characters`, and by reason `left_out` (pages), `images_left_out`.
    Raises ConfigError where the folder holds something else, or the same with other settings.
    """
    if job.shard_size < 1 or workers < 1:
        raise ConfigError(f"shards of {job.shard_size} pages by {workers} processes: at least 1 expected")
    pages = len(job.open())
    _claim(output, asdict(job) | {"pages": pages})
    shards = -(-pages // job.shard_size)
    left = [shard for shard in range(shards) if not _counts_file(output, shard).is_file()]
    write = partial(write_shard, job, output)
    progress = partial(tqdm, total=len(left), desc="interleave", unit="shard", dynamic_ncols=True, disable=None)
    if workers == 1:
        for shard in progress(left):
            write(shard)
    elif left:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(progress(pool.map(write, left)))
    total: dict[str, Any] = {"read": 0, "written": 0, "images": 0, "characters": 0}
    reasons = {name: Counter[str]() for name in ("left_out", "images_left_out")}
    for shard in range(shards):
        counts = json.loads(_counts_file(output, shard).read_text())
        total = {name: total[name] + counts[name] for name in total}
        for name, counter in reasons.items():
            counter.update(counts[name])
    total |= {name: dict(counter.most_common()) for name, counter in reasons.items()}
    write_atomically(output / "counts.json", json.dumps(total, indent=1) + "\n")
    return total


def written_spec(job: Job, output: Path) -> str:
    """What opens the written pages, as a stream's `source` of kind `interleaved`."""
    return f"json:{output}/pages-*.jsonl#{output}/" + ("images-*.tar" if job.tars else "images")


def _claim(output: Path, settings: dict[str, Any]) -> None:
    file = output / SETTINGS
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        before = json.loads(file.read_text())
        for key in settings:
            if before.get(key) != settings[key]:
                was = f"was begun with {key} {before.get(key)!r:.80}, now {settings[key]!r:.80}"
                raise ConfigError(f"{output}: {was}; expected the same, or another output folder")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output}: is not empty; expected a new folder, or one that this command began")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(settings, indent=1) + "\n")


def _counts_file(output: Path, shard: int) -> Path:
    return output / "counts" / f"{shard:05}.json"


_opened: dict[Job, PageSource] = {}  # in each process


def write_shard(job: Job, output: Path, shard: int) -> None:
    source = _opened.setdefault(job, job.open())
    blocked = blocked_words(job.blocked)
    counts: dict[str, Any] = {"read": 0, "written": 0, "images": 0, "characters": 0}
    reasons = {name: Counter[str]() for name in ("left_out", "images_left_out")}
    with _ImageFiles(output, shard, job.tars) as files:
        lines = []
        for index in range(shard * job.shard_size, min((shard + 1) * job.shard_size, len(source))):
            counts["read"] += 1
            try:
                page = source[index]
                text, images, bad = _encoded(page, with_text=job.spec.startswith("pairs:"))
                reasons["images_left_out"].update([*page.dropped, *bad])
                if not images:
                    raise RecordError(f"{page.key}: no images left", reason="no_images")
                if blocked and blocked.search(text.casefold()):
                    raise RecordError(f"{page.key}: holds a blocked word", reason="blocked_word")
            except RecordError as error:
                reasons["left_out"][error.reason] += 1
                continue
            names = [files.write(data, suffix) for data, suffix in images]
            lines.append(json.dumps({"text": text, "images": names, "from": page.key}, ensure_ascii=False) + "\n")
            counts["written"] += 1
            counts["images"] += len(names)
            counts["characters"] += len(text) - len(IMAGE_TAG) * len(names)
    write_atomically(output / f"pages-{shard:05}.jsonl", "".join(lines))
    _counts_file(output, shard).parent.mkdir(exist_ok=True)
    write_atomically(_counts_file(output, shard), json.dumps(counts | reasons) + "\n")


def _encoded(page: Page, with_text: bool) -> tuple[str, list[tuple[bytes, str]], list[str]]:
    """(the text with a tag at each image's place, (bytes, suffix) of each, why others are left out).

    An image that does not decode is left out; `with_text`: with the text up to the next one, which is of it alone.
    """
    text, images, bad = "", [], []
    without = False
    for part in page.parts:
        if isinstance(part, Text):
            text += "" if without else part.text
        elif isinstance(part, Raw):
            try:
                images.append(_checked(part, page.key))
                text, without = text + IMAGE_TAG, False
            except RecordError as error:
                bad.append("does_not_decode" if error.reason == "other" else error.reason)
                without = with_text
    return text, images, bad


def _checked(raw: Raw, key: str) -> tuple[bytes, str]:
    """(the bytes of an image or clip, the suffix of its format). Raises RecordError for one that does not decode."""
    data = raw.read(key)
    if raw.is_video:
        return data, Path(raw.path).suffix.lower()
    transforms.decode(data, key)
    with Image.open(io.BytesIO(data)) as image:
        return data, f".{(image.format or 'image').lower()}".replace("jpeg", "jpg")


class _ImageFiles:
    """Images in the folder `images`, or in one tar, once each; a name is of the content."""

    def __init__(self, output: Path, shard: int, tars: bool):
        self._folder = output / "images"
        self._stack = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._path = output / f"images-{shard:05}.tar" if tars else None
        self._written: set[str] = set()

    def __enter__(self) -> "_ImageFiles":
        if self._path is not None:
            temporary = self._stack.enter_context(replacing(self._path))
            self._tar = self._stack.enter_context(tarfile.open(temporary, "w"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, data: bytes, suffix: str) -> str:
        """The image's name, as the page has it."""
        digest = hashlib.sha256(data).hexdigest()[:32]
        name = f"{digest}{suffix}" if self._tar else f"{digest[:2]}/{digest}{suffix}"
        if name in self._written:
            return name
        self._written.add(name)
        if self._tar is not None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        elif not (self._folder / name).is_file():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            temporary = (self._folder / name).with_suffix(f".{os.getpid()}.tmp")  # several processes may meet here
            temporary.write_bytes(data)
            temporary.replace(self._folder / name)
        return name


def blocked_words(words: Sequence[str]) -> re.Pattern[str] | None:
    """Finds one of the words, or several in a row, whole, in casefolded text; None for no words."""
    found = sorted({word.casefold().strip() for word in words if word.strip()}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, found))})(?!\w)") if found else None
