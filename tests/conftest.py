"""Tests run on 8 virtual CPU devices, with compiled programs kept between runs."""

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "jax"
DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
# A collective blocks a thread of XLA's pool on every device: with as many threads as cores or devices, two at a time
# can wait for each other for ever.
os.environ["NPROC"] = str(4 * DEVICES)
# Operations of one device run one after the other: side by side, XLA lets devices begin collectives in different
# orders, and on busy cores they wait for each other for ever (11 of 18 runs of a step of two data sets, three at once).
# 8 devices on 2 cores can starve a collective of the time it is given by default. Most of the suite's time is
# compilation, of programs that run for milliseconds: LLVM is not asked to polish them (XLA's own passes all run), and
# fusions are emitted loop by loop, not through MLIR, which takes twice as long (JAX 0.12 has no choice left).
os.environ["XLA_FLAGS"] = " ".join(
    [
        f"--xla_force_host_platform_device_count={DEVICES}",
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        "--xla_backend_optimization_level=0",
        *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
    ]
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402  (after the environment that it reads)
import pytest  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from clip_jax.sharding import make_mesh  # noqa: E402

ORACLES = Path(__file__).parent / "oracles"
# The modules that take longest, which begin first: two processes then end at about the same time.
LONG = ("multiprocess", "test_flamingo_task", "test_training", "test_plan", "test_quickstart", "test_recipes",
        "test_readmes")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONG) if name in item.nodeid.split("::")[0]), len(LONG))

    items.sort(key=rank)


@pytest.fixture(params=[1, 2, 4, 8], ids=lambda n: f"{n}dev")
def data_mesh(request: pytest.FixtureRequest) -> Mesh:
    """A data-parallel mesh of 1, 2, 4 and 8 devices."""
    return make_mesh({"fsdp": request.param}, jax.devices()[: request.param])
