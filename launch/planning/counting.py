"""Counts of a compiled program: operations of the matrix unit, bytes to and from memory, bytes between chips."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from launch.planning.hlo import Array, Computation, Instruction, Program, device_groups

# A TPU multiplies bfloat16; a true float32 product takes six such passes, of three parts of each factor.
PASSES = {"highest": 6, "high": 3}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
              "replica-id", "optimization-barrier", "iota", "copy-done", "slice-done", "async-done",
              "send", "send-done", "recv", "recv-done",
              *(f"{name}-done" for name in COLLECTIVES)}  # fmt: skip
NO_TRAFFIC_CALLS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}


@dataclass(frozen=True)
class Operation:
    """An instruction that runs `times` times; the other figures are those of one time."""

    instruction: Instruction
    times: int
    flops: int  # of matrix products and convolutions
    passes: int  # the same, each as often as its precision makes the matrix unit pass
    hbm_bytes: int


@dataclass(frozen=True)
class Collective:
    """A transfer between devices, `times` times; `bytes` are those that one device sends at one time."""

    kind: str
    scope: str
    gathers: bool  # puts shards together, though it may be spelled as a sum of shards among zeros
    times: int
    bytes: int
    group: list[int]  # places in the mesh of one of the groups of devices that exchange


def operations(program: Program) -> Iterator[Operation]:
    """What a device does by itself."""
    for computation, instruction, times in program.executed():
        flops = passes = 0
        for where, inner in program.inside(computation, instruction):
            if inner.opcode in ("dot", "convolution"):
                count = product_flops(where, inner)
                precision = re.search(r"operand_precision=\{(\w+)", inner.attributes)
                flops, passes = flops + count, passes + count * PASSES.get(precision[1] if precision else "", 1)
        moved = hbm_bytes(program, computation, instruction)
        if flops or moved:
            yield Operation(instruction, times, flops, passes, moved)


def product_flops(computation: Computation, product: Instruction) -> int:
    """Floating-point operations of a matrix product or a convolution: 2 for each multiply-add."""
    left, right = (computation.instructions[name].arrays[0] for name in product.operands)
    (out,) = product.arrays
    if product.opcode == "dot":
        contracted = re.findall(r"\d+", product.attribute("lhs_contracting_dims"))
        return 2 * out.size * int(np.prod([left.shape[int(axis)] for axis in contracted], dtype=np.int64))
    return _convolution_flops(product, left, right, out)


def _convolution_flops(product: Instruction, left: Array, right: Array, out: Array) -> int:
    """TPUs do every product as a convolution, a batched one with dilations: only places inside the input count."""
    labels = re.split(r"_|->", product.attribute("dim_labels"))
    window = product.attribute("window").strip("{}")

    def numbers(name: str, default: int) -> list[int]:
        found = re.search(rf"(?:^| ){name}=(\S+)", window)
        return [int(n) for n in found[1].split("x")] if found else [default] * len(spatial)

    spatial = sorted(c for c in labels[0] if c.isdigit())  # a window lists its sizes in this order
    found = re.search(r"(?:^| )pad=(\S+)", window)
    low = [int(pair.split("_")[0]) for pair in found[1].split("x")] if found else [0] * len(spatial)
    strides, dilations, spacings = numbers("stride", 1), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)
    total = 2 * out.shape[labels[2].index("b")] * out.shape[labels[2].index("f")] * right.shape[labels[1].index("i")]
    for i, axis in enumerate(spatial):
        total *= places(
            left.shape[labels[0].index(axis)], right.shape[labels[1].index(axis)], out.shape[labels[2].index(axis)],
            strides[i], low[i], dilations[i], spacings[i],
        )  # fmt: skip
    return total


@cache
def places(length: int, kernel: int, out: int, stride: int, low: int, dilation: int, spacing: int) -> int:
    """Along one axis of a convolution, with so many zeros before the input and with dilations of both: of all pairs of
    an output place and a kernel place, those that meet an element of the input.
    """
    place = np.arange(out)[:, None] * stride - low + np.arange(kernel) * spacing
    return int(((place >= 0) & (place < (length - 1) * dilation + 1) & (place % dilation == 0)).sum())


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes read from and written to the device's main memory by an instruction: operands and results that lie there.

    Of an operand that is only sliced, the slice counts, and of one updated in place, the update.
    """
    opcode = instruction.opcode
    if opcode in NO_TRAFFIC or instruction.attribute("custom_call_target").strip('"') in NO_TRAFFIC_CALLS:
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "fusion":
        return _fusion_bytes(program, instruction, operands)
    if opcode == "dynamic-update-slice":
        return 2 * _in_memory(operands[1])
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_memory(instruction)
    if opcode.endswith("-start"):  # its result is a tuple: what arrives, what leaves, and marks
        return sum(array.bytes for array in instruction.arrays[:2] if not array.space)
    return _in_memory(instruction) + sum(map(_in_memory, operands))


def _in_memory(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if not array.space)


def _fusion_bytes(program: Program, fusion: Instruction, operands: list[Instruction]) -> int:
    body = program.fused(fusion)
    total = 0
    for parameter, operand in zip(body.parameters, operands, strict=True):
        if operand.arrays and not operand.arrays[0].space:
            total += min(_in_memory(operand), sum(_read(program, body, parameter)))
    results = [body.instructions[name] for name in body.root.operands] if body.root.opcode == "tuple" else [body.root]
    return total + sum(_written(body, result) for result in results)


def _read(program: Program, body: Computation, value: Instruction) -> Iterator[int]:
    """What each use of a value inside a fusion reads of it."""
    for user in body.users[value.name]:
        if user.opcode in ("bitcast", "copy") and body.users[user.name]:
            yield from _read(program, body, user)
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            yield sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            yield 0
        elif user.opcode == "fusion":
            inner = program.fused(user)
            for parameter, name in zip(inner.parameters, user.operands, strict=True):
                if name == value.name:
                    yield from _read(program, inner, parameter)
        elif user.opcode not in ("tuple", *COLLECTIVES):  # what is handed on, or sent, is no traffic here
            yield sum(array.bytes for array in value.arrays)


def _written(body: Computation, result: Instruction) -> int:
    while result.opcode in ("bitcast", "copy") and not result.arrays[0].space:
        result = body.instructions[result.operands[0]]
    if result.opcode in ("parameter", *COLLECTIVES):
        return 0
    if result.opcode == "dynamic-update-slice":
        update = body.instructions[result.operands[1]]
        return 0 if result.arrays[0].space else sum(array.bytes for array in update.arrays)
    return _in_memory(result)


def collectives(program: Program, devices: int) -> Iterator[Collective]:
    """What is sent between devices. Rings are assumed: of n devices each sends (n - 1)/n of what all gather."""
    for computation, instruction, times in program.executed():
        around = instruction.scope or program.loop_scopes.get(id(computation), "")
        for where, inner in program.inside(computation, instruction):
            scope = inner.scope or around
            kind = inner.opcode.removesuffix("-start")
            if inner.opcode == "send" and (found := re.search(r'_megascale_transfer_type="(\w+)"', inner.attributes)):
                # Between slices the hosts' runtime does the rest of it: what a device hands over is what is sent.
                handed = sum(array.bytes for array in where.instructions[inner.operands[0]].arrays)
                kind = found[1].lower().replace("_", "-")
                yield Collective(kind, scope, kind == "all-gather", times, handed, list(range(devices)))
                continue
            # A transfer that computations hide stands in each of these fusions once more.
            if kind not in COLLECTIVES or _carried(inner):
                continue
            groups = device_groups(inner, devices)
            size = groups.shape[1]
            given = sum(a.bytes for name in inner.operands for a in where.instructions[name].arrays)
            if kind == "all-reduce" and _scattered(instruction):
                kind = "reduce-scatter"
            sent = {
                "all-gather": given * (size - 1),
                "all-reduce": 2 * given * (size - 1) / size,
                "collective-permute": given,
            }.get(kind, given * (size - 1) / size)
            if sent:
                gathers = kind == "all-gather" or all(_among_zeros(program, where, name) for name in inner.operands)
                yield Collective(kind, scope, gathers, times, round(sent), _longest(groups))


def _among_zeros(program: Program, computation: Computation, name: str) -> bool:
    """Whether an operand is a shard written into zeros: a sum of such is a gathering."""
    value, outer = computation.instructions[name], {}
    while value.opcode in ("copy", "copy-done", "copy-start", "bitcast", "fusion"):
        if value.opcode == "fusion":
            fused = program.fused(value)
            given = (computation.instructions[operand] for operand in value.operands)
            outer = {p.name: operand for p, operand in zip(fused.parameters, given, strict=True)}
            computation, value = fused, fused.root
        else:
            value = computation.instructions[value.operands[0]]
    if value.opcode != "dynamic-update-slice":
        return False
    target = value.operands[0]
    return outer.get(target, computation.instructions[target]).opcode in ("broadcast", "constant")


def _longest(groups: np.ndarray) -> list[int]:
    """The group whose members are farthest apart: a slice's end may lie between them."""
    return groups[np.argmax(groups.max(axis=1) - groups.min(axis=1))].tolist()


def _carried(inner: Instruction) -> bool:
    return inner.config.get("async_collective_fusion_config", {}).get("flag_start", "-1") != "-1"


def _scattered(outer: Instruction) -> bool:
    """A TPU's reduce-scatter is an all-reduce fused with the slice of it that a device keeps."""
    return outer.opcode == "fusion" and "all-reduce-scatter" in outer.attribute("calls")
