"""TPU chips, and topologies by their usual names.

Figures are those of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, each chip's key specifications, as far as
they could be looked up: v4's and the rates between slices are approximate. What of a chip's HBM a program may use is
what its compiler says where memory runs out. Prices are approximate, in dollars for a chip and hour on demand, and
change: `launch.plan --price` takes yours.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from clip_jax.errors import ConfigError

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one chip can do; rates are a second's."""

    name: str
    flops: float  # bfloat16, dense
    hbm_bytes: float  # what programs may use of it
    hbm_rate: float
    link_rate: float  # bytes one way, of each of its links (4 in two dimensions, 6 in three)
    network_rate: float  # bytes between slices
    price: float
    dimensions: int  # of the torus
    wraps_from: int  # the length of a dimension from which its ends are joined
    devices: int = 1  # that JAX sees for a chip
    clock: float = 0.0  # of what the compiler's own estimates count cycles; 0 where not known


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GiB, 1228e9, 50e9, 6.25e9, 3.22, 3, 4, clock=1.05e9),
        Chip("v5e", 197e12, 15.75 * GiB, 819e9, 50e9, 3.125e9, 1.20, 2, 16, clock=1.5e9),
        Chip("v5p", 459e12, 95.74 * GiB, 2765e9, 100e9, 6.25e9, 4.20, 3, 4, clock=1.75e9),
        Chip("v6e", 918e12, 31.25 * GiB, 1638e9, 100e9, 12.5e9, 2.70, 2, 16),
        Chip("tpu7x", 2307e12, 2 * 94.75 * GiB, 7380e9, 100e9, 12.5e9, 12.00, 3, 4, devices=2),
    )
}

# Accelerator types count TensorCores on v4, v5p and tpu7x (two on a chip), chips on v5e and v6e.
TYPES = {"v4": ("v4", 2), "v5p": ("v5p", 2), "tpu7x": ("tpu7x", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1),
         "v6e": ("v6e", 1)}  # fmt: skip
# libtpu is asked for its compiler only: not for a TPU's metadata, nor for the lock of the chips; without a host's name
# and type it would complain that there are none.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
EXAMPLES = "v5p:4x4x8, v5e:16x16, v4:2x2x2, v6e:8x8, tpu7x:4x4x4, v5litepod-256 or v5p-128"


@dataclass(frozen=True)
class Topology:
    """Chips of one kind in a torus of `shape`, on each of `slices` slices."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} slices of {one}"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @cached_property
    def devices(self) -> Sequence[jax.Device]:
        """Devices to compile for; none of them exists. Raises ConfigError where libtpu is missing or refuses."""
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError("libtpu, the compiler for TPUs, is missing: pip install '.[tpu]' (no TPU is needed)")
        os.environ.update({name: os.environ.get(name, value) for name, value in LIBTPU.items()})
        from jax.experimental import topologies

        shape = (*self.shape, 1)[:3]
        options: dict[str, Any] = {"num_slices": self.slices}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # a chip's two cores as one device
        if any(size % host for size, host in zip(shape, (2, 2, 1), strict=True)):
            options["chips_per_host_bounds"] = (1, 1, 1)
        text = "x".join(map(str, self.shape))
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{text}", **options
            ).devices
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"--topology {self.chip.name}:{text}: {str(error).splitlines()[0]}") from None
        if len(found) != self.chips * self.chip.devices:
            raise ConfigError(f"--topology {self.chip.name}:{text}: libtpu describes {len(found)} devices; expected "
                              f"{self.chips * self.chip.devices}")  # fmt: skip
        return found

    def rate(self, group: Sequence[jax.Device]) -> tuple[bool, float]:
        """(between slices?, bytes a second that a device can send) in a collective of these devices.

        Within a slice a ring runs along each dimension of the torus that the group extends over, both ways where the
        dimension's ends are joined.
        """
        if len({getattr(device, "slice_index", 0) for device in group}) > 1:
            return True, self.chip.network_rate / self.chip.devices
        places: list[tuple[int, ...]] = [getattr(device, "coords", ()) for device in group]
        links = 0
        for axis, length in enumerate(self.shape):
            if len({place[axis] for place in places}) > 1:
                links += 2 if length >= self.chip.wraps_from else 1
        return False, max(links, 1) * self.chip.link_rate / self.chip.devices


def parse(name: str, slices: int = 1) -> Topology:
    """The Topology of a name such as "v5p:4x4x8" or "v5litepod-256". Raises ConfigError for what is none."""
    if found := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name):
        kind = "v5e" if found[1] == "v5litepod" else found[1]
        shape = tuple(int(n) for n in found[2].split("x"))
    elif (found := re.fullmatch(r"(\w+)-(\d+)", name)) and found[1] in TYPES:
        kind, cores = TYPES[found[1]]
        shape = default_shape(name, int(found[2]), cores, CHIPS[kind].dimensions)
    else:
        raise ConfigError(f"--topology {name}: expected a name such as {EXAMPLES}")
    if kind not in CHIPS:
        raise ConfigError(f"--topology {name}: unknown chip {kind}; expected one of {', '.join(CHIPS)}")
    if len(shape) != CHIPS[kind].dimensions or not all(shape):
        raise ConfigError(
            f"--topology {name}: {kind} chips stand in {CHIPS[kind].dimensions} dimensions, as in {EXAMPLES}"
        )
    if slices < 1:
        raise ConfigError(f"--slices {slices}: expected 1 or more")
    return Topology(CHIPS[kind], shape, slices)


def default_shape(name: str, count: int, cores: int, dimensions: int) -> tuple[int, ...]:
    """The shape that an accelerator type of so many cores has: a power of two, as near to a cube as it goes."""
    chips = count // cores
    if chips < 1 or count % cores or chips & (chips - 1):
        raise ConfigError(f"--topology {name}: give the shape of the slice, as in {EXAMPLES}")
    doublings = chips.bit_length() - 1
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)  # one host
    return tuple(2 ** ((doublings + i) // dimensions) for i in range(dimensions))
