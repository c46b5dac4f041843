"""Curves as inline SVG in the colours of the page, light or dark; a figure of matplotlib brings its own, and takes longer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

Curve = Sequence[tuple[int, float | None]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 46, 8, 8, 22  # pixels; the last four are around the field
POINTS = 300  # of a curve; longer ones are thinned
DOTS = 40  # points up to which each is marked
COLOURS = 6  # of the page
SCALE = 50.0  # largest over smallest value from which on the axis is logarithmic


def chart(curves: Mapping[str, Curve], percent: bool = False, height: int = HEIGHT, powers: bool = False) -> str:
    """A figure with a legend: what each curve is called, and its last value.

    Args:
        curves: name -> steps and values. None is a gap in the curve and a mark at the foot; nothing is drawn for it.
        percent: whether values are shares.
        powers: whether the axis may be logarithmic.
    """
    known = [value for curve in curves.values() for _, value in curve if value is not None]
    steps = [step for curve in curves.values() for step, _ in curve]
    if not known:
        return '<p class="note">Nothing was measured yet.</p>'
    wide = powers and min(known) > 0 and max(known) > SCALE * min(known)
    x = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = Axis(min(known), max(known), height - BOTTOM, TOP, wide)
    told = "; ".join(f"{name} {_span(curve, percent)}" for name, curve in curves.items())
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(told)}"><title>{escape(told)}</title>']
    for value in y.ticks(4):
        at = f"{y(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{at}" dy="4" text-anchor="end">{number(value, percent)}</text>')
    for value in x.ticks(4):
        anchor = "end" if x(value) > WIDTH - RIGHT - 12 else "middle"  # what is at the edge stays within
        parts.append(f'<text x="{x(value):.1f}" y="{height - 5}" text-anchor="{anchor}">{value:g}</text>')
    for place, curve in enumerate(curves.values()):
        parts += _drawn(curve, x, y, f"c{place % COLOURS}", height)
    legend = "".join(
        f'<li class="c{place % COLOURS}"><i></i>{escape(name)} <b>{_last(curve, percent)}</b></li>'
        for place, (name, curve) in enumerate(curves.items())
    )
    return f'{"".join(parts)}</svg><ul class="legend">{legend}</ul>'


def _drawn(curve: Curve, x: Axis, y: Axis, colour: str, height: int) -> Iterator[str]:
    for piece in pieces(thinned(curve)):
        places = [f"{x(step):.1f} {y(value):.1f}" for step, value in piece]
        if len(places) > 1:
            yield f'<path class="line {colour}" d="M{"L".join(places)}"/>'
        if len(places) == 1 or len(curve) <= DOTS:
            yield "".join(f'<circle class="{colour}" cx="{a}" cy="{b}" r="2"/>' for a, b in (place.split() for place in places))
    missing = [step for step, value in curve if value is None][:POINTS]
    if missing:
        yield f'<path class="missing" d="{"".join(f"M{x(step):.1f} {height - BOTTOM}v-6" for step in missing)}"/>'


def pieces(curve: Curve) -> list[list[tuple[int, float]]]:
    """The parts of a curve between its gaps."""
    found: list[list[tuple[int, float]]] = [[]]
    for step, value in curve:
        if value is None:
            found.append([])
        else:
            found[-1].append((step, value))
    return [piece for piece in found if piece]


def thinned(curve: Curve, most: int = POINTS) -> Curve:
    """Means of neighbours, where there are more points than can be told apart. A gap stays one."""
    if len(curve) <= most:
        return curve
    width, found = math.ceil(len(curve) / most), []
    for start in range(0, len(curve), width):
        part = curve[start : start + width]
        values = [value for _, value in part if value is not None]
        mean = sum(values) / len(values) if len(values) == len(part) else None
        found.append((part[len(part) // 2][0], mean))
    return found


class Axis:
    """Value -> pixel."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False):
        self.logarithmic = logarithmic
        if low == high:
            low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round numbers within, about so many."""
        if self.logarithmic:
            powers = [10.0**n for n in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]
            return powers if len(powers) >= 2 else [self.low, self.high]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float, percent: bool = False) -> str:
    """In at most three figures."""
    return f"{100 * value:.3g}%" if percent else f"{value:.3g}"


def _last(curve: Curve, percent: bool) -> str:
    return number(curve[-1][1], percent) if curve and curve[-1][1] is not None else "missing"


def _span(curve: Curve, percent: bool) -> str:
    known = [(step, value) for step, value in curve if value is not None]
    if not known:
        return "was never a number"
    (first, begun), (last, ended) = known[0], known[-1]
    gaps = len(curve) - len(known)
    return f"from {number(begun, percent)} at step {first} to {number(ended, percent)} at step {last}" + (
        f", missing {gaps} times" if gaps else ""
    )
