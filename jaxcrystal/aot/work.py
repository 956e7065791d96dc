"""What a compiled program does on one chip, read from its text: matrix products, bytes of HBM, collectives.

XLA's own `cost_analysis` counts the body of a loop once, and a model is one loop over its layers. Here every
instruction is multiplied by the trips of all loops around it; where these depend on data, by the most that the caller
says for the loop's scope, so that all figures are upper counts of one run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from jaxcrystal.aot.hlo import Instruction, Program, Shape, braces

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
#: Instructions that move no data: names for what others wrote, or wrappers of what is counted inside them.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "partition-id",
}
FREE |= {"replica-id", "after-all", "opt-barrier", "async-start", "async-update", "async-done", "iota"}
#: Instructions that write a part of an array in its place, and which operand holds that part.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
#: Custom calls that move no data either: a name for memory, or for what is there.
FREE_CALLS = {'"AllocateBuffer"', '"ConcatBitcast"', '"AssumeGatherIndicesInBound"'}


@dataclass(frozen=True)
class Collective:
    """A kind of message: all collectives of one opcode, shape and group."""

    kind: str
    shape: str  #: of the whole array in a group: what an all-gather gives, what a reduce-scatter takes
    bytes: int  #: of that array
    group: tuple[int, ...]  #: partitions that take part, one of the groups; the sender and receiver of a permutation

    @property
    def received(self) -> float:
        """Bytes that a chip has to receive for one of them, if every link is used as well as can be."""
        n = max(len(self.group), 1)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.bytes * share


@dataclass(frozen=True)
class Work:
    """What one chip does in one run of a program."""

    flops: float  #: of matrix products
    hbm_bytes: float  #: read and written, as far as the instructions of the program say
    collectives: Counter[Collective]  #: how often each
    loops: Mapping[str, int | None]  #: that depend on data, by scope: most trips; None, by name: not known, taken as 1
    kernels: tuple[str, ...]  #: custom calls that do not say how many FLOPs they take, by name; these are not counted

    @classmethod
    def of(cls, program: Program, most_trips: Mapping[str, int] = MappingProxyType({})) -> Work:
        """All that `program` does, loops unrolled.

        A loop whose trips depend on data runs as often as `most_trips` says of its scope, and all figures are upper
        bounds if that is the most; one that is not named there is taken to run once, and listed in `loops` as None.
        """
        return _Counter(program).work(most_trips)


@dataclass(frozen=True, eq=False)
class _Counter:
    """Adds up the instructions of a program."""

    program: Program

    @property
    def computations(self) -> Mapping[str, Mapping[str, Instruction]]:
        return self.program.computations

    @cached_property
    def _asynchronous(self) -> set[str]:
        """Channels of collectives that TPU hides in fusions: their instruction is repeated in each, started in one."""
        return {
            channel
            for instructions in self.computations.values()
            if _calls(instructions, "AsyncCollectiveStart")
            for i in instructions.values()
            if i.opcode in COLLECTIVES and (channel := i.attribute("channel_id"))
        }

    def work(self, most_trips: Mapping[str, int]) -> Work:
        flops, moved, collectives = 0.0, 0.0, Counter()
        loops, kernels = {}, []
        for computation, instruction, times, fused in self.program.walk(most_trips):
            if instruction.opcode in ("dot", "convolution"):
                flops += times * self._product_flops(computation, instruction)
            elif instruction.opcode == "custom-call":
                cost = re.search(r'"flops":"?(\d+)', instruction.attributes)
                flops += times * int(cost[1]) if cost else 0
                if not cost and instruction.attribute("custom_call_target") == '"tpu_custom_call"':
                    kernels.append(re.sub(r"\.\d+$", "", instruction.name))
            elif instruction.opcode == "while" and self.program.trip_count(computation, instruction) is None:
                trips = self.program.trips(computation, instruction, most_trips)
                loops[instruction.name if trips is None else instruction.scope] = trips
            elif collective := self._collective(computation, instruction):
                collectives[collective] += times
            if not fused:
                moved += times * self._traffic(computation, instruction)
        return Work(flops, moved, collectives, loops, tuple(dict.fromkeys(kernels)))

    def _product_flops(self, computation: str, product: Instruction) -> float:
        """2 FLOPs for each multiplication of a `dot` or `convolution`, none for those with padding."""
        left, right = (self.computations[computation][name].shapes[0].dims for name in product.operands[:2])
        out = math.prod(product.shapes[0].dims)
        if product.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
            return 2.0 * out * math.prod(left[int(d)] for d in contracted[1].split(",") if d)
        inputs, kernel, outputs = re.match(r"(\w+)_(\w+)->(\w+)", product.attribute("dim_labels")).groups()
        window = dict(re.findall(r"(\w+)=([\dx_\-]+)", braces(product.attributes, "window")))
        spatial = sorted(c for c in kernel if c.isdigit())
        sides = {name: value.split("x") for name, value in window.items()}
        pairs = 1
        for at, axis in enumerate(spatial):
            size = int(sides["size"][at])
            low, _ = map(int, sides["pad"][at].split("_")) if "pad" in sides else (0, 0)
            stride, spread, dilate = (
                int(sides[name][at]) if name in sides else 1 for name in ("stride", "lhs_dilate", "rhs_dilate")
            )
            places = np.arange(product.shapes[0].dims[outputs.index(axis)])[:, None] * stride - low
            places = places + np.arange(size)[None, :] * dilate
            real = (places >= 0) & (places % spread == 0) & (places // spread < left[inputs.index(axis)])
            pairs *= int(real.sum())
        batch, features = (product.shapes[0].dims[outputs.index(c)] for c in "bf")
        groups = int(product.attribute("batch_group_count") or 1)
        return 2.0 * pairs * batch * features * right[kernel.index("i")] / groups

    def _collective(self, computation: str, instruction: Instruction) -> Collective | None:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        if self._hidden(computation, instruction):
            return None
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        operands = [s for name in instruction.operands for s in self.computations[computation][name].shapes]
        shapes = operands
        if kind == "all-gather":
            results = instruction.shapes
            shapes = results[len(operands) :] if instruction.opcode.endswith("-start") else results
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", braces(instruction.attributes, "source_target_pairs", "}}") + "}")
            group = next((tuple(map(int, pair)) for pair in pairs if pair[0] != pair[1]), (0,))
        else:
            group = first_group(_groups(instruction.attributes))
        shown = " ".join(
            f"{count} × {shape}" if count > 1 else shape for shape, count in Counter(map(str, shapes)).items()
        )
        return Collective(kind, shown, sum(s.bytes for s in shapes), group)

    def _traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes of HBM that an instruction of a computation reads and writes; fusions count as one instruction."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode.endswith("-update"):
            return 0
        if opcode == "custom-call" and instruction.attribute("custom_call_target") in FREE_CALLS:
            return 0
        instructions = self.computations[computation]
        reads = [
            sum(_hbm(s) for s in instructions[name].shapes) for name in instruction.operands if name in instructions
        ]
        writes = sum(_hbm(s) for s in instruction.shapes)
        if opcode == "fusion":
            return self._fusion_traffic(instruction, reads)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return min(reads[0], sum(s.bytes for s in instruction.shapes)) + writes
        if opcode in UPDATES:
            return 2 * reads[UPDATES[opcode]] + (reads[1] if opcode == "scatter" else 0)
        if opcode.endswith("-start"):  # the result holds the operand, the destination and what synchronizes them
            destination = instruction.shapes[0 if opcode == "copy-start" else len(reads)]
            moved = destination.bytes if opcode == "slice-start" else None
            return (sum(reads) if moved is None else min(sum(reads), moved)) + _hbm(destination)
        return sum(reads) + writes

    def _fusion_traffic(self, fusion: Instruction, reads: Sequence[int]) -> float:
        """A fusion reads of an operand only the slices that it takes, and writes only the slice that it updates.

        Of a collective that it hides, its start counts what is read and written; others only pass that on.
        """
        called = fusion.attribute("calls")
        inside = self.computations[called]
        if _calls(inside, "AsyncCollectiveDone"):
            return 0
        updates = [
            (math.prod(i.shapes[0].dims), self.computations[name][i.operands[UPDATES[i.opcode]]].shapes[0].bytes)
            for name, i, _, _ in self.program.walk({}, called)
            if i.opcode in UPDATES
        ]
        total = sum(self._taken(called, number, whole) for number, whole in enumerate(reads))
        root = next(i for i in inside.values() if i.root)
        for at, shape in enumerate(fusion.shapes):
            if root.opcode == "tuple":
                passed = inside[root.operands[at]].opcode == "parameter" or self._hidden(
                    called, inside[root.operands[at]]
                )
            else:
                passed = _calls(inside, "AsyncCollectiveStart") and at < len(reads)
            if not passed:
                slices = (size for elements, size in updates if elements == math.prod(shape.dims))
                total += min(_hbm(shape), next(slices, math.inf))
        return total

    def _taken(self, computation: str, number: int, whole: int) -> float:
        """Bytes that a fused computation reads of its parameter with this number, which has `whole` bytes in HBM."""
        instructions = self.computations[computation].values()
        names = {i.name for i in instructions if i.opcode == "parameter" and int(i.arguments) == number}
        taken = 0.0
        for user in instructions:  # a name is defined before it is used
            for at, name in enumerate(user.operands):
                if name not in names or user.opcode == "tuple" or self._hidden(computation, user):
                    continue
                if self._renames(user) and not user.root:
                    names.add(user.name)
                elif user.opcode == "fusion":
                    taken += self._taken(user.attribute("calls"), at, whole)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                    taken += user.shapes[0].bytes
                elif user.opcode not in UPDATES or at != 0:
                    taken += whole
        return min(whole, taken)

    def _renames(self, instruction: Instruction) -> bool:
        """Whether an instruction of a fusion gives its operand another name or layout, and takes nothing of it."""
        if instruction.opcode == "fusion":
            inside = self.computations[instruction.attribute("calls")].values()
            return len(instruction.operands) == 1 and all(i.opcode == "parameter" or self._renames(i) for i in inside)
        return instruction.opcode in ("bitcast", "copy")

    def _hidden(self, computation: str, instruction: Instruction) -> bool:
        """Whether this is one more copy of a collective that another fusion starts."""
        asynchronous = instruction.opcode in COLLECTIVES and instruction.attribute("channel_id") in self._asynchronous
        return asynchronous and not _calls(self.computations[computation], "AsyncCollectiveStart")


def first_group(text: str) -> tuple[int, ...]:
    """The partitions of the first group of `replica_groups`, in any notation. Raises ValueError for an unknown one.

    {{0,1},{2,3}}      lists
    [2,2]<=[4]         what a transposed iota gives: [2,2]<=[2,2]T(1,0)
    mesh['a'=2,'b'=2] {'b'}    axes of a mesh; with `, device_ids=([2,2]T(1,0))` its partitions are transposed so
    """
    if found := re.match(r"\{\{([\d,]*)\}", text):
        return tuple(int(i) for i in found[1].split(",") if i)
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, dims, order = ([int(i) for i in part.split(",")] if part else None for part in found.groups())
        return tuple(np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups)[0].tolist())
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    if found := re.fullmatch(rf"mesh\[([^\]]*)\]{order} \{{((?:'\w+',?)*)\}}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        chosen = re.findall(r"\w+", found[4])
        numbers = np.arange(math.prod(sizes.values()))
        if found[2]:
            dims, axes = ([int(i) for i in part.split(",")] for part in (found[2], found[3]))
            numbers = numbers.reshape(dims).transpose(axes)
        numbers = numbers.reshape(*sizes.values())
        return tuple(numbers[tuple(slice(None) if a in chosen else 0 for a in sizes)].ravel().tolist())
    raise ValueError(f"replica_groups={text}: a notation that is not known here")


def _groups(attributes: str) -> str:
    """The value of `replica_groups`."""
    found = re.search(r"replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)", attributes)
    return found[1] if found else ""


def _calls(instructions: Mapping[str, Instruction], target: str) -> bool:
    return any(f'"{target}"' in i.attributes for i in instructions.values() if i.opcode == "custom-call")


def _hbm(shape: Shape) -> int:
    return shape.bytes if shape.memory == 0 else 0
