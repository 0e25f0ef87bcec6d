"""CLIP beside open_clip, on the same random weights and inputs, float32: embedding and training steps."""

import importlib.util
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import UserError
from launch.benchmarking.limits import gpu_peak, matmul_rate, on_device
from launch.benchmarking.peers import import_peers
from launch.benchmarking.rows import OURS, Result, Row, Settings, Skipped, interleave, seconds
from launch.benchmarking.turns import program

# Of both sides. At this rate a step moves the loss of random weights by some 0.02, more than may be between the sides:
# one that does not update is seen.
OPTIMIZER = dict(lr=1e-6, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
NEEDED = ("torch", "open_clip")


@dataclass(frozen=True)
class Case:
    name: str
    variant: str
    kind: str  # image or text: the embeddings of that; step: a training step, of both towers
    batch: int
    goal: float
    compiled: bool  # whether torch.compile is measured, too
    device: str = "cpu"  # or "gpu"
    dtype: str = "float32"  # of activations; parameters and optimizer stay in float32
    mfu: float = 0.0  # the goal for the share of the GPU's peak, by its data sheet; 0: not measured


# A turn is so many batches one after the other, as in use, and the last are counted: the first take memory anew that
# the system took back while the other side had its turn.
BATCHES, COUNTED = 5, 2


class Ran(NamedTuple):
    """Of one turn; `output` is the embeddings of its batches, or the losses of its steps."""

    seconds: float
    output: np.ndarray


CASES = {
    "embed": (Case("ViT-B/32 image embedding", "ViT-B/32", "image", 32, 1.5, compiled=True),),
    "step": (Case("ViT-B/32 training step", "ViT-B/32", "step", 64, 1.3, compiled=True),),
    "resnet": (
        Case("RN50 image embedding", "RN50", "image", 32, 0.5, compiled=False),
        Case("RN50 training step", "RN50", "step", 16, 0.5, compiled=False),
    ),
    "text": (Case("text embedding, 77 tokens", "ViT-B/32", "text", 64, 1.5, compiled=True),),
}


def save(directory: Path, variant: str) -> Callable[[], int]:
    """Random weights in open_clip's format. Returns the number of parameters when called."""
    import jax
    import jax.numpy as jnp

    from clip_jax.interop.imported import PREPROCESS
    from clip_jax.interop.open_clip import write_open_clip
    from clip_jax.models.variants import build_two_tower, get_variant
    from clip_jax.sharding import unbox

    config = get_variant(variant)
    model, size = build_two_tower(config), config.vision.image_size
    inputs = {"image": jnp.zeros((1, size, size, 3)), "text": jnp.zeros((1, config.text.context_length), jnp.int32)}
    variables = jax.device_get(unbox(jax.jit(model.init)(jax.random.key(0), inputs)))
    preprocess = {"image_size": size, "interpolation": "bicubic", "resize_mode": "shorter side, centre crop"}
    write_open_clip(directory, config.to_dict(), variables, PREPROCESS["clip"] | preprocess)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return lambda: count


def inputs(directory: Path, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised pixels [B, S, S, 3] and ids [B, L], whose highest, the text's end, stands last."""
    config = json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]
    size, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    rng = np.random.default_rng(0)
    ids = rng.integers(1, text["vocab_size"] - 1, (batch, text["context_length"]))
    ids[:, -1] = text["vocab_size"] - 1
    return rng.normal(size=(batch, size, size, 3)).astype(np.float32), ids.astype(np.int32)


def ours(directory: Path, case: Case) -> Callable[..., Any]:
    """A turn; or, called with "flops", how many operations its products take; or with "gradient", see `theirs`."""
    import jax
    import ml_collections
    import optax

    from clip_jax import sharding
    from clip_jax.interop import published
    from clip_jax.interop.mapping import to_theirs
    from clip_jax.interop.open_clip import layout
    from clip_jax.losses import contrastive_loss
    from clip_jax.models.variants import build_two_tower
    from clip_jax.training.optimizer import make_optimizer
    from configs.clip.common import clip_config
    from launch.planning.model_flops import products_flops

    imported = published.read(f"open_clip:{directory}")
    model, variables = build_two_tower({**imported.config, "dtype": case.dtype}), jax.device_put(imported.variables)
    image, text = map(jax.device_put, inputs(directory, case.batch))
    their_names = layout(imported.config)
    del imported

    def embed(variables: Any, x: Any) -> Any:
        return model.apply(variables, {case.kind: x})[0 if case.kind == "image" else 1]

    if case.kind != "step":
        x = image if case.kind == "image" else text
        fast = jax.jit(embed)

        def run(what: str = "turn") -> Any:
            if what == "flops":
                return products_flops(jax.make_jaxpr(embed)(variables, x).jaxpr)
            return turn_of(lambda: jax.block_until_ready(fast(variables, x)))

        return run

    mesh = sharding.make_mesh({}, jax.devices()[:1])
    options = clip_config(case.variant).optimizer
    options.update(ml_collections.ConfigDict(OPTIMIZER | dict(decay="constant", warmup_steps=0, clip_norm=0.0)))
    optimizer = make_optimizer(options, 1000)

    def loss(params: Any, state: Any, image: Any, text: Any) -> tuple[Any, Any]:
        (images, texts, extras), state = model.apply(
            {"params": params, **state}, {"image": image, "text": text}, train=True, mutable=[*state]
        )
        over: dict[str, Any] = dict(mesh=mesh, axis_names=sharding.BATCH_AXES)
        return contrastive_loss(images, texts, extras["logit_scale"], **over), state

    def step(params: Any, state: Any, moments: Any, image: Any, text: Any) -> Any:
        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state, image, text)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), state, moments, value

    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    held = [params, state, jax.jit(optimizer.init)(params)]
    fast = jax.jit(step, donate_argnums=(0, 1, 2))

    def one_step() -> Any:
        *held[:], value = jax.block_until_ready(fast(*held, image, text))
        return value

    def run_step(what: str = "turn") -> Any:
        if what == "flops":
            return products_flops(jax.make_jaxpr(step)(*held, image, text).jaxpr)
        if what == "gradient":
            one_step()
            return to_theirs(
                their_names, jax.device_get({"params": optax.tree_utils.tree_get(held[2], "mu"), **held[1]})
            )
        return turn_of(one_step)

    return run_step


def theirs(directory: Path, case: Case, compiled: bool) -> Callable[..., Any]:
    """A turn; or, called with "gradient", a step, and what Adam then holds of gradients, by parameter."""
    torch, _ = import_peers()
    import open_clip
    from open_clip.loss import ClipLoss
    from safetensors.torch import load_file

    config = json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config)
    model.load_state_dict(load_file(directory / "open_clip_model.safetensors"))
    pixels, ids = inputs(directory, case.batch)
    device = "cuda" if case.device == "gpu" else "cpu"
    model.to(device)
    image = torch.tensor(pixels.transpose(0, 3, 1, 2)).contiguous().to(device)
    text = torch.tensor(ids.astype(np.int64)).to(device)
    wrap = torch.compile if compiled else lambda function: function
    precision = torch.autocast(device, getattr(torch, case.dtype), enabled=case.dtype != "float32")

    if case.kind != "step":
        model.eval()
        fast = wrap(model.encode_image if case.kind == "image" else model.encode_text)
        x = image if case.kind == "image" else text

        def embed() -> Any:
            with torch.inference_mode(), precision:
                return fast(x, normalize=True).float().cpu()  # waits for it

        return lambda: turn_of(embed)

    model.train()
    forward, loss = wrap(model), ClipLoss()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
        eps=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"],
    )

    def one_step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with precision:
            value = loss(*forward(image, text)[:3])
        value.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach().float().cpu()

    def run_step(what: str = "turn") -> Any:
        if what == "gradient":
            one_step()
            return {name: optimizer.state[p]["exp_avg"].cpu().numpy() for name, p in model.named_parameters()}
        return turn_of(one_step)

    return run_step


def turn_of(one: Callable[[], Any]) -> Ran:
    """Of calls that each wait for their end: the mean time of the last, and what all returned."""
    times, outputs = [time.perf_counter()], []
    for _ in range(BATCHES):
        outputs.append(np.asarray(one()))
        times.append(time.perf_counter())
    return Ran((times[-1] - times[-1 - COUNTED]) / COUNTED, np.stack(outputs))


def rows(group: str, settings: Settings) -> Iterator[Result]:
    """Of CASES[group]."""
    yield from rows_of(CASES[group], settings)


def rows_of(cases: Sequence[Case], settings: Settings) -> Iterator[Result]:
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        for case in cases:
            yield Skipped(case.name, f"{', '.join(absent)} not installed (pip install -e '.[peers]')")
        return
    with tempfile.TemporaryDirectory() as folder:
        saved: dict[str, Path] = {}
        for case in cases:
            directory = saved.setdefault(case.variant, Path(folder) / case.variant.replace("/", "-"))
            if not directory.exists():
                with program(save, directory, case.variant) as count:
                    count()
            yield from beside(directory, replace(case, batch=4) if settings.quick else case, settings)


def beside(directory: Path, case: Case, settings: Settings) -> Iterator[Result]:
    """The rows of one case, one peer after the other: more than two sides' steps do not fit into 24 GiB.

    Raises UserError where the sides' outputs differ.
    """
    name = f"{case.name}, batch {case.batch}"
    yield from turns(name, directory, case, settings, compiled=False)
    if case.compiled and not settings.quick:
        if case.device == "gpu" or shutil.which("c++"):
            yield from turns(name, directory, case, settings, compiled=True)
        else:
            yield Skipped(f"{name}, beside torch.compile", "no C++ compiler, which it needs on a CPU")


def turns(name: str, directory: Path, case: Case, settings: Settings, *, compiled: bool) -> Iterator[Row]:
    peer = "open_clip, torch.compile" if compiled else "open_clip"
    with ExitStack() as stack:
        sides = {
            OURS: stack.enter_context(program(on_device, case.device, ours, directory, case)),
            peer: stack.enter_context(program(theirs, directory, case, compiled)),
        }
        flops = sides[OURS]("flops").result
        if case.kind == "step" and case.dtype == "float32":
            gradients = {side: run("gradient").result for side, run in sides.items()}
            check_gradients(f"{name}, beside {peer}", gradients[OURS], gradients[peer])
        found = interleave(sides, settings.rounds)
    tolerance = 2e-3 if case.dtype == "float32" else 0.05
    check_same(name, {side: [run.result.output for run in runs] for side, runs in found.items()}, tolerance)
    times, limit = seconds(found[OURS]), flops / matmul_rate(case.device, case.dtype)
    yield Row(name, peer, times, seconds(found[peer]), case.goal, limit=limit, limit_name="bare matrix products")
    if case.mfu and compiled:
        yield Row(f"{name}: MFU", "the GPU's peak", times, [flops / gpu_peak()] * len(times), case.mfu)


def check_same(name: str, outputs: dict[str, list[np.ndarray]], tolerance: float = 2e-3) -> None:
    """Raises UserError where two sides did not do the same, turn by turn."""
    (first, expected), *others = outputs.items()
    for side, found in others:
        for turn, (a, b) in enumerate(zip(expected, found, strict=True)):
            apart = float(np.abs(a - b).max())
            if not apart <= tolerance * max(1.0, float(np.abs(b).max())):
                raise UserError(f"{name}: {first} and {side} are {apart:.2g} apart in turn {turn}; nothing is compared")


def check_gradients(
    name: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], tolerance: float = 0.01
) -> None:
    """Raises UserError where a parameter's differ by more than that, relative to its norm or a thousandth of all's.

    (Some, as those of the keys' biases, are 0 but for rounding.)
    """
    norms = {key: float(np.linalg.norm(value)) for key, value in theirs.items()}
    least = 1e-3 * math.hypot(*norms.values())
    for key, value in theirs.items():
        apart = float(np.linalg.norm(np.subtract(ours[key], value))) / max(norms[key], least)
        if not apart <= tolerance:
            raise UserError(f"{name}: the gradients of {key} are {apart:.2g} apart; nothing is compared")
