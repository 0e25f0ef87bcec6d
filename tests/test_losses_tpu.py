"""What the losses cost on TPUs, read from programs compiled for them; no TPU is needed, or touched."""

import os
from collections.abc import Callable
from functools import cache

# libtpu is asked for its compiler only: not for a TPU's metadata, nor for the lock of the chips.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from loss_oracles import flops, program

from clip_jax import sharding
from clip_jax.losses import contrastive_loss, sigmoid_loss

N, D = 32768, 768
DENSE = 6 * N * N * D  # the products of the logits and of both gradients
MiB = 2**20


@cache
def topology(name: str, chips: int) -> list[jax.Device]:
    one = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **one).devices
    assert len(devices) == chips
    return devices


@pytest.mark.parametrize(
    ("loss", "name", "chips", "bound"),
    [
        (contrastive_loss, "v5e:1x1", 1, 8 * MiB),
        (contrastive_loss, "v5p:2x2x1", 4, 80 * MiB),
        (contrastive_loss, "v5p:4x4x4", 64, 8 * MiB),
        (sigmoid_loss, "v5p:2x2x1", 4, 80 * MiB),
        (sigmoid_loss, "v5p:4x4x4", 64, 8 * MiB),
    ],
    ids=lambda x: getattr(x, "__name__", None) or str(x),
)
def test_loss_and_gradients_of_a_batch_of_32768(
    loss: Callable[..., jax.Array], name: str, chips: int, bound: int
) -> None:
    mesh = sharding.make_mesh({"fsdp": chips}, topology(name, chips))
    embeddings = jax.ShapeDtypeStruct((N, D), jnp.float32, sharding=sharding.batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    scalars = 2 if loss is sigmoid_loss else 1
    traced = program(loss, mesh, scalars).trace(embeddings, embeddings, *[scalar] * scalars)
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= bound

    once_more = 2 * N * N * D if loss is contrastive_loss else 0  # the logits again, in the backward pass
    assert chips * flops(traced.jaxpr.jaxpr) == DENSE + once_more
    products = [line for line in compiled.as_text().splitlines() if " convolution(" in line]
    assert len(products) == (4 if once_more else 3)  # the compiler has added none
    assert all("operand_precision={highest,highest}" in line for line in products)
    assert "all-gather" not in compiled.as_text()
