"""Plots as inline SVG: scales, axes, marks. Colours come from classes of the style sheet (style.py)."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from kascade_cli.report.markup import Safe, text

Point = tuple[float, float]
_ids = itertools.count(1)
WIDTH, HEIGHT = 460, 290


class Scale:
    """Maps values to pixels, linear or logarithmic. Raises ValueError for values that it cannot show."""

    def __init__(self, low: float, high: float, *, log: bool = False, ticks: Sequence[float] | None = None) -> None:
        if not all(map(math.isfinite, (low, high))) or (log and low <= 0):
            raise ValueError(f"{low} to {high} is no axis")
        if high <= low:
            low, high = (low / 2, high * 2 or 1) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.log = low, high, log
        self.given = ticks
        self.pixels = (0.0, 1.0)

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, self.low / 10)
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        first, last = self.pixels
        return first + share * (last - first)

    def ticks(self, most: int = 6) -> list[float]:
        if self.given is not None:
            return list(self.given)
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    step = 10.0 ** math.floor(math.log10(max((high - low) / max(most, 1), 1e-300)))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2 and 5 times powers of ten, or as few as fit."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [
            factor * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for factor in factors
            if low * 0.999 <= factor * 10.0**power <= high * 1.001
        ]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def label_of(value: float) -> str:
    """A tick's number; tiny ones as powers of ten."""
    if value and abs(value) < 1e-3:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**power:.2g}e{power}"
    return f"{value:,.10g}"


class Plot:
    """One panel. Marks are drawn in the order of the calls, over the grid; `svg()` gives the picture."""

    def __init__(
        self,
        x: Scale,
        y: Scale,
        *,
        x_label: str,
        y_label: str,
        heading: str = "",
        x_format: Any = label_of,
        y_format: Any = label_of,
        width: int = WIDTH,
        height: int = HEIGHT,
        left: int = 58,
        x_grid: bool = True,
    ) -> None:
        self.x, self.y, self.width, self.height, self.left = x, y, width, height, left
        self.top, self.right, self.bottom = (30 if heading else 12), width - 14, height - 44
        x.pixels, y.pixels = (left, self.right), (self.bottom, self.top)
        self.parts: list[str] = []
        self.x_grid = x_grid
        if heading:
            self.parts.append(f'<text class="heading" x="{left}" y="16">{text(heading)}</text>')
        self._axes(x_label, y_label, x_format, y_format)

    def _axes(self, x_label: str, y_label: str, x_format: Any, y_format: Any) -> None:
        for value in self.y.ticks():
            at = f"{self.y(value):.1f}"
            self.parts.append(f'<path class="grid" d="M{self.left} {at}H{self.right}"/>')
            name = text(y_format(value))
            self.parts.append(f'<text class="tick end" x="{self.left - 7}" y="{at}" dy="4">{name}</text>')
        last = -math.inf
        for value in self.x.ticks(8):
            at, label = self.x(value), x_format(value)
            if at - last < 7.2 * len(label) + 4:
                continue  # it would touch the one before
            last = at
            if self.x_grid:
                self.parts.append(f'<path class="grid" d="M{at:.1f} {self.top}V{self.bottom}"/>')
            self.parts.append(f'<text class="tick middle" x="{at:.1f}" y="{self.bottom + 17}">{text(label)}</text>')
        middle, height = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        self.parts.append(f'<path class="axis" d="M{self.left} {self.top}V{self.bottom}H{self.right}"/>')
        self.parts.append(f'<text class="label middle" x="{middle:.0f}" y="{self.height - 8}">{text(x_label)}</text>')
        turned = f'transform="translate(13 {height:.0f}) rotate(-90)"'
        self.parts.append(f'<text class="label middle" {turned}>{text(y_label)}</text>')

    def band(self, low: float, high: float, series: str) -> None:
        """From edge to edge between two values of y."""
        top, bottom = sorted((self.y(high), self.y(low)))
        self.parts.append(
            f'<rect class="{series} band" x="{self.left}" y="{top:.1f}" width="{self.right - self.left}" '
            f'height="{max(bottom - top, 0.5):.1f}"/>'
        )

    def level(self, value: float, series: str) -> None:
        """A dashed line from edge to edge."""
        at = f"{self.y(value):.1f}"
        self.parts.append(f'<g class="{series}"><path class="line dashed" d="M{self.left} {at}H{self.right}"/></g>')

    def line(self, points: Iterable[Point], series: str, dashed: bool = False) -> None:
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        if places:
            style = "line dashed" if dashed else "line"
            self.parts.append(f'<g class="{series}"><polyline class="{style}" points="{places}"/></g>')

    def reach(self, x: float, low: float, high: float, series: str, shift: float = 0) -> None:
        """An interval: a vertical stroke with feet, `shift` pixels to the right."""
        at, bottom, top = self.x(x) + shift, self.y(low), self.y(high)
        self.parts.append(
            f'<g class="{series}"><path class="reach" d="M{at:.1f} {bottom:.1f}V{top:.1f}'
            f'M{at - 3:.1f} {bottom:.1f}h6M{at - 3:.1f} {top:.1f}h6"/></g>'
        )

    def dot(
        self, x: float, y: float, series: str, shape: str = "circle", size: float = 4, said: str = "", shift: float = 0
    ) -> None:
        title = f"<title>{text(said)}</title>" if said else ""
        mark = marker(shape, self.x(x) + shift, self.y(y), size)
        self.parts.append(f'<g class="{series}">{title}{mark}</g>')

    def bar(self, x: float, width: float, y: float, series: str, said: str = "") -> None:
        """From the bottom up to y; `width` in pixels, around x."""
        top = self.y(y)
        title = f"<title>{text(said)}</title>" if said else ""
        self.parts.append(
            f'<rect class="{series} bar" x="{self.x(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{max(self.bottom - top, 0):.1f}">{title}</rect>'
        )

    def say(self, x: float, y: float, words: str, *, dx: float = 0, dy: float = 0, anchor: str = "start") -> None:
        self.parts.append(
            f'<text class="note {anchor}" x="{self.x(x) + dx:.1f}" y="{self.y(y) + dy:.1f}">{text(words)}</text>'
        )

    def svg(self, title: str, description: str) -> Safe:
        return picture(self.parts, self.width, self.height, title, description)


def picture(parts: Iterable[str], width: float, height: float, title: str, description: str, style: str = "") -> Safe:
    """The svg element; its title and description are what a screen reader says."""
    number = next(_ids)
    style = f"{style} broad" if width > 700 else style
    return Safe(
        f'<svg class="plot {style}" viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-labelledby="t{number} d{number}"><title id="t{number}">{text(title)}</title>'
        f'<desc id="d{number}">{text(description)}</desc>{"".join(parts)}</svg>'
    )


def marker(shape: str, x: float, y: float, size: float = 4) -> str:
    """A filled mark around (x, y)."""
    if shape == "square":
        half = size * 0.9
        place = f'x="{x - half:.1f}" y="{y - half:.1f}"'
        return f'<rect class="mark" {place} width="{2 * half:.1f}" height="{2 * half:.1f}"/>'
    corners = {
        "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
        "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "star": [
            ((1 if n % 2 else 2.3) * math.sin(n * math.pi / 5), -(1 if n % 2 else 2.3) * math.cos(n * math.pi / 5))
            for n in range(10)
        ],
    }.get(shape)
    if corners is None:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'
    places = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon class="mark" points="{places}"/>'


def restart_ids() -> None:
    """So that a page depends on its files alone."""
    global _ids
    _ids = itertools.count(1)
