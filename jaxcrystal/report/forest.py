"""The figure of a comparison, a forest plot: every number and every difference as a dot on its 95 % interval.

SVG that stands alone, in light and dark. All rates are drawn from 0 to 100 %, and their differences to one scale;
every other number has a line of its own, from 0 to the largest bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jaxcrystal.report.comparison import Comparison, Difference, Line
from jaxcrystal.report.quantities import SECTIONS, Measured

#: Okabe and Ito's, which colour-blind readers tell apart; more runs than these begin again.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
#: px: of all, of names, numbers' lines, the space between them, and differences as text.
WIDTH, NAMES, NUMBERS, GAP, WORDS = 1080, 320, 270, 84, 200
STEP, PAD = 17, 11  #: px: from run to run, and around the runs of a quantity

_STYLE = """
text { font: 13px system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif; fill: #1d2026; }
.page { fill: #ffffff; } .small { font-size: 11.5px; } .muted { fill: #686d78; } .head { font-weight: 600; }
.section { font-weight: 700; }
.rule { stroke: #e5e2dc; } .track { stroke: #ebe8e2; stroke-width: 2; }
.zero { stroke: #9a9ea8; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e9e8e3; } .page { fill: #15181c; } .muted { fill: #9b9fa9; }
  .rule { stroke: #2b2f37; } .track { stroke: #2b2f37; } .zero { stroke: #767c88; }
}
"""


def draw(comparison: Comparison) -> str:
    """SVG of all numbers, and of their differences from the first run."""
    left, right = NAMES, NAMES + NUMBERS + GAP
    parts: list[str] = []
    top = 26
    for i, run in enumerate(comparison.runs):
        parts.append(f'<circle cx="10" cy="{top - 4}" r="5" fill="{_colour(i)}"/>')
        attempts = f"{run.metrics['counts'].get('attempts', 0):,} attempts"
        parts.append(f'<text x="24" y="{top}"><tspan class="head">{escape(run.name)}</tspan> · {attempts}</text>')
        top += 20
    top += 12
    parts.append(
        f'<text x="{left}" y="{top}"><tspan class="head">number</tspan>'
        '<tspan class="small muted"> with 95 % interval; rates from 0 to 100 %</tspan></text>'
    )
    first = escape(comparison.runs[0].name)
    parts.append(
        f'<text x="{right}" y="{top}"><tspan class="head">difference from {first}</tspan>'
        '<tspan class="small muted"> rates in percentage points</tspan></text>'
    )
    widest = max(_bounds([c for line in comparison.lines if line.quantity.is_rate for c in line.differences]) or [0.01])
    section = None
    for line in comparison.lines:
        if line.quantity.section != section:
            section = line.quantity.section
            top += 30
            parts.append(_text(0, top, SECTIONS.get(section, section), "section"))
            parts.append(f'<line class="rule" x1="0" x2="{WIDTH}" y1="{top + 8}" y2="{top + 8}"/>')
            top += 10
        parts += _row(line, top, left, right, widest)
        top += 2 * PAD + STEP * (sum(number is not None for number in line.numbers) - 1)
    body = "".join(parts)
    size = f'width="{WIDTH + 32}" height="{top + 16}" viewBox="-16 0 {WIDTH + 32} {top + 16}"'
    page = f'<rect class="page" x="-16" width="{WIDTH + 32}" height="{top + 16}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>{page}{body}</svg>\n'


def _row(line: Line, top: float, left: float, right: float, widest: float) -> list[str]:
    quantity = line.quantity
    title = f"{quantity.title}, {quantity.unit}" if quantity.unit else quantity.title
    parts = [_text(0, top + PAD + 4, title)]
    ends = [x for n in line.numbers if n is not None for x in (n.value, *(n.interval or ()))]
    low, high = (0.0, 1.0) if quantity.is_rate else (min(0.0, *ends), max(0.0, *ends) or 1.0)
    reach = widest if quantity.is_rate else max(_bounds(line.differences) or [0.0]) or 1.0
    at = top + PAD
    for run, (number, change) in enumerate(zip(line.numbers, (None, *line.differences), strict=True)):
        if number is None:
            continue
        parts += _number(number, run, at, left, low, high)
        if change is not None:
            parts += _difference(line, change, run, at, right, reach)
        at += STEP
    return parts


def _number(number: Measured, run: int, at: float, left: float, low: float, high: float) -> list[str]:
    def x(value: float) -> float:
        return left + NUMBERS * (value - low) / (high - low)

    bounds = [x(bound) for bound in number.interval] if number.interval is not None else None
    track = f'<line class="track" x1="{left}" x2="{left + NUMBERS}" y1="{at}" y2="{at}"/>'
    written = _text(left + NUMBERS + 8, at + 4, number.quantity.write(number.value), "small")
    return [track, *_dot(x(number.value), bounds, run, at), written]


def _difference(line: Line, change: Difference, run: int, at: float, right: float, reach: float) -> list[str]:
    span = WIDTH - right - WORDS
    middle = right + span / 2

    def x(value: float) -> float:
        return middle + span / 2 * value / reach

    written = change.write(line.quantity)
    if change.value is None:
        return [_text(right, at + 4, written, "small muted")]
    bounds = [x(bound) for bound in change.interval] if change.interval is not None else None
    zero = f'<line class="zero" x1="{middle:.1f}" x2="{middle:.1f}" y1="{at - 7}" y2="{at + 7}"/>'
    return [zero, *_dot(x(change.value), bounds, run, at), _text(right + span + 10, at + 4, written, "small")]


def _dot(x: float, bounds: Sequence[float] | None, run: int, at: float) -> list[str]:
    parts = [f'<circle cx="{x:.1f}" cy="{at}" r="4" fill="{_colour(run)}"/>']
    if bounds is not None:
        start, end = bounds
        line = f'x1="{start:.1f}" x2="{end:.1f}" y1="{at}" y2="{at}" stroke="{_colour(run)}"'
        parts.insert(0, f'<line {line} stroke-width="4" stroke-opacity="0.45" stroke-linecap="round"/>')
    return parts


def _bounds(changes: Sequence[Difference | None]) -> list[float]:
    """How far from 0 differences and their intervals reach."""
    return [abs(x) for c in changes if c is not None and c.value is not None for x in (c.value, *(c.interval or ()))]


def _colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def _text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'
