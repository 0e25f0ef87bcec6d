"""Files that are written whole or not at all, and packages that are the pinned ones or none."""

import hashlib
import os
from pathlib import Path

from clip_jax.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the file and renames: a reader, or a restart after a kill, never sees a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_digest(path: Path, package: str, sha256: str) -> None:
    """Raises DataError, naming both digests, where a file is not the pinned one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{path} ({package}): sha256 {found}, expected {sha256}")
