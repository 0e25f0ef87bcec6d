"""Images to embed: a folder, a glob, a tar file, one image or a data source, by position."""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clip_jax.data.sources import IMAGE_SUFFIXES, SOURCES, PairSource, open_source
from clip_jax.errors import DataError, RecordError
from clip_jax.files import is_file, is_folder


class Images(Protocol):
    """`images[i]` → (key, encoded bytes). Raises RecordError, which names the image, where it can't be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, bytes]: ...


@dataclass(frozen=True)
class Files:
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        path = self.paths[index]
        try:
            return str(path), path.read_bytes()
        except OSError as error:
            raise RecordError(f"{path}: can't be read ({error.strerror})") from None


class Tar:
    """The images in an uncompressed tar file, read where they lie. Raises DataError where it is none."""

    def __init__(self, path: Path):
        self._path = path
        try:
            with tarfile.open(path, "r:") as tar:
                found = [m for m in tar if m.isfile() and Path(m.name).suffix.lower() in IMAGE_SUFFIXES]
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path}: not a readable tar file, uncompressed as expected ({error})") from None
        self._members = [(f"{path}/{m.name}", m.offset_data, m.size) for m in found]
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        key, offset, size = self._members[index]
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise RecordError(f"{key}: cut off")
        return key, data


@dataclass(frozen=True)
class Records:
    source: PairSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        pair = self.source[index]
        return pair.key, pair.image


def open_images(spec: str) -> Images:
    """Opens a folder (with its subfolders), a glob, a .tar file, an image file, or KIND:WHERE (`data.sources`).

    Files are in the order of their paths. Raises DataError where there is nothing, naming what was expected.
    """
    kind, _, where = spec.partition(":")
    path = Path(spec)
    images: Images
    if is_folder(path):
        images = Files(sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()))
    elif is_file(path):
        images = Tar(path) if path.suffix == ".tar" else Files([path])
    elif where and kind in SOURCES:
        images = Records(open_source(spec))
    elif any(c in spec for c in "*?["):
        root = Path(path.anchor)
        images = Files(sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file()))
    else:
        raise DataError(
            f"{spec}: not found; expected a folder, a glob, a .tar file, an image or KIND:WHERE with KIND one of "
            f"{', '.join(SOURCES)}"
        )
    if len(images) == 0:
        raise DataError(f"{spec}: no images there (expected {', '.join(sorted(IMAGE_SUFFIXES))})")
    return images
