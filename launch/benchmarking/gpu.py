"""What needs a GPU, by the same code as the rows on a CPU where there is one; otherwise it says that it was not run."""

import shutil
from collections.abc import Iterator

from launch.benchmarking.rows import Result, Settings, Skipped

ROWS = (
    "ViT-L/14 training step, bf16",
    "ViT-B/32 image embedding on a GPU",
    "contrastive loss and gradient, N = 32,768",
    "Flamingo-3B training step and decode",
)


def rows(settings: Settings) -> Iterator[Result]:
    why = "no GPU" if shutil.which("nvidia-smi") is None else "these rows have no code yet; this machine has a GPU"
    for name in ROWS:
        yield Skipped(name, why)
