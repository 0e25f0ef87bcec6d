"""WebDataset's tars: consecutive members of one name but for the suffix are a record, read where they lie.

The index of a tar holds, for each record, its members' places, sizes and suffixes: which of them are the image and the
text is decided when it is read. Nothing is ever extracted.
"""

import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError

from clip_jax.data.sources import storage
from clip_jax.data.sources.records import (
    IMAGE_SUFFIXES,
    MAX_IMAGE,
    MAX_TEXT,
    Pair,
    checked_image,
    json_object,
    make_pair,
    printable,
    read_captions,
)
from clip_jax.data.sources.shards import Contents, Index
from clip_jax.errors import DataError, RecordError

BLOCK = 512
MAX_HEADER = 1 << 24  # bytes of a long name or of pax headers
MAX_JSON = 1 << 24
MAX_SUFFIXES = 1000  # different ones in a tar; others' members can't be named
# The key is what precedes the first dot of the base name, as webdataset has it; names without one are no records'.
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__($|/)")
FAULTS = ("", "link", "special_file", "sparse", "unsafe_name", "duplicate_key", "truncated")
EXPLAINED = {
    "link": "a link",
    "special_file": "a device or a pipe",
    "sparse": "a sparse file",
    "unsafe_name": "a name that leads out of the tar",
    "duplicate_key": "two members of one name and suffix",
    "truncated": "cut off, or nothing readable after it",
}


class _Bounded:
    """A file that refuses to be read in large pieces: headers may claim any size for themselves."""

    def __init__(self, file: IO[bytes]):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def scan(file: IO[bytes], url: str) -> Contents:
    """What is in a tar. Of a damaged one, what precedes the damage; the last record then counts as cut off.

    Raises DataError where it is no tar.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        bounded: Any = _Bounded(file)
        tar = tarfile.open(fileobj=bounded, mode="r:")  # noqa: SIM115
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise DataError(f"{url}: not a readable tar file, uncompressed as expected ({_short(error)})") from None
    records: list[tuple[int, int]] = []  # the first member, where the key starts
    members: list[tuple[int, int, int]] = []  # block, size, suffix
    faults: list[int] = []
    keys, suffixes, last, damage, position = bytearray(), {"": 0}, "", "", -1
    seen: set[str] = set()
    while True:
        try:
            member = tar.next()
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if member is not None and (member.offset <= position or not 0 <= member.size < 1 << 62):
                raise tarfile.ReadError("a header that points back")
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            damage = f"damaged after byte {max(position, 0):,} ({_short(error)})"
            break
        if member is None:
            damage = _check_end(tar, size)
            break
        position = member.offset
        parts = MEMBER.fullmatch(member.name)
        if member.isdir() or parts is None or META.match(member.name):
            continue
        key, suffix = parts[1], parts[2].lower()
        if key != last or not records:
            records.append((len(members), len(keys)))
            keys += key.encode("utf-8", "surrogateescape")
            faults.append(0)
            seen.clear()
            last = key
        faults[-1] = faults[-1] or FAULTS.index(_fault(member, suffix in seen, size))
        seen.add(suffix)
        if len(suffixes) < MAX_SUFFIXES and len(suffix) <= 32:
            suffixes.setdefault(suffix, len(suffixes))
        members.append((member.offset_data // BLOCK, min(member.size, 0xFFFFFFFF), suffixes.get(suffix, 0)))
    if damage and faults:
        faults[-1] = faults[-1] or FAULTS.index("truncated")
        damage += f"; the {len(records) - 1:,} records before {printable(last)} can be used"
    elif damage:
        raise DataError(f"{url}: {damage}; not one record before that")
    if size // BLOCK > 0xFFFFFFFF or len(keys) > 0xFFFFFFFF:
        raise DataError(f"{url}: {size:,} bytes; at most {BLOCK << 32:,} expected: split it")
    arrays: dict[str, np.ndarray] = {
        "records": np.array([*records, (len(members), len(keys))], np.uint32).reshape(-1, 2),
        "members": np.array(members, np.uint32).reshape(-1, 3),
        "faults": np.array(faults, np.uint8),
        "keys": np.frombuffer(bytes(keys), np.uint8),
    }
    counts = Counter(FAULTS[number] for number in faults if number)
    return Contents(len(records), arrays, tuple(suffixes), damage, counts)


def _fault(member: tarfile.TarInfo, again: bool, size: int) -> str:
    if member.issym() or member.islnk():
        return "link"
    if member.sparse is not None or member.type == tarfile.GNUTYPE_SPARSE:
        return "sparse"
    if not member.isreg():
        return "special_file"
    if member.name.startswith("/") or ".." in member.name.split("/") or "\\" in member.name or "\0" in member.name:
        return "unsafe_name"
    if again:
        return "duplicate_key"
    return "truncated" if member.offset_data + member.size > size else ""


def _check_end(tar: tarfile.TarFile, size: int) -> str:
    """What is wrong where tarfile has stopped: it takes a header it can't read for the end."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(BLOCK)
    if len(block) == BLOCK and not any(block):
        return ""
    return f"cut off after byte {size:,}" if len(block) < BLOCK else f"no header at byte {tar.offset:,}"


def _short(error: BaseException) -> str:
    return printable(storage.first_line(error))[:200]


@dataclass(frozen=True)
class TarFormat:
    """Images and captions of a tar's records.

    `image`: the image's suffix, by default the first known one's; `text`: that of the text or `json:FIELD`, by default
    txt, else the caption in json, else cls. `classes`: the names that a number in the text stands for.
    """

    image: str = ""
    text: str = ""
    classes: tuple[str, ...] | None = None
    kind = "tar-1"
    indexed = True

    def contents(self, url: str) -> Contents:
        try:
            with storage.open_file(url) as file:
                return scan(file, url)
        except (OSError, EOFError) as error:
            raise DataError(f"{url}: can't be read: {storage.first_line(error)}") from None

    def members(self, index: Index, row: int) -> tuple[str, dict[str, storage.Range]]:
        """(the key, suffix → where that member lies). Raises RecordError for a record with a fault."""
        try:
            (first, start), (stop, end) = index.arrays["records"][row : row + 2].tolist()
            name = index.arrays["keys"][start:end].tobytes().decode("utf-8", "backslashreplace")
            reason = FAULTS[int(index.arrays["faults"][row : row + 1][0])]
            places = index.arrays["members"][first:stop].tolist()
            members = {index.names[suffix]: (block * BLOCK, size) for block, size, suffix in places}
        except (KeyError, IndexError, ValueError, SafetensorError):
            raise RecordError(f"{index.url}#{row}: not in its index", reason="unreadable") from None
        key = printable(f"{index.url}/{name}")
        if reason:
            raise RecordError(f"{key}: {EXPLAINED[reason]}", reason=reason)
        return key, members

    def _image(self, key: str, members: dict[str, storage.Range]) -> storage.Range:
        names = [self.image] if self.image else [s for s in members if f".{s.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        if not names or names[0] not in members:
            raise RecordError(f"{key}: members {_listed(members)}; expected {self.image or 'an image'}",
                              reason="missing_image")  # fmt: skip
        if members[names[0]][1] > MAX_IMAGE:
            raise RecordError(f"{key}: an image of {members[names[0]][1]:,} bytes; at most {MAX_IMAGE:,} expected",
                              reason="large_image")  # fmt: skip
        return members[names[0]]

    def _text(self, key: str, members: dict[str, storage.Range]) -> tuple[str, storage.Range]:
        """(the field in JSON or nothing, where the text lies)."""
        suffix, _, field = self.text.partition(":")
        suffix = suffix or next((one for one in ("txt", "json", "cls") if one in members), "txt")
        if suffix not in members:
            raise RecordError(f"{key}: members {_listed(members)}; expected {self.text or 'txt, json or cls'}",
                              reason="missing_caption")  # fmt: skip
        field = field or ("caption" if suffix == "json" else "")
        limit = MAX_JSON if field else MAX_TEXT
        if members[suffix][1] > limit:
            raise RecordError(f"{key}: a {suffix} of {members[suffix][1]:,} bytes; at most {limit:,} expected",
                              reason="long_caption")  # fmt: skip
        return field, members[suffix]

    def _captions(self, data: bytes, field: str, key: str) -> tuple[str, ...]:
        value: Any = json_field(data, field, key) if field else data
        return read_captions(value, key, self.classes)

    def pair(self, index: Index, row: int) -> Pair:
        key, members = self.members(index, row)
        image = self._image(key, members)
        field, text = self._text(key, members)
        pixels, words = storage.read_ranges(index.url, [image, text], key, index.stamp)
        return make_pair(key, checked_image(pixels, key), self._captions(words, field, key))

    def captions(self, index: Index, row: int) -> tuple[str, ...]:
        key, members = self.members(index, row)
        field, text = self._text(key, members)
        return self._captions(storage.read_ranges(index.url, [text], key, index.stamp)[0], field, key)


def json_field(data: bytes, field: str, key: str) -> Any:
    """A field of a JSON object. Raises RecordError, which names those there are."""
    record = json_object(data, key)
    if field not in record:
        raise RecordError(f"{key}: fields {_listed(record)}; expected {field}", reason="missing_caption")
    return record[field]


def _listed(names: Any) -> str:
    return printable(", ".join(list(names)[:20]))[:300] or "none"
