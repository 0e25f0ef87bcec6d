"""Reads a compiled program's text (XLA's HLO): what it executes, and how often.

XLA's own cost analysis counts a loop's body once. Here the body counts as often as the loop runs, which stands in
its `known_trip_count` or, on a TPU, follows from its condition (counter < constant), the counter's start and its
step: a loop that the compiler made of a product and a transfer may count by 2.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLS = re.compile(r"(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a shape. `space` 0 is the device's main memory (HBM); others lie on the chip or the host."""

    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...] = ()  # axes, the one whose elements lie side by side first
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def bytes(self) -> int:
        """Bytes in memory, where whole tiles are kept."""
        physical = [self.shape[axis] for axis in reversed(self.layout)] or list(self.shape)
        for i, (length, tile) in enumerate(zip(reversed(physical), reversed(self.tile), strict=False), 1):
            physical[-i] = -(-length // tile) * tile
        return math.prod(physical) * _bits(self.dtype) // 8


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(found[0]) if (found := re.search(r"\d+", dtype)) else 32


@dataclass(frozen=True)
class Instruction:
    """`name = arrays opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result; several for a tuple
    operands: tuple[str, ...]
    arguments: str  # what stands in the parentheses: operands, or a constant's value
    attributes: str
    is_root: bool = False

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """By the attribute that names them, as "body" or "calls": computations."""
        return {key: _NAME.findall(value) for key, value in _CALLS.findall(self.attributes)}

    @cached_property
    def scope(self) -> str:
        """Where in the traced program it comes from: "jit(train_step)/jvp(TwoTower)/vision/…"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The text after `name=`, up to the next comma outside brackets; "" where there is none."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if not found:
            return ""
        depth, start = 0, found.end()
        for i in range(start, len(self.attributes)):
            depth += (self.attributes[i] in "([{") - (self.attributes[i] in ")]}")
            if depth == 0 and self.attributes[i] == ",":
                return self.attributes[start:i]
        return self.attributes[start:]

    @cached_property
    def config(self) -> dict:
        """The compiler's notes; {} where there are none."""
        at = self.attributes.find("backend_config={")
        if at < 0:
            return {}
        return json.JSONDecoder().raw_decode(self.attributes[at + len("backend_config=") :])[0]


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of the caller's operands."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instruction → those that it is an operand of."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users


class Program:
    """A compiled program for one device.

    `uncounted` names loops whose length the text does not say; they are taken to run once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.uncounted: list[str] = []
        self.loop_scopes: dict[int, str] = {}  # id of a loop's body → the loop's scope
        current, entry = None, ""
        for line in text.splitlines():
            if current is None:
                if (found := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                    current = self.computations[found[2]] = Computation()
                    entry = found[2] if found[1] else entry
            elif line.startswith("}"):
                current = None
            elif (instruction := _parse(line)) is not None:
                current.instructions[instruction.name] = instruction
        self.entry = self.computations[entry]

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """(computation, instruction, how often) of all that runs; a fusion is one instruction, see `inside`.

        Of a conditional every branch counts.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: Computation, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                body = self.computations[instruction.called["body"][0]]
                self.loop_scopes[id(body)] = instruction.scope
                yield from self._walk(body, times * self.trips(computation, instruction))
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for names in instruction.called.values():
                    for name in names:
                        yield from self._walk(self.computations[name], times)
            else:
                yield computation, instruction, times

    def fused(self, fusion: Instruction) -> Computation:
        return self.computations[fusion.called["calls"][0]]

    def inside(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """The instruction itself, or all those that a fusion is made of, with the computation they stand in."""
        if instruction.opcode != "fusion":
            yield computation, instruction
            return
        fused = self.fused(instruction)
        for inner in fused.instructions.values():
            yield from self.inside(fused, inner)

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """How often a loop's body runs."""
        known = loop.config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        compare = self._comparison(self.computations[loop.called["condition"][0]])
        if compare is None:
            self.uncounted.append(loop.name)
            return 1
        counter, bound, direction = compare
        span = bound + (direction == "LE") - self._start(computation, loop, counter)
        return max(0, -(-span // self._step(self.computations[loop.called["body"][0]], counter)))

    def _comparison(self, condition: Computation) -> tuple[int, int, str] | None:
        """(the counter's place in the loop's state, the constant, LT or LE) of a loop's condition."""
        given: dict[str, Instruction] = {}  # a fused comparison's parameters → what they are
        root, inner = condition.root, condition
        if root.opcode in ("fusion", "call"):
            inner = self.computations[next(iter(root.called.values()))[0]]
            given = {p.name: condition.instructions[o] for p, o in zip(inner.parameters, root.operands, strict=True)}
            root = inner.root
        if root.opcode != "compare":
            return None
        left, right = (given.get(name, inner.instructions[name]) for name in root.operands)
        direction = root.attribute("direction")
        if direction in ("GT", "GE"):
            left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
        if direction not in ("LT", "LE") or left.opcode != "get-tuple-element" or right.opcode != "constant":
            return None
        return int(left.attribute("index")), int(right.arguments), direction

    def _start(self, computation: Computation, loop: Instruction, counter: int) -> int:
        state = computation.instructions[loop.operands[0]]
        if state.opcode != "tuple":
            return 0
        first = _behind_copies(computation, state.operands[counter])
        return int(first.arguments) if first.opcode == "constant" else 0

    def _step(self, body: Computation, counter: int) -> int:
        """What a body adds to the counter; 1 where it is not spelled as a sum with a constant."""
        total, value = 0, _behind_copies(body, body.root.operands[counter])
        while value.opcode == "add":
            both = [_behind_copies(body, name) for name in value.operands]
            value, constant = sorted(both, key=lambda part: part.opcode == "constant")
            total += int(constant.arguments) if constant.opcode == "constant" else 0
        return max(total, 1)


def _behind_copies(computation: Computation, name: str) -> Instruction:
    value = computation.instructions[name]
    while value.opcode in ("copy", "bitcast", "convert"):
        value = computation.instructions[value.operands[0]]
    return value


def _parse(line: str) -> Instruction | None:
    found = _START.match(line)
    if not found:
        return None
    shape, rest = _split(line[found.end() :])
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split("(" + rest)
    return Instruction(
        name=found[2],
        opcode=opcode.strip(),
        arrays=tuple(_array(*match) for match in _ARRAY.findall(shape)),
        operands=tuple(_NAME.findall(arguments)) if opcode.strip() not in ("constant", "parameter") else (),
        arguments=arguments[1:-1],
        attributes=attributes,
        is_root=bool(found[1]),
    )


def _split(text: str) -> tuple[str, str]:
    """A leading parenthesis, or word, and the rest."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[: found.end()], text[found.end() :]
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _array(dtype: str, shape: str, layout: str) -> Array:
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        tuple(int(n.removeprefix("<=")) for n in shape.split(",") if n),
        tuple(int(n) for n in order.split(",") if n),
        tuple(int(n) for n in tile[1].split(",") if n) if tile else (),
        int(space[1]) if space else 0,
    )


def device_groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups of devices of a collective, [groups, devices of each]; a permutation's pairs, [pairs, 2].

    Three spellings: lists, "[groups,size]<=[n]T(axes)" (reshaped and transposed 0 … n - 1), and a mesh, in an order
    of its own if need be, with the names of the axes that make up a group.

    Raises ValueError for a mesh that is spelt otherwise.
    """
    if pairs := instruction.attribute("source_target_pairs"):
        return np.array(json.loads(pairs.translate(str.maketrans("{}", "[]"))))
    text = instruction.attribute("replica_groups")
    if text.startswith("mesh"):
        mesh, _, rest = text.removeprefix("mesh[").partition("]")
        rest += instruction.attribute("device_ids")  # stands after a comma
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
        order = re.match(r"\(\[([\d,]*)\](?:T\(([\d,]*)\))?\)", rest)
        ids = np.arange(math.prod(sizes.values()))
        if order:
            ids = ids.reshape([int(n) for n in order[1].split(",")])
            ids = ids.transpose([int(n) for n in order[2].split(",")]) if order[2] else ids
        names = list(sizes)
        wanted = [names.index(name) for name in re.findall(r"'(\w+)'", rest.rpartition("{")[2])]
        if "{" not in rest or ("(" in rest and not order):
            raise ValueError(f"replica_groups={text}{rest}: expected a mesh, an order and the axes of a group")
        others = [axis for axis in range(len(names)) if axis not in wanted]
        grid = ids.reshape(tuple(sizes.values())).transpose([*others, *wanted])
        return grid.reshape(-1, math.prod(grid.shape[len(others) :]))
    if found := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", text):
        ids = np.arange(int(found[1]) * int(found[2])).reshape([int(n) for n in found[3].split(",")])
        ids = ids.transpose([int(n) for n in found[4].split(",")]) if found[4] else ids
        return ids.reshape(int(found[1]), int(found[2]))
    listed = json.loads(text.translate(str.maketrans("{}", "[]"))) if text else []
    return np.array(listed if any(listed) else [list(range(devices))])
