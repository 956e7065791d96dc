"""What one compiled program asks of one chip, as lines to read and as plain data."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxcrystal.aot import chips
from jaxcrystal.aot.chips import Bound, Chip
from jaxcrystal.aot.hlo import Program
from jaxcrystal.aot.work import Work

GIB = 2**30
SHOWN = 12  #: collectives that are listed, the largest first


@dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip."""

    arguments: int
    outputs: int  #: without those that take the place of donated arguments
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.program

    @classmethod
    def of(cls, compiled: Compiled) -> Memory:
        """From the compiler's own account."""
        sizes = compiled.memory_analysis()
        outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        code = sizes.generated_code_size_in_bytes
        return cls(sizes.argument_size_in_bytes, outputs, sizes.temp_size_in_bytes, code)


@dataclass(frozen=True)
class Report:
    """One program on one topology. `memory`, `work` and `bound` are None where the compiler ran out of memory."""

    step: str  #: train or decode
    mesh: Mesh
    chip: Chip
    tokens: int  #: that one run works on, on all chips: padding of rows included
    compile_seconds: float
    memory: Memory | None
    work: Work | None
    bound: Bound | None
    cost_analysis: dict[str, float]  #: XLA's own FLOPs and bytes; loops counted once
    needed: float  #: bytes of HBM on one chip
    refusal: str = ""  #: what the compiler said, if it refused

    @property
    def spare(self) -> float:
        """Bytes of HBM that are left; negative where it does not fit."""
        return self.chip.usable_hbm * GIB - self.needed

    @property
    def fits(self) -> bool:
        return self.spare >= 0 and not self.refusal

    @classmethod
    def of(
        cls,
        step: str,
        chip: Chip,
        mesh: Mesh,
        tokens: int,
        compile: Callable[[], Compiled],
        keep: Callable[[str], Any] | None = None,
        most_trips: Mapping[str, int] = MappingProxyType({}),
    ) -> Report:
        """Compiles, and reads off what came out. Raises what `compile` does, unless that is a lack of HBM.

        `keep` is given the program's text; `most_trips` says how often loops that depend on data run at most, as
        `Work.of` has it.
        """
        started = time.perf_counter()
        try:
            compiled = compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            seconds = time.perf_counter() - started
            return cls(step, mesh, chip, tokens, seconds, None, None, None, {}, needed, str(error))
        seconds = time.perf_counter() - started
        text = compiled.as_text()
        if keep is not None:
            keep(text)
        memory, work = Memory.of(compiled), Work.of(Program.parse(text), most_trips)
        counted = compiled.cost_analysis()
        cost = {"flops": counted.get("flops", 0.0), "bytes": counted.get("bytes accessed", 0.0)}
        bound = chips.bound(chip, mesh, work)
        return cls(step, mesh, chip, tokens, seconds, memory, work, bound, cost, memory.total)

    def lines(self) -> list[str]:
        """For a reader."""
        limit = f"{self.chip.usable_hbm:.2f} GiB that the compiler grants of {self.chip.hbm:g}"
        least = "at least " if self.refusal else ""
        verdict = f"{'FITS' if self.fits else 'DOES NOT FIT'}: {least}{self.needed / GIB:.2f} GiB a chip, of {limit}; "
        verdict += f"{abs(self.spare) / GIB:.2f} GiB {'to spare' if self.fits else 'too much'}"
        lines = [f"{self.step}: compiled in {self.compile_seconds:.0f} s", f"  {verdict}"]
        if self.memory is None or self.work is None or self.bound is None:
            return lines + [f"    {line}" for line in largest_allocations(self.refusal)]
        parts = ", ".join(f"{f.name} {getattr(self.memory, f.name) / GIB:.2f}" for f in dataclasses.fields(Memory))
        lines.append(f"  memory a chip, GiB: {parts}")
        lines.append(
            f"  work a chip: {self.work.flops / 1e12:.3f} TFLOP of matrix products, {self.work.hbm_bytes / 1e9:.2f} GB "
            f"of HBM traffic, loops multiplied out (XLA's count, each loop's body once: "
            f"{self.cost_analysis['flops'] / 1e12:.3f} TFLOP, {self.cost_analysis['bytes'] / 1e9:.2f} GB)"
        )
        for loop, trips in self.work.loops.items():
            counted = "not known, counted once: no bound" if trips is None else f"{trips} trips at most, all counted"
            lines.append(f"    {loop}: a loop that depends on data; {counted}")
        if self.work.kernels:
            lines.append(
                f"    not counted, as they do not state it: FLOPs of the kernels {', '.join(self.work.kernels)}"
            )
        lines += self._collective_lines()
        chip, bound = self.chip, self.bound
        lines.append(f"  roofline: {chips.ROOFLINE}")
        lines.append(
            f"    {chip.name}: {chip.peak / 1e12:.0f} TFLOP/s bfloat16, {chip.hbm_bandwidth / 1e9:.0f} GB/s of HBM, "
            f"{chip.link_bandwidth / 1e9:.0f} GB/s a link and direction (Google's data sheets)"
        )
        lines.append(
            f"    compute {bound.compute * 1e3:.2f} ms, HBM {bound.hbm * 1e3:.2f} ms, interconnect "
            f"{bound.interconnect * 1e3:.2f} ms: at least {bound.seconds * 1e3:.2f} ms for {self.tokens} tokens, "
            f"at most {self.tokens / bound.seconds:,.0f} tokens/s"
        )
        return lines

    def _collective_lines(self) -> list[str]:
        counts, received = Counter(), Counter()
        for collective, times in self.work.collectives.items():
            counts[collective.kind] += times
            received[collective.kind] += times * collective.received
        if not counts:
            return ["  collectives: none"]
        kinds = ", ".join(f"{kind} {counts[kind]} x {size / GIB:.3f} GiB" for kind, size in received.most_common())
        lines = [f"  collectives, times run and GiB received a chip in all: {kinds}"]
        ranked = self._messages()
        for message in ranked[:SHOWN]:
            lines.append(
                f"    {message['times']:6d} x {message['kind']:18s} over {message['axes']:14s} {message['shape']:34s} "
                f"{message['received_bytes'] / GIB:.3f} GiB"
            )
        if len(ranked) > SHOWN:
            rest = sum(message["received_bytes"] for message in ranked[SHOWN:])
            lines.append(f"    and {len(ranked) - SHOWN} smaller ones, {rest / GIB:.3f} GiB")
        return lines

    def _messages(self) -> list[dict[str, Any]]:
        """Collectives of one kind, shape and mesh axis together (a ring has two directions), the most bytes first."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for collective, times in self.work.collectives.items():
            axes = chips.mesh_axes(self.mesh, collective.group)
            key = (collective.kind, axes, collective.shape)
            new = {"kind": collective.kind, "axes": axes, "shape": collective.shape, "bytes": collective.bytes}
            message = found.setdefault(key, new | {"times": 0, "received_bytes": 0.0})
            message["times"] += times
            message["received_bytes"] += times * collective.received
        return sorted(found.values(), key=lambda message: -message["received_bytes"])

    def data(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        found: dict[str, Any] = {
            "step": self.step,
            "chip": dataclasses.asdict(self.chip),
            "mesh": dict(self.mesh.shape),
            "tokens": self.tokens,
            "compile_seconds": self.compile_seconds,
            "needed_bytes": self.needed,
            "fits": self.fits,
            "spare_bytes": self.spare,
        }
        if self.memory is None or self.work is None or self.bound is None:
            return found | {"refusal": self.refusal.splitlines()[0]}
        return found | {
            "memory": dataclasses.asdict(self.memory),
            "flops": self.work.flops,
            "hbm_bytes": self.work.hbm_bytes,
            "cost_analysis": self.cost_analysis,
            "data_loops": dict(self.work.loops),
            "uncounted_kernels": list(self.work.kernels),
            "collectives": self._messages(),
            "roofline": dataclasses.asdict(self.bound)
            | {"formula": chips.ROOFLINE, "seconds": self.bound.seconds, "resource": self.bound.resource}
            | {"tokens_per_second": self.tokens / self.bound.seconds},
        }


def needed_bytes(refusal: str) -> float | None:
    """How much HBM a program would take that the compiler refused; None if it refused for another reason."""
    found = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", refusal)
    found = found or re.search(r"total memory required for HLO temporaries \(([\d.]+)([GMK])\)", refusal)
    return float(found[1]) * {"G": 2**30, "M": 2**20, "K": 2**10}[found[2]] if found else None


def largest_allocations(refusal: str) -> list[str]:
    """What the compiler says takes the most, one line each: size, shape, the operation that makes it."""
    lines = []
    for part in re.split(r"\n\s*\d+\. Size: ", refusal)[1:6]:
        shape = re.search(r"Shape: (\S+?)(?:\{|\s)", part)
        name = re.search(r'op_name="?([^"\n]+)', part)
        lines.append(" ".join(filter(None, (part.split()[0], shape and shape[1], name and name[1]))))
    return lines
