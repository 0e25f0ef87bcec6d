"""What the benchmark of reading measures with: pictures like the web's, and sides that do the same work."""

import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.errors import UserError
from launch.benchmarking import data
from launch.benchmarking.rows import Row, Settings, Skipped


def test_the_pictures_are_like_the_webs_and_the_same_in_tars_and_folder(tmp_path: Path) -> None:
    density = data.make(tmp_path, 10)
    files = sorted((tmp_path / "pairs").glob("*.jpg"))
    sizes = []
    for file in files:
        with Image.open(file) as image:
            sizes.append(image.size)
    assert sorted(sizes) == sorted(data.SIZES)
    assert math.isclose(density, sum(f.stat().st_size for f in files) / sum(math.prod(size) for size in sizes))
    assert 0.1 < density < 0.4
    inside: dict[str, bytes] = {}
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            inside |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert inside == {file.name: file.read_bytes() for file in (tmp_path / "pairs").iterdir()}
    rate, of_a_core = data.bare_loop([str(file) for file in files], 0, 0.2)
    assert 0 < rate <= 1.05 * of_a_core
    assert np.isfinite(data.core_seconds())


def test_a_side_that_is_absent_is_named_and_the_others_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"bare": (200.0, 110.0), "ours": (190.0, 100.0)}

    def in_python(_: str, function: str, *__: object) -> tuple[float, float]:
        if function == "pytorch":
            raise UserError("pytorch: No module named 'webdataset'")
        return rates[function]

    monkeypatch.setattr(data, "in_python", in_python)
    monkeypatch.setattr(data, "PICTURES", 4)
    skipped, row = data.rows(Settings(rounds=2))
    assert isinstance(skipped, Skipped) and "webdataset" in skipped.why
    assert isinstance(row, Row) and math.isclose(row.ratio, 100 / 110) and row.met
