"""What the benchmark of reading measures with: pictures like the web's, and sides that do the same work."""

import math
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from launch.benchmarking import data


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
    assert data.spread([1.0, 3.0, 2.0]) == "2 (1 to 3)" and np.isfinite(data.core_seconds())
