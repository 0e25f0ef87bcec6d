"""The losses over several real processes, each with its own rows: value and gradients of one that holds them all."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import test_contrastive
import test_sigmoid
from loss_oracles import NAMES, assert_close, program, rounded, unit_rows
from processes import start_several

from clip_jax import sharding
from clip_jax.evaluation.hosts import read_over_hosts
from clip_jax.losses import contrastive_loss, sigmoid_loss
from launch import cluster

EXAMPLES, SCALE, BIAS = 16, 10.0, -3.0
TEXTS = 11  # that the processes read for each other
LOSSES = {"softmax": (contrastive_loss, (SCALE,)), "sigmoid": (sigmoid_loss, (SCALE, BIAS))}
# (replica, fsdp, tensor); where the tensor axis spans processes, they hold the same rows.
MESHES = {2: [(1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (1, 2, 2), (1, 1, 4)]}


def pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return unit_rows(rng, EXAMPLES, 12), unit_rows(rng, EXAMPLES, 12)


def compute(directory: str, processes: int) -> None:
    """One file for each loss and mesh, and how many rows this process was given."""
    cluster.initialize()
    image, text = pairs()
    for shape in MESHES[processes]:
        mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True)))
        where = sharding.batch_sharding(mesh)
        rows = sharding.local_rows(where, EXAMPLES)
        mine = {"image": image[rows].astype(np.float32), "text": text[rows].astype(np.float32)}
        batch = sharding.put_batch(mine, where, EXAMPLES)
        whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
        for name, (loss, scalars) in LOSSES.items():
            value, gradients = program(loss, mesh, len(scalars))(
                batch["image"], batch["text"], *map(np.float32, scalars)
            )
            found = dict(zip(NAMES, map(np.asarray, whole((value, *gradients))), strict=False))
            file = Path(directory) / f"{name}-{'x'.join(map(str, shape))}-{jax.process_index()}.npz"
            np.savez(file, rows=len(rows), **found)  # type: ignore[arg-type]

    read: list[int] = []

    def read_text(i: int) -> list[str]:
        read.append(i)
        return ["ä", f"{i} " * i]

    texts = read_over_hosts(read_text, TEXTS)
    written = json.dumps({"read": read, "texts": texts})
    (Path(directory) / f"texts-{jax.process_index()}.json").write_text(written)
    jax.distributed.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slowest)])
def test_loss_and_gradients_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    running = start_several(processes, tmp_path / "log", devices=1, main=compute, arguments=[str(tmp_path), processes])
    for process in running:
        process.succeed()
    told = [json.loads((tmp_path / f"texts-{process}.json").read_text()) for process in range(processes)]
    assert sorted(i for one in told for i in one["read"]) == list(range(TEXTS))  # each once
    assert all(one["texts"] == [["ä", f"{i} " * i] for i in range(TEXTS)] for one in told)

    image, text = map(rounded, pairs())
    oracles: dict[str, Any] = {"softmax": test_contrastive.dense, "sigmoid": test_sigmoid.dense}
    for shape in MESHES[processes]:
        for name, (_, scalars) in LOSSES.items():
            expected = oracles[name](image, text, *scalars)
            for index in range(processes):
                found = np.load(tmp_path / f"{name}-{'x'.join(map(str, shape))}-{index}.npz")
                assert found["rows"] == EXAMPLES // (shape[0] * shape[1])
                assert_close(tuple(found[key] for key in NAMES if key in found), expected)
