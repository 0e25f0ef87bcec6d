"""Published data sets of web pages: MMC4 (arXiv 2304.06939) and OBELICS (arXiv 2306.16527), with their filters.

MMC4 assigns each image to a sentence, in the order of the images. A page has to follow the sentences: images are
sorted by the sentence that they stand before, as OpenFlamingo's loader fails to do, which so swaps them.
"""

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clip_jax.data.sources import IMAGE_SUFFIXES, storage
from clip_jax.errors import ConfigError, DataError, RecordError
from flamingo_jax.data.documents import IMAGE_TAG, Text, with_ends
from flamingo_jax.data.filters import Filters, cut_options, read_options
from flamingo_jax.data.media import Page, Raw, Span
from flamingo_jax.data.shards import ImageStore, JsonShards, Recent, expand

MAX_IMAGES = 10_000  # of a page


class Mmc4:
    """`mmc4:SHARDS#IMAGES?FILTER=VALUE&…`.

    SHARDS are MMC4's own (.jsonl, .jsonl.zip, .jsonl.gz) or OpenFlamingo's tars, which hold the images in base64.
    IMAGES are a folder of files `image_name` (or of folders 0, 1, …, one a shard, as OpenFlamingo's scripts want it),
    or tars of them, img2dataset's among them, whose images are found by their address. One that is not there is left
    out of its page.
    """

    def __init__(self, spec: str):
        where, images, options = cut_options(spec)
        self.filters: Filters = read_options(Filters, options, f"mmc4:{spec}")
        self._records = JsonShards(where)
        self._images = ImageStore(images, ("{name}", "{shard}/{name}")) if images else None
        if self._images is None and any(not path.endswith(".tar") for path in self._records.paths):
            raise DataError(f"mmc4:{spec}: no images; expected SHARDS#FOLDER or SHARDS#TARS")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Page:
        key, record, shard = self._records[index]
        texts = strings(record, "text_list", key)
        dropped: list[str] = []
        kept: list[tuple[int, Raw]] = []
        for number, info in enumerate(listed(record, "image_info", key)):
            if not isinstance(info, dict):
                raise RecordError(
                    f"{key}: image {number} is {type(info).__name__}; expected an object", reason="wrong_type"
                )
            place = info.get("matched_text_index")
            if type(place) is not int or not 0 <= place < len(texts):
                raise RecordError(
                    f"{key}: image {number} stands at text {place!r:.40}; expected one of 0 to {len(texts) - 1}",
                    reason="index_out_of_range",
                )
            found, size = self._image(info, shard, f"{key}: image {number}")
            similarity = _similarity(record, info, number, place, key) if self.filters.min_similarity > -1 else 1.0
            reason = "not_there" if found is None else self.filters.image_refused(info, similarity, size)
            if reason:
                dropped.append(reason)
            elif found is not None:
                kept.append((place, found))
        self.filters.check(key, len(kept), record, index)
        kept.sort(key=lambda image: image[0])  # stable: of one sentence, the images keep their order
        return Page(key, with_ends(_placed(texts, kept)), dropped)

    def _image(self, info: Mapping[str, Any], shard: int, key: str) -> tuple[Raw | None, int | None]:
        """(the image, its size in bytes where it is asked for)."""
        if (encoded := info.get("image_base64")) is not None:
            data = from_base64(encoded, key)
            return Raw(data), len(data)
        name, url = (info.get(field) or "" for field in ("image_name", "raw_url"))
        if not isinstance(name, str) or not isinstance(url, str):
            raise RecordError(f"{key}: its name is {name!r:.40}; expected a text", reason="wrong_type")
        where = self._images.find(name, shard, url) if self._images else None
        return (None, None) if where is None else (Raw(where), _size(where) if self.filters.min_bytes else None)


class Obelics:
    """`obelics:FILES.parquet#IMAGES?FILTER=VALUE&…`.

    `images` and `texts` are lists of one length, of which at each place one is null; `images` holds the encoded bytes
    (or {bytes, path}) or addresses. Those are found in IMAGES: a folder of files named by the address's sha256 in
    hexadecimal, with an image's suffix or none, or tars, img2dataset's among them. One that is not there is left out.
    """

    def __init__(self, spec: str):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError("Parquet files need pyarrow: install the extra `parquet` (pip install pyarrow)") from None
        where, images, options = cut_options(spec)
        self.filters: Filters = read_options(Filters, {"max_images": "30"} | options, f"obelics:{spec}")
        suffixes = ("", *sorted(IMAGE_SUFFIXES))
        self._images = ImageStore(images, [f"{{name}}{suffix}" for suffix in suffixes]) if images else None
        self._groups: list[tuple[str, int, int]] = []  # (file, row group, its first row of all)
        self._size = 0
        for path in expand(where):
            try:
                with _parquet(path) as file:
                    columns, footer = set(file.schema_arrow.names), file.metadata
            except DataError:
                raise
            except Exception as error:  # of Arrow and, of a bucket, of boto, aiohttp, google …
                raise DataError(f"{path}: can't be read ({storage.first_line(error)[:200]})") from None
            if missing := {"images", "texts"} - columns:
                raise DataError(f"{path}: no column {min(missing)}; expected images and texts, and metadata")
            for group in range(footer.num_row_groups):
                self._groups.append((path, group, self._size))
                self._size += footer.row_group(group).num_rows
        if not self._size:
            raise DataError(f"obelics:{spec}: empty")
        self._read = Recent(_row_group)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Page:
        import bisect

        if not 0 <= index < self._size:
            raise IndexError(index)
        path, group, first = self._groups[bisect.bisect_right(self._groups, index, key=lambda entry: entry[2]) - 1]
        key = f"{path}:{index - first} of row group {group}"
        try:
            rows = self._read((path, group))
            record = {name: column[index - first].as_py() for name, column in rows.items()}
        except Exception as error:  # as above
            raise RecordError(
                f"{key}: can't be read ({storage.first_line(error)[:120]})", reason="can_not_be_read"
            ) from None
        return self._page(record, key, index)

    def _page(self, record: Mapping[str, Any], key: str, index: int) -> Page:
        images, texts = (listed(record, name, key) for name in ("images", "texts"))
        if len(images) != len(texts):
            raise RecordError(
                f"{key}: {len(images)} images, {len(texts)} texts; expected as many", reason="lengths_differ"
            )
        infos = _metadata(record.get("metadata"), len(images), key)
        parts: list[Raw | Text] = []
        dropped = []
        for place, (image, text) in enumerate(zip(images, texts, strict=True)):
            if (image is None) == (text is None):
                raise RecordError(f"{key}: place {place}: expected an image or a text", reason="neither_image_nor_text")
            if text is not None:
                if not isinstance(text, str):
                    raise RecordError(
                        f"{key}: text {place} is {type(text).__name__}; expected a text", reason="wrong_type"
                    )
                parts.append(Text(plain(text)))
                continue
            found = self._image(image, f"{key}: image {place}")
            size = _size(found) if found is not None and self.filters.min_bytes else None
            reason = "not_there" if found is None else self.filters.image_refused(infos[place], 1.0, size)
            if reason:
                dropped.append(reason)
            elif found is not None:
                parts.append(Raw(found))
        self.filters.check(key, sum(isinstance(part, Raw) for part in parts), record, index)
        return Page(key, with_ends(joined(parts)), dropped)

    def _image(self, image: Any, key: str) -> bytes | Path | Span | None:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if image is None or isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise RecordError(f"{key} is {type(image).__name__}; expected bytes or an address", reason="wrong_type")
        if self._images is None:
            raise RecordError(
                f"{key} is an address; expected FILES#FOLDER or FILES#TARS for its file", reason="no_images"
            )
        return self._images.find(hashlib.sha256(image.encode("utf-8", "replace")).hexdigest(), url=image)


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """A Parquet file, on a disk or in a bucket."""
    from pyarrow.parquet import ParquetFile

    with (
        storage.open_file(path) if storage.is_remote(path) else nullcontext(path) as source,
        ParquetFile(source) as file,
    ):
        yield file


def _row_group(place: tuple[str, int]) -> dict[str, Any]:
    path, group = place
    with _parquet(path) as file:
        wanted = [name for name in ("images", "texts", "metadata") if name in file.schema_arrow.names]
        table = file.read_row_group(group, columns=wanted)
    return {name: table[name] for name in wanted}


def _metadata(found: Any, length: int, key: str) -> Sequence[Mapping[str, Any]]:
    """What is said of each image: a JSON string of a list, in OBELICS; {} where nothing is."""
    if isinstance(found, str | bytes):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            raise RecordError(f"{key}: metadata is no JSON", reason="not_json") from None
    if found is None:
        return [{}] * length
    if not isinstance(found, list) or len(found) != length:
        raise RecordError(f"{key}: metadata; expected null or a list of {length}", reason="lengths_differ")
    return [info if isinstance(info, dict) else {} for info in found]


def _placed(texts: Sequence[str], images: Sequence[tuple[int, Raw]]) -> list[Raw | Text]:
    """Texts with images before theirs; `images` are in the order of their texts."""
    parts: list[Raw | Text] = []
    done = 0
    for place, image in images:
        parts += [Text(" ".join(texts[done:place])), image]
        done = place
    return joined([*parts, Text(" ".join(texts[done:]))])


def joined(parts: Sequence[Raw | Text]) -> list[Raw | Text]:
    """Parts with neighbouring texts as one, in paragraphs, and without blank ones."""
    found: list[Raw | Text] = []
    for part in parts:
        if isinstance(part, Text):
            text = part.text.strip()
            if not text:
                continue
            if found and isinstance(found[-1], Text):
                found[-1] = Text(f"{found[-1].text}\n\n{text}")
                continue
            part = Text(text)
        found.append(part)
    return found


def _similarity(record: Mapping[str, Any], info: Mapping[str, Any], number: int, place: int, key: str) -> float:
    """Of an image and its sentence: `matched_sim`, or the matrix's."""
    value = info.get("matched_sim")
    if value is None:
        try:
            value = record["similarity_matrix"][number][place]
        except (KeyError, IndexError, TypeError):
            raise RecordError(f"{key}: no similarity of image {number}", reason="no_similarity") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(f"{key}: similarity {value!r:.40} of image {number}; expected a number", reason="wrong_type")
    return float(value)


def from_base64(text: Any, key: str) -> bytes:
    """Raises RecordError. OpenFlamingo's converter writes Python's b'…' around it, which is taken off."""
    if not isinstance(text, str):
        raise RecordError(f"{key} is {type(text).__name__}; expected base64", reason="bad_base64")
    if literal := re.fullmatch(r"b'([^']*)'", text):
        text = literal[1]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"{key}: not base64 ({str(error)[:80]})", reason="bad_base64") from None


def listed(record: Mapping[str, Any], name: str, key: str) -> list[Any]:
    """A field that is a list; nothing of null. Raises RecordError for others."""
    value = record.get(name)
    if name not in record or not isinstance(value, list | None):
        found = type(value).__name__ if name in record else "not there"
        raise RecordError(
            f"{key}: {name} is {found}; expected a list", reason="wrong_type" if name in record else "no_field"
        )
    if value is not None and len(value) > MAX_IMAGES:
        raise RecordError(f"{key}: {len(value):,} {name}; at most {MAX_IMAGES:,} expected", reason="too_many_parts")
    return value or []


def strings(record: Mapping[str, Any], name: str, key: str) -> list[str]:
    texts = listed(record, name, key)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RecordError(f"{key}: text {number} is {type(text).__name__}; expected a text", reason="wrong_type")
    return [plain(text) for text in texts]


def plain(text: str) -> str:
    """A text without what would be taken for an image's place."""
    return text.replace(IMAGE_TAG, " ") if IMAGE_TAG in text else text


def _size(where: bytes | Path | Span) -> int:
    if isinstance(where, Path):
        return where.stat().st_size
    return where.size if isinstance(where, Span) else len(where)
