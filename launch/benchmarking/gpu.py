"""The rows that need a GPU, by the code of those on a CPU; where there is none, they say that they were not run."""

import shutil
from collections.abc import Iterator

from launch.benchmarking import clip, flamingo_3b, loss
from launch.benchmarking.clip import Case
from launch.benchmarking.rows import Result, Settings, Skipped

CASES = (
    Case("ViT-L/14 training step, bf16", "ViT-L/14", "step", 128, 1.2, True, "gpu", "bfloat16", mfu=0.45),
    Case("ViT-B/32 image embedding, bf16", "ViT-B/32", "image", 512, 1.2, True, "gpu", "bfloat16"),
)
EXAMPLES = 32768


def rows(settings: Settings) -> Iterator[Result]:
    if shutil.which("nvidia-smi") is None:
        loss_name = f"contrastive loss and gradient, N = {EXAMPLES:,}"
        for name in (*(case.name for case in CASES), loss_name, *flamingo_3b.NAMES):
            yield Skipped(f"{name}, on a GPU", "no GPU")
        return
    yield from clip.rows_of(CASES, settings)
    yield from loss.rows(settings, EXAMPLES, "gpu")
    yield from flamingo_3b.rows(settings)
