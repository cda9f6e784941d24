"""Reads a compiled program's HLO text: which collectives run how often on how many bytes, and the memory traffic.

The text is that of one device (`compiled.as_text()`). Loops count as often as the compiler says they turn; a loop of
unknown length counts once. Of two branches the one counts that is taken where the condition holds.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "c64": 8, "c128": 16}
BYTES |= {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 32, 64)}
# Ops that move nothing by themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "async-update", "async-done", "copy-done"),
}
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Op:
    name: str
    shape: str
    kind: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", _arguments(self.rest))

    def called(self, key: str) -> list[str]:
        found = re.search(key + r"=\{?((?:%[\w.\-]+(?:, )?)+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []


@dataclass(frozen=True)
class Collective:
    """`sent` bytes leave each device in one run of it, `times` runs; `group`: the devices of its first group."""

    kind: str
    sent: float | int
    times: int
    group: tuple[int, ...]


@dataclass
class Program:
    """`computations` by name, each a dict of its ops; `entry` is where it starts."""

    computations: dict[str, dict[str, Op]] = field(default_factory=dict)
    entry: str = ""

    def visits(self) -> Iterator[tuple[str, int]]:
        """Every computation that runs, but for the insides of fusions, and how often."""
        todo = [(self.entry, 1)]
        while todo:
            name, times = todo.pop()
            yield name, times
            for op in self.computations[name].values():
                turns = times * (self._turns(op) if op.kind == "while" else 1)
                if op.kind in ("while", "call", "conditional", "async-start"):
                    for key in ("body", "condition", "to_apply", "true_computation", "calls"):
                        todo += [(called, turns) for called in op.called(key) if called in self.computations]
                    todo += [(called, turns) for called in op.called("branch_computations")[-1:]]

    def _turns(self, loop: Op) -> int:
        """How often a loop turns: as the compiler notes it, or the constant that its counter is compared with."""
        noted = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest)
        if noted:
            return int(noted[1])
        condition = [op for name in loop.called("condition") for op in self.computations.get(name, {}).values()]
        limits = [int(op.rest.partition(")")[0]) for op in condition if op.kind == "constant" and "s32" in op.shape]
        return max(limits, default=1)

    def collectives(self) -> list[Collective]:
        found = []
        for name, times in self.visits():
            chains: set[str] = set()
            for op in self.computations[name].values():
                kind = op.kind.removesuffix("-start")
                if kind in COLLECTIVES:
                    found.append(_collective(kind, op, self.computations[name], times))
                if kind == "fusion":
                    found += self._fused_collectives(op, times, chains)
        return found

    def _fused_collectives(self, fusion: Op, times: int, chains: set[str]) -> Iterator[Collective]:
        """On TPU a reduce-scatter is a fusion of an all-reduce and the slice of it that is kept.

        A collective that goes on behind other work there is written into each of these fusions: `chains` has those
        that were counted.
        """
        for name in fusion.called("calls"):
            inside = self.computations.get(name, {})
            for op in inside.values():
                if op.kind in COLLECTIVES:
                    chain = re.search(r'chain_id="(\d+)"', op.rest)
                    if chain:
                        if chain[1] in chains:
                            continue
                        chains.add(chain[1])
                    kind = "reduce-scatter" if op.kind == "all-reduce" and "reduce-scatter" in name else op.kind
                    yield _collective(kind, op, inside, times)

    def traffic(self) -> float | int:
        """Bytes that ops and fusions read and write: an upper bound of memory traffic, since caches are not seen."""
        return sum(
            times * sum(self._moved(op, self.computations[name]) for op in self.computations[name].values())
            for name, times in self.visits()
        )

    def _moved(self, op: Op, near: dict[str, Op]) -> float | int:
        if op.kind in FREE or op.kind.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            return 0.0
        if op.kind == "fusion":
            inside = [self.computations[name] for name in op.called("calls") if name in self.computations]
            if inside:
                return _fused(inside[0])
        read = [size(near[name].shape) for name in op.operands if name in near]
        if op.kind == "dynamic-slice":
            return 2 * size(op.shape)
        if op.kind == "dynamic-update-slice":
            return 2 * (read[1] if len(read) > 1 else 0)
        return sum(read) + size(op.shape)


def parse(text: str) -> Program:
    """The computations of an HLO module."""
    program, current = Program(), {}
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
        if head and not line.startswith(" "):
            current = program.computations[head[2]] = {}
            program.entry = head[2] if head[1] else program.entry
            continue
        found = _OP.match(line)
        if found and (after := _kind(found[2])):
            shape, kind, rest = after
            current[found[1]] = Op(found[1], shape, kind, rest, line.lstrip().startswith("ROOT"))
    assert program.entry, "no ENTRY in the HLO text"
    return program


def size(shape: str) -> float | int:
    """Bytes of a shape, or of all shapes of a tuple."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES.get(kind, 0) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in parts)


def _fused(ops: dict[str, Op]) -> float | int:
    """What a fusion reads and writes: of what is only sliced, or updated in place, the slices alone."""
    users: dict[str, list[Op]] = {}
    for op in ops.values():
        for name in op.operands:
            users.setdefault(name, []).append(op)
    total = 0.0
    for op in ops.values():
        if op.kind == "parameter":
            using = users.get(op.name, [])
            if using and all(user.kind == "dynamic-slice" for user in using):
                total += sum(size(user.shape) for user in using)
            elif not (using and all(u.kind == "dynamic-update-slice" and u.operands[0] == op.name for u in using)):
                total += size(op.shape)
        if op.root:
            update = ops.get(op.operands[1]) if op.kind == "dynamic-update-slice" else None
            total += size(update.shape if update else op.shape)
    return total


def _collective(kind: str, op: Op, near: dict[str, Op], times: int) -> Collective:
    group = _group(op.rest)
    whole = sum(size(near[name].shape) for name in op.operands if name in near)
    n = max(len(group), 1)
    sent = {
        "all-gather": whole * (n - 1),
        "all-reduce": 2 * whole * (n - 1) / n,
        "reduce-scatter": whole * (n - 1) / n,
        "all-to-all": whole * (n - 1) / n,
        "collective-permute": whole,
    }[kind]
    return Collective(kind, sent, times, group)


def _kind(text: str) -> tuple[str, str, str] | None:
    """(shape, kind, rest) of what stands behind `=`; the shape may be a tuple."""
    end = len(_arguments(text[1:])) + 2 if text.startswith("(") else text.find(" ")
    found = re.match(r" ?([\w\-]+)\((.*)$", text[end:])
    return (text[:end], found[1], found[2]) if found else None


def _group(rest: str) -> tuple[int, ...]:
    """The devices of the first replica group, or of the first pair of a permutation."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        dims = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return tuple(map(int, ids.reshape(int(iota[1]), int(iota[2]))[0]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if mesh:
        return _along(dict(re.findall(r"'([^']+)'=(\d+)", mesh[1])), mesh[2])
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest)
    return tuple(map(int, found[1].split(","))) if found else ()


def _along(sizes: dict[str, str], axes: str) -> tuple[int, ...]:
    """The first devices along axes of a mesh; `'a':(2)4` is the part of size 4 of an axis, after one of size 2."""
    strides, step = {}, 1
    for name, count in reversed(sizes.items()):
        strides[name] = step
        step *= int(count)
    group = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part) if part else int(sizes[name])
        stride = strides[name] * (int(sizes[name]) // (int(before) * count) if part else 1)
        group = (group[:, None] + stride * np.arange(count)).ravel()
    return tuple(map(int, group))


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes an op's operands."""
    depth = 1
    for i, char in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if not depth:
            return rest[:i]
    return rest
