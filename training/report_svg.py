# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Line charts as SVG text that takes its colours from the page, so that they follow its light and its dark dress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 172
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MOST_POINTS = 300
_RAMP = ((0x2F, 0x5F, 0xA8), (0x8E, 0x5B, 0xA6), (0xC9, 0x5D, 0x78), (0xE0, 0x82, 0x2E))  # dark to bright for all eyes


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the tooltip and the legend.
        x, y: its points.
        color: of CSS.
        low, high: a band around it.
        dashed: drawn so.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False


def ramp(count: int) -> list[str]:
    """Colours from the first to the last of an order, e.g. of layers."""
    found = []
    for index in range(count):
        place = index / max(1, count - 1) * (len(_RAMP) - 1)
        left = min(int(place), len(_RAMP) - 2)
        mixed = [a + (b - a) * (place - left) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True)]
        found.append("#" + "".join(f"{round(channel):02x}" for channel in mixed))
    return found


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, zero: bool = False, dots: bool = False) -> str:
    """An `<svg>` with axes, at most `MOST_POINTS` points per line, and tooltips.

    Args:
        lines: at least one with a point.
        x_label, y_label: what the axes are.
        zero: whether the vertical axis starts at 0.
        dots: whether to mark every point.
    """
    ys = [y for line in lines for values in (line.y, line.low, line.high) for y in values]
    xs = [x for line in lines for x in line.x]
    y_ticks = ticks(min(0.0, *ys), max(ys) or 1.0) if zero else ticks(min(ys), max(ys))
    x_ticks = [t for t in ticks(min(xs), max(xs), 6) if t == int(t) and min(xs) <= t <= max(xs)] or [min(xs)]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> str:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM):.1f}"

    said = "; ".join(f"{line.name} from {number(line.y[0])} to {number(line.y[-1])}" for line in lines[:6] if len(line.y))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label}: {said}")}">']
    for tick in y_ticks:
        px, py = at(x0, tick).split(",")
        parts.append(f'<path class="grid" d="M{LEFT},{py}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{float(py) + 3.5:.1f}" text-anchor="end">{_tick_name(tick, y_ticks)}</text>')
    for tick in x_ticks:
        px, py = at(tick, y0).split(",")
        parts.append(f'<text x="{px}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick_name(tick, x_ticks)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" class="label">{escape(x_label)}</text>')
    for line in lines:
        if len(line.low):
            there, back = zip(line.x, line.high, strict=True), zip(line.x, line.low, strict=True)
            around = " ".join(at(x, y) for x, y in [*there, *reversed(list(back))])
            parts.append(f'<polygon points="{around}" fill="{line.color}" opacity=".2"/>')
        parts.append(_drawn(line, at, dots))
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, at: object, dots: bool) -> str:
    assert callable(at)
    step = max(1, -(-len(line.x) // MOST_POINTS))
    points = [at(x, y) for x, y in zip(line.x[::step], line.y[::step], strict=True)]
    if len(line.x) and (len(line.x) - 1) % step:
        points.append(at(line.x[-1], line.y[-1]))  # the end is what one looks at
    title = f"<title>{escape(line.name)}</title>"
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    drawn = f'<polyline points="{" ".join(points)}" stroke="{line.color}"{dashes}>{title}</polyline>' if len(points) > 1 else ""
    if dots or len(points) == 1:
        for point in points:
            x, y = point.split(",")
            drawn += f'<circle cx="{x}" cy="{y}" r="2.6" fill="{line.color}">{title}</circle>'
    return drawn


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick_name(tick: float, all_ticks: Sequence[float]) -> str:
    """With the digits that tell neighbours apart."""
    step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else 1.0
    if max(map(abs, all_ticks)) >= 1e6 or step < 1e-6:
        return f"{tick:.3g}"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def number(value: float) -> str:
    """With as many digits as a reader needs."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}"
