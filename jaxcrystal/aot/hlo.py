"""The text of a compiled program as computations of instructions, and how often each of them runs.

    while (layers, 32 ×) ──▶ body ── while (ring of 16 chips, 8 ×) ──▶ body ── collective-permute        runs 256 ×
                                  └─ fusion ──▶ convolution                                              runs  32 ×

Trip counts are stated by the compiler (CPU, GPU) or follow from the loop's counter: its first value, its step and the
constant that it is compared with (TPU). A loop whose trips depend on data has a scope: `jax.named_scope("blocks")`
around it stands in the metadata of its `while` (`op_name="jit(f)/blocks/while"`), so that a caller who knows how often
it runs at most can say so by that name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One array: `bf16[16,4096]{1,0:T(8,128)(2,1)S(1)}`."""

    dtype: str
    dims: tuple[int, ...]
    memory: int  #: memory space, 0 being HBM; on TPU 1 is the vector memory of the core

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = int(digits[1]) if digits else 8 * (self.dtype == "pred")  # a `token` is nothing
        return math.prod(self.dims) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  #: of the result; the leaves, if that is a tuple
    operands: tuple[str, ...]  #: names
    arguments: str  #: what stands between the parentheses
    attributes: str  #: what follows them
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=...` up to the next comma or space, without `%`."""
        found = re.search(rf"(?:^|[ ,{{]){name}=%?([^\s,}}]+)", self.attributes)
        return found and found[1]

    @property
    def scope(self) -> str:
        """What encloses the operation that this comes from: a `jax.named_scope`, or the function; empty if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        path = found[1].split("/") if found else []
        return path[-2] if len(path) > 1 else ""


@dataclass(frozen=True, eq=False)
class Program:
    """The text of a compiled module, as computations of instructions."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """From `compiled.as_text()`. Raises ValueError for a text that is no HLO module."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = None, None
        for line in _lines(text):
            if current is None:
                header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
                if header:
                    current = computations.setdefault(header[2], {})
                    entry = header[2] if header[1] else entry
            elif line == "}":
                current = None
            elif instruction := _instruction(line):
                current[instruction.name] = instruction
        if entry is None:
            raise ValueError("the text holds no ENTRY computation; is it that of a compiled program?")
        return cls(computations, entry)

    def walk(
        self, most_trips: Mapping[str, int], name: str | None = None, times: int = 1, fused: bool = False
    ) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Every instruction of a computation (default: the program) and of what it calls: the computation it stands in,
        how often it runs, and whether it is part of a fusion. A loop runs as often as `trips` says, or else once."""
        name = name or self.entry
        for instruction in self.computations[name].values():
            yield name, instruction, times, fused
            inner = times
            if instruction.opcode == "while":
                trips = self.trips(name, instruction, most_trips)
                inner *= 1 if trips is None else trips
            called = re.findall(
                r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)", instruction.attributes
            )
            if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes):
                called += re.findall(r"[\w.\-]+", branches[1])
            if instruction.opcode in ("fusion", "while", "call", "conditional", "async-start"):
                for inside in called:
                    yield from self.walk(most_trips, inside, inner, fused or instruction.opcode == "fusion")

    def trips(self, computation: str, loop: Instruction, most_trips: Mapping[str, int]) -> int | None:
        """How often the body of a `while` runs: its trip count, or where that depends on data the most that is said of
        its scope; None where nothing is said."""
        known = self.trip_count(computation, loop)
        return most_trips.get(loop.scope) if known is None else known

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None where that depends on data."""
        if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(stated[1])
        condition, body = (self.computations[loop.attribute(part)] for part in ("condition", "body"))
        test = next(i for i in condition.values() if i.root)
        if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
            return None
        left, right = (condition[name] for name in test.operands)
        if left.opcode != "get-tuple-element":
            return None
        at = int(left.attribute("index"))
        limit = self._constant(condition, right, computation, loop)
        start = self._constant(self.computations[computation], self._element(computation, loop, at))
        result = next(i for i in body.values() if i.root)
        step = body[result.operands[at]] if result.opcode == "tuple" else None
        if step is None or step.opcode != "add" or limit is None or start is None:
            return None
        by = [self._constant(body, body[name], computation, loop) for name in step.operands]
        counted = [c for c in by if c is not None]
        if len(counted) != 1 or counted[0] <= 0:
            return None
        last = limit + (test.attribute("direction") == "LE")
        return max(-(-(last - start) // counted[0]), 0)

    def _element(self, computation: str, loop: Instruction, at: int) -> Instruction | None:
        """What a loop starts with in place `at`."""
        start = self.computations[computation].get(loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        return self.computations[computation].get(start.operands[at])

    def _constant(
        self,
        instructions: dict[str, Instruction],
        value: Instruction | None,
        outer: str | None = None,
        loop: Instruction | None = None,
    ) -> int | None:
        """The whole number that `value` is, also where it is a copy, or comes into a loop from outside of it."""
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            value = instructions.get(value.operands[0])
        if value is None:
            return None
        if value.opcode == "constant":
            return int(value.arguments) if re.fullmatch(r"-?\d+", value.arguments) else None
        if value.opcode == "get-tuple-element" and loop is not None:
            body = self.computations[loop.attribute("body")]
            at = int(value.attribute("index"))
            result = next(i for i in body.values() if i.root)
            same = result.opcode == "tuple" and body[result.operands[at]]
            if same and same.opcode == "get-tuple-element" and int(same.attribute("index")) == at:
                return self._constant(self.computations[outer], self._element(outer, loop, at))
        return None


def braces(attributes: str, name: str, end: str = "}") -> str:
    """What `name={...}` holds; nothing where that is missing."""
    found = re.search(rf"{name}=\{{(.*?){end}", attributes)
    return found[1] if found else ""


def _lines(text: str) -> Iterator[str]:
    """Lines, those of an instruction as one: the attributes of a kernel may hold line feeds."""
    whole = ""
    for line in text.splitlines():
        if whole.startswith(" ") and not line.startswith(" ") and line != "}":
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(line: str) -> Instruction | None:
    """`  ROOT %name = type opcode(operands), attributes`."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=head[2],
        opcode=rest[:opening],
        shapes=tuple(_shapes(kind)),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :].lstrip(", "),
        root=bool(head[1]),
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text):
        memory = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), int(memory[1]) if memory else 0)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"a parenthesis does not close: {text[:80]}")
