"""The contrastive loss with its gradient beside the dense one, in JAX and in open_clip: time, and memory on top of
the embeddings themselves.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from launch.benchmarking.clip import check_same
from launch.benchmarking.limits import matmul_rate, on_device
from launch.benchmarking.peers import import_peers
from launch.benchmarking.rows import OURS, Result, Row, Settings, Skipped, interleave, seconds
from launch.benchmarking.turns import program, resident_mib

MIB = 2**20
EXAMPLES, WIDTH, SCALE = 8192, 512, 20.0
TIME_GOAL, MEMORY_GOAL = 1 / 1.2, 10.0


class Ran(NamedTuple):
    """Of one turn; `output`: the loss, the norms of both gradients and that of the scale."""

    seconds: float
    output: np.ndarray
    temporaries_mib: float  # by the compiled program; 0 where there is none


def embeddings(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Of unit length, matched pairs being the nearest ones."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(examples, WIDTH))
    text = image + rng.normal(size=image.shape)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return image.astype(np.float32), text.astype(np.float32)


def ours(examples: int, dense: bool) -> Callable[[], Ran]:
    import jax
    import jax.numpy as jnp

    from clip_jax import sharding
    from clip_jax.losses import contrastive_loss

    mesh = sharding.make_mesh({}, jax.devices()[:1])

    def tiled(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return contrastive_loss(image, text, scale, mesh=mesh, axis_names=sharding.BATCH_AXES)

    def whole(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        logits = scale * image @ text.T
        both = [jax.nn.log_softmax(logits, axis=axis) for axis in (0, 1)]
        return -jnp.mean(jnp.stack([jnp.diagonal(x).mean() for x in both]))

    gradient = jax.jit(jax.value_and_grad(whole if dense else tiled, argnums=(0, 1, 2)))
    arguments = (*map(jax.device_put, embeddings(examples)), jnp.float32(SCALE))
    compiled = gradient.lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    mib = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / MIB

    def run() -> Ran:
        start = time.perf_counter()
        loss, found = jax.block_until_ready(compiled(*arguments))
        took = time.perf_counter() - start
        return Ran(took, np.array([loss, *(np.linalg.norm(x) for x in found)]), mib)

    return run


def theirs(examples: int, device: str) -> Callable[[], Ran]:
    torch, _ = import_peers()
    from open_clip.loss import ClipLoss

    on_gpu = device == "gpu"
    at = "cuda" if on_gpu else "cpu"
    image, text = (torch.tensor(x, device=at, requires_grad=True) for x in embeddings(examples))
    scale, loss = torch.tensor(SCALE, device=at, requires_grad=True), ClipLoss()
    loss(image[:8], text[:8], scale).backward()  # what the first call alone brings in is not the loss's

    def run() -> Ran:
        for x in (image, text, scale):
            x.grad = None
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated() / MIB if on_gpu else resident_mib(), time.perf_counter()
        value = loss(image, text, scale)
        value.backward()
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        most = torch.cuda.max_memory_allocated() / MIB if on_gpu else resident_mib(peak=True)
        norms = [x.grad.norm().item() for x in (image, text, scale)]
        return Ran(took, np.array([value.item(), *norms]), most - before)

    return run


def rows(settings: Settings, examples: int = EXAMPLES, device: str = "cpu") -> Iterator[Result]:
    examples = 1024 if settings.quick else examples
    name = f"contrastive loss and gradient, N = {examples:,}, D = {WIDTH}"
    with ExitStack() as stack:
        sides = {OURS: stack.enter_context(program(on_device, device, ours, examples, False))}
        sides["dense, JAX"] = stack.enter_context(program(on_device, device, ours, examples, True))
        if importlib.util.find_spec("open_clip") is None:
            yield Skipped(f"{name}, beside open_clip", "open_clip not installed (pip install -e '.[peers]')")
        else:
            sides["open_clip, ClipLoss"] = stack.enter_context(program(theirs, examples, device))
        found = interleave(sides, settings.rounds)
    check_same(name, {side: [run.result.output for run in runs] for side, runs in found.items()})
    limit = 3 * 2 * examples**2 * WIDTH / matmul_rate(device)
    (mine,) = {run.result.temporaries_mib for run in found[OURS]}
    for peer in list(sides)[1:]:
        yield Row(name, peer, seconds(found[OURS]), seconds(found[peer]), TIME_GOAL,
                  limit=limit, limit_name="its 3 bare matrix products")  # fmt: skip
        memory = max(run.result.temporaries_mib for run in found[peer])
        yield Row(f"{name}: memory", peer, [mine], [memory], MEMORY_GOAL, unit="MiB")
