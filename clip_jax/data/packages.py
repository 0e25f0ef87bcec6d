"""Pinned npm packages: fetched with the npm client, and believed only with the digest they are pinned to."""

import logging
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from clip_jax.errors import DataError
from clip_jax.files import check_digest


def download(packages: Mapping[str, tuple[str, str]], cache: Path) -> dict[str, Path]:
    """Package → its tarball in `cache`, fetched where it is not there yet.

    Args:
      packages: package → (version, sha256 of the tarball).

    Raises DataError where npm is missing or fails, or a digest is another.
    """
    if shutil.which("npm") is None:
        raise DataError("npm: not found; `launch.prepare` fetches the pinned packages with it")
    cache.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for package, (version, sha256) in packages.items():
        path = cache / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            logging.info("fetching %s %s", package, version)
            command = ["npm", "pack", "--loglevel=error", f"{package}@{version}"]  # --silent hides the reason
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True)
            if done.returncode:
                # The code and its explanation; after them npm gives advice and the path of its log.
                reason = "; ".join(line.removeprefix("npm error ") for line in done.stderr.strip().splitlines()[:2])
                raise DataError(f"npm pack {package}@{version} failed: {reason}")
        check_digest(path, package, sha256)
        tarballs[package] = path
    return tarballs


def read_member(tarball: Path, member: str) -> bytes:
    """The contents of a file of a package. Raises DataError where there is no such file."""
    with tarfile.open(tarball) as tar:
        try:
            file = tar.extractfile(f"package/{member}")
        except KeyError:
            file = None
        if file is None:
            raise DataError(f"{tarball}: no file {member}")
        return file.read()
