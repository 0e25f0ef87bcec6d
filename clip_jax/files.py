"""Files that are written whole or not at all, lists of texts, and packages that are the pinned ones or none."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_jax.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end it takes the place of `path`, after an error it is removed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the file and renames: a reader, or a restart after a kill, never sees a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_file(text: str | Path) -> bool:
    """Whether a text, which may be anything, is the name of a file."""
    try:
        return Path(text).is_file()
    except OSError:  # longer than a name may be
        return False


def is_folder(text: str | Path) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises DataError where it is missing, empty or no UTF-8."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The same with their numbers, from 1, which count blank lines as an editor does."""
    try:
        # Not `splitlines`, which also ends a line at U+2028 and the like, as they may stand in JSON's texts.
        every = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        lines = [(number, line) for number, line in every if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from None
    if not lines:
        raise DataError(f"{path}: empty; expected one text a line")
    return lines


def check_digest(path: Path, package: str, sha256: str) -> None:
    """Raises DataError, naming both digests, where a file is not the pinned one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{path} ({package}): sha256 {found}, expected {sha256}")
