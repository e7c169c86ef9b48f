"""Small charts as inline SVG: axes with nice ticks, stage bands, lines, areas and error bars.

Colours are CSS variables, so that light, dark and print need no second drawing. Each chart is drawn twice, wide and
narrow, and the page shows the one that fits, with letters of the same size on a phone and on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron.metrics.report_data import Band, Point


@dataclass(frozen=True)
class Size:
    """A drawing's size and margins, in CSS pixels."""

    name: str
    width: int
    height: int
    left: int = 58
    right: int = 14
    top: int = 26
    bottom: int = 44


WIDE, NARROW = Size("wide", 820, 320), Size("narrow", 360, 270, left=60, right=8)


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`; `label` names quantity and unit. `form` writes a tick."""

    label: str
    low: float
    high: float
    form: str = "plain"
    log: bool = False

    def share(self, value: float) -> float:
        """Where the value lies, 0 at `low` and 1 at `high`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        return (value - low) / ((high - low) or 1.0)

    def ticks(self, count: int) -> list[float]:
        """Round values inside the scale."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1)]
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            return [p * s for p in powers for s in steps if self.low <= p * s <= self.high * 1.0001]
        step = nice_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def text(self, value: float) -> str:
        """A tick's words."""
        if self.form == "percent":
            return f"{100 * value:.4g}%"
        if self.form == "count":
            return short_count(value)
        if self.form == "power" and value:
            mantissa, power = f"{value:.0e}".split("e")
            return f"{mantissa}e{int(power)}"
        return f"{value:.6g}"


def nice_step(rough: float) -> float:
    """The next of 1, 2, 2.5, 5 x 10^n at or above `rough`."""
    if rough <= 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)


def shortened(words: str, letters: int, otherwise: str) -> str:
    """The words if so many letters have room, their beginning, or something shorter where there is hardly any."""
    if len(words) <= letters:
        return words
    return words[: letters - 1] + "…" if letters >= 5 else otherwise


def short_count(value: float) -> str:
    """1500000 -> "1.5M"."""
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


class Drawing:
    """One SVG in the making."""

    def __init__(self, size: Size, x: Axis, y: Axis) -> None:
        self.size, self.x, self.y = size, x, y
        self._marks: list[str] = []

    def px(self, value: float) -> float:
        """Horizontal place of a value."""
        size = self.size
        return size.left + self.x.share(value) * (size.width - size.left - size.right)

    def py(self, value: float) -> float:
        """Vertical place of a value."""
        size = self.size
        return size.height - size.bottom - self.y.share(value) * (size.height - size.top - size.bottom)

    def bands(self, bands: Sequence[Band]) -> None:
        """Stage bands behind everything, each named above; where a name has no room, numbered."""
        top, bottom = self.size.top, self.size.height - self.size.bottom
        for number, band in enumerate(bands, start=1):
            left, right = self.px(max(band.start, self.x.low)), self.px(min(band.end, self.x.high))
            shade = "band even" if number % 2 == 0 else "band"
            self.add(
                f'<rect class="{shade}" x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}"/>'
            )
            if number > 1:
                self.add(f'<line class="bound" x1="{left:.1f}" x2="{left:.1f}" y1="{top - 18}" y2="{bottom}"/>')
            words = shortened(band.name, int((right - left - 8) / 7.2), str(number))
            self.add(f'<text class="stage" x="{left + 5:.1f}" y="{top - 8}">{escape(words)}</text>')

    def axes(self) -> None:
        """Grid lines, ticks and labels of both axes."""
        size = self.size
        bottom, right = size.height - size.bottom, size.width - size.right
        for value in self.y.ticks(5):
            y = self.py(value)
            self.add(f'<line class="grid" x1="{size.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.add(f'<text class="tick end" x="{size.left - 7}" y="{y + 4:.1f}">{escape(self.y.text(value))}</text>')
        for value in self.x.ticks(8 if size.width > 500 else 4):
            x = self.px(value)
            self.add(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            self.add(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17}">{escape(self.x.text(value))}</text>')
        self.add(f'<line class="axis" x1="{size.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (size.left + right) / 2
        self.add(f'<text class="label mid" x="{middle:.1f}" y="{size.height - 6}">{escape(self.x.label)}</text>')
        turned = f"rotate(-90 13 {(size.top + bottom) / 2:.0f})"
        place = f'x="13" y="{(size.top + bottom) / 2:.0f}" transform="{turned}"'
        self.add(f'<text class="label mid" {place}>{escape(self.y.label)}</text>')

    def line(self, points: Sequence[Point], css: str) -> None:
        """A line through the points, cut at the frame."""
        if points:
            path = "".join(f"{'L' if i else 'M'}{self.px(x):.1f} {self.py(y):.1f}" for i, (x, y) in enumerate(points))
            self.add(f'<path class="line {css}" d="{path}"/>', clipped=True)

    def dots(self, points: Sequence[Point], css: str, radius: float = 3.4) -> None:
        """A dot at each point."""
        for x, y in points:
            self.add(
                f'<circle class="dot {css}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius}"/>', clipped=True
            )

    def area(self, upper: Sequence[Point], lower: Sequence[Point], css: str) -> None:
        """The surface between two lines over the same x."""
        there = [f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in upper]
        back = [f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in reversed(lower)]
        if there:
            self.add(f'<path class="area {css}" d="M{"L".join([*there, *back])}Z"/>', clipped=True)

    def add(self, mark: str, clipped: bool = False) -> None:
        """Any SVG element; clipped ones stay inside the frame."""
        if clipped:
            mark = f'<g clip-path="url(#clip-{self.size.name}-ID)">{mark}</g>'
        self._marks.append(mark)

    def svg(self, identity: str, description: str) -> str:
        """The whole element. `identity` is unique on the page; `description` is what a screen reader says."""
        size = self.size
        inner = f'width="{size.width - size.left - size.right}" height="{size.height - size.top - size.bottom}"'
        marks = "".join(self._marks).replace("-ID)", f"-{identity})")
        return (
            f'<svg class="{size.name}" viewBox="0 0 {size.width} {size.height}" role="img" '
            f'aria-label="{escape(description, quote=True)}"><clipPath id="clip-{size.name}-{identity}">'
            f'<rect x="{size.left}" y="{size.top}" {inner}/></clipPath>{marks}</svg>'
        )
