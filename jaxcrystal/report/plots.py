"""The report's plots as SVG or HTML. Colours and fonts are classes of the page: one plot serves light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ELEMENTS

#: Where the long periods break: period by atomic number of its noble gas.
_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)


def histogram(
    values: Float[np.ndarray, "n"],
    reference: Float[np.ndarray, "m"] | None = None,
    *,
    label: str,
    whole: bool = False,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Shares of `values` as bars, of `reference` as an outline; what lies beyond the axis is counted in its end bins.

    whole: bins of width 1 around the integers, all of them. marks: named vertical lines.
    """
    width, height, left, right, top, bottom = 340, 190, 38, 10, 20, 34
    both = values if reference is None else np.concatenate([values, reference])
    if whole:
        edges = np.arange(both.min() - 0.5, both.max() + 1)
    else:
        edges = np.linspace(*_range(both), 29)
    shares = [np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / len(v) for v in _given(values, reference)]
    peak = max(s.max() for s in shares) * 1.08

    def x(value: float) -> float:
        return left + (value - edges[0]) / (edges[-1] - edges[0]) * (width - left - right)

    def y(share: float) -> float:
        return height - bottom - share / peak * (height - top - bottom)

    parts = []
    for tick in _ticks(0, peak, 3):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_text(left - 5, y(tick) + 3.5, f"{100 * tick:.3g}%", "tick end"))
    for share, start, end in zip(shares[0], edges[:-1], edges[1:], strict=True):
        if share:
            parts.append(
                f'<rect class="bar" x="{x(start) + 0.6:.1f}" y="{y(share):.1f}" rx="1" '
                f'width="{max(x(end) - x(start) - 1.2, 0.6):.1f}" height="{y(0) - y(share):.1f}"/>'
            )
    for share in shares[1:]:
        steps = [f"M{x(edges[0]):.1f} {y(0):.1f}"]
        steps += [f"V{y(s):.1f}H{x(end):.1f}" for s, end in zip(share, edges[1:], strict=True)]
        parts.append(f'<path class="reference" d="{"".join(steps)}V{y(0):.1f}"/>')
    for name, value in (marks or {}).items():
        if edges[0] <= value <= edges[-1]:
            parts.append(f'<line class="mark" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top - 6}" y2="{y(0):.1f}"/>')
            parts.append(_text(x(value) + 3, top - 3, name, "tick"))
    ticks = _ticks(edges[0], edges[-1], 5, whole)
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    parts += [_text(x(tick), height - bottom + 14, f"{tick:.4g}", "tick middle") for tick in ticks]
    parts.append(_text((left + width - right) / 2, height - 5, label, "label middle"))
    return _svg(width, height, parts, label)


def scatter(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], *, label: str, above: str) -> str:
    """A point each; what lies beyond 99 in 100 of them stands at the edge. label: of x; above: of y."""
    width, height, left, right, top, bottom = 340, 190, 38, 10, 24, 34
    (x_low, x_high), (y_low, y_high) = (_range(values) for values in (x, y))

    def place(values: Float[np.ndarray, "n"], low: float, high: float, start: float, end: float) -> np.ndarray:
        return start + (np.clip(values, low, high) - low) / (high - low) * (end - start)

    across, up = (x_low, x_high, left, width - right), (y_low, y_high, height - bottom, top)
    parts = []
    for tick in _ticks(y_low, y_high, 3):
        at = float(place(np.array(tick), *up))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 5, at + 3.5, f"{tick:.3g}", "tick end"))
    points = zip(place(x, *across), place(y, *up), strict=True)
    parts.append(f'<path class="dots" d="{"".join(f"M{a:.1f} {b:.1f}h0" for a, b in points)}"/>')
    base = height - bottom
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    for tick in _ticks(x_low, x_high, 5):
        parts.append(_text(float(place(np.array(tick), *across)), base + 14, f"{tick:.4g}", "tick middle"))
    parts.append(_text((left + width - right) / 2, height - 5, label, "label middle"))
    parts.append(_text(left, top - 10, above, "label"))
    return _svg(width, height, parts, f"{above} and {label}")


def bars(counts: Sequence[tuple[str, int]], total: int, label: str) -> str:
    """Horizontal bars, one a named count, with the count and its share of `total` beside it; HTML, to fit any width."""
    longest = max((count for _, count in counts), default=1) or 1
    rows = "".join(
        f'<span class="name">{escape(name)}</span>'
        f'<span class="track"><i style="width:{count / longest:.2%}"></i></span>'
        f'<b>{count:,}</b><span class="share">{count / total:.1%}</span>'
        for name, count in counts
    )
    return f'<div class="bars" role="group" aria-label="{escape(label, quote=True)}">{rows}</div>'


def periodic_table(
    counts: Mapping[str, float],
    label: str,
    *,
    said: Callable[[float], str] = "{:,} crystals".format,
    written: Callable[[float], str] | None = None,
) -> str:
    """Shades each element by the number of crystals that hold it, or by another number, on a square-root scale.

    said: the number in words, which a pointer shows, 0 of elements that have none. written: what stands in the cell.
    """
    size, gap, written = 40, 3, written or _short
    most = max(counts.values(), default=1)
    parts = []
    for z in range(1, len(ELEMENTS)):
        column, row = _place(z)
        symbol, count = ELEMENTS[z], counts.get(ELEMENTS[z], 0)
        left, top = column * size, row * size + (8 if row > 6 else 0)
        shade = 0.12 + 0.88 * (count / most) ** 0.5 if count else 0
        ink = "cell-text strong" if shade > 0.68 else "cell-text" if count else "cell-text absent"
        parts.append(
            (f'<g data-element="{symbol}">' if count else "<g>") + f"<title>{symbol}: {said(count)}</title>"
            f'<rect class="cell" x="{left}" y="{top}" width="{size - gap}" height="{size - gap}" rx="4"/>'
            f'<rect class="heat" x="{left}" y="{top}" width="{size - gap}" height="{size - gap}" rx="4" '
            f'fill-opacity="{shade:.3f}"/>'
            + _text(left + (size - gap) / 2, top + 17, symbol, f"{ink} middle")
            + (_text(left + (size - gap) / 2, top + 30, written(count), f"{ink} small middle") if count else "")
            + "</g>"
        )
    return _svg(18 * size - gap, 9 * size + 8 - gap, parts, label)


def interval(low: float, high: float, value: float) -> str:
    """A rate and its confidence interval on a line from 0 to 1."""
    parts = [
        '<rect class="track" x="0" y="4" width="200" height="4" rx="2"/>',
        f'<rect class="range" x="{200 * low:.1f}" y="3" width="{max(200 * (high - low), 1.5):.1f}" height="6" rx="3"/>',
        f'<circle class="dot" cx="{min(max(200 * value, 4), 196):.1f}" cy="6" r="4"/>',
    ]
    return _svg(200, 12, parts, f"95 % interval {low:.1%} to {high:.1%}")


def _place(z: int) -> tuple[int, int]:
    """Column and row of an element in the 18-column table; lanthanides and actinides in two rows below."""
    period = next(i for i, noble in enumerate(_NOBLE_GASES) if z <= noble)
    if 57 <= z <= 70 or 89 <= z <= 102:
        return 3 + (z - 57 if z < 80 else z - 89) - 1, period + 2
    from_start = z - (_NOBLE_GASES[period - 1] if period else 0) - 1
    if from_start < 2 and z != 2:
        return from_start, period
    return 17 - (_NOBLE_GASES[period] - z), period


def _range(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Of an axis: all but the last half percent at each end."""
    low, high = np.percentile(values, [0.5, 99.5])
    return (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)


def _given(values: Float[np.ndarray, "n"], reference: Float[np.ndarray, "m"] | None) -> list[np.ndarray]:
    return [values] if reference is None or not len(reference) else [values, reference]


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most about `most` round numbers in [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    if whole:
        step = max(round(step), 1)
    first = np.ceil(low / step - 1e-9)
    return [float(k * step) for k in range(int(first), int(np.floor(high / step + 1e-9)) + 1)]


def _short(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.1f}k"


def _text(x: float, y: float, content: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">{body}</svg>'
