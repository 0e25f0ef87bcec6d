"""Images in a folder, with classes' names or captions beside them."""

from pathlib import Path
from typing import SupportsIndex

from clip_jax.data.sources.records import IMAGE_SUFFIXES, Pair
from clip_jax.errors import DataError, RecordError


class Folder:
    """The images of a folder, in a subfolder for each class, or with captions beside them: cat.jpg, cat.txt.

    A text file holds a caption a line. `classes` are the names of the subfolders in their order; None where there
    are captions. Raises DataError where an image has neither.
    """

    def __init__(self, directory: str | Path):
        root = Path(directory)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        self._paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self._paths:
            raise DataError(f"{root}: no images there (expected {', '.join(sorted(IMAGE_SUFFIXES))})")
        self._parts = len(root.parts)
        self.classes: list[str] | None = None
        if not any(p.with_suffix(".txt").is_file() for p in self._paths):
            if loose := [p for p in self._paths if p.parent == root]:
                raise DataError(f"{loose[0]}: expected in the folder of its class, or with captions beside it (.txt)")
            self.classes = sorted({p.parts[self._parts] for p in self._paths})

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: SupportsIndex) -> Pair:
        path, captions = self._paths[index], self.captions(index)
        try:
            image = path.read_bytes()
        except OSError as error:
            raise RecordError(f"{path}: can't be read ({error.strerror})", reason="unreadable") from None
        return Pair(str(path), image, captions[0], captions=captions if len(captions) > 1 else ())

    def captions(self, index: SupportsIndex) -> tuple[str, ...]:
        """Raises RecordError, naming the file, where there is none or it can't be read."""
        if self.classes:
            return (self._paths[index].parts[self._parts],)
        path = self._paths[index].with_suffix(".txt")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise RecordError(f"{path}: can't be read ({error.strerror})", reason="missing_caption") from None
        except UnicodeDecodeError as error:
            raise RecordError(f"{path}: not UTF-8 (byte {error.start})", reason="not_utf8") from None
        captions = tuple(line.strip() for line in lines if line.strip())
        if not captions:
            raise RecordError(f"{path}: holds no caption; expected one a line", reason="empty_caption")
        return captions
