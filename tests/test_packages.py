"""Pinned packages: what is refused, and with which words."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from clip_jax.data import packages
from clip_jax.errors import DataError
from clip_jax.files import check_digest

PINNED = {"@scope/name": ("1.2.9", "0" * 64)}


def test_digest_mismatch_names_both(tmp_path: Path) -> None:
    path = tmp_path / "package.tgz"
    path.write_bytes(b"content")
    found = hashlib.sha256(b"content").hexdigest()
    check_digest(path, "package", found)
    with pytest.raises(DataError, match=f"package.tgz .*{found}, expected {'0' * 64}"):
        check_digest(path, "package", "0" * 64)


def test_download_without_npm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm: not found"):
        packages.download(PINNED, tmp_path / "cache")


def test_failure_of_npm_is_one_line_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nprintf 'npm error code E1\\nnpm error not there\\nnpm error a log\\n' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match=r"^npm pack @scope/name@1\.2\.9 failed: code E1; not there$"):
        packages.download(PINNED, tmp_path / "cache")


def test_file_of_a_package_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("package/dict/data")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    assert packages.read_member(path, "dict/data") == b"text"
    with pytest.raises(DataError, match="package.tgz: no file dict/index"):
        packages.read_member(path, "dict/index")
