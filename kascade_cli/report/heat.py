"""Heat maps as inline SVG, with their colour scale."""

import math
from collections.abc import Sequence
from typing import Any

from kascade_cli.report.colours import ink_on, viridis
from kascade_cli.report.markup import Safe, text
from kascade_cli.report.svg import label_of, linear_ticks, picture

_MOST_TITLED = 6000  # cells; beyond, what a cell holds is only in the table


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    columns: Sequence[Any],
    rows: Sequence[Any],
    x_label: str,
    y_label: str,
    title: str,
    description: str,
    heading: str = "",
    low: float = 0.0,
    high: float = 1.0,
    width: int = 460,
    cell_height: float | None = None,
    frames: Sequence[tuple[int, int, int]] = (),
) -> Safe:
    """values [rows][columns]; None leaves a cell empty. frames: (row, first column, columns) to mark.

    Raises ValueError for a value that is no number.
    """
    left, top, scale_room = 46, 30 if heading else 10, 46
    cell_w = (width - left - 12) / max(1, len(columns))
    cell_h = min(cell_w, 26) if cell_height is None else cell_height
    if cell_height is None:
        cell_w = min(cell_w, 26 if len(columns) > 3 else 60)
    bottom = top + cell_h * len(rows)
    parts = [f'<text class="heading" x="{left}" y="16">{text(heading)}</text>'] if heading else []
    titled = len(rows) * len(columns) <= _MOST_TITLED
    for r, line in enumerate(values):
        for c, value in enumerate(line):
            if value is None:
                continue
            if not math.isfinite(value):
                raise ValueError(f"{value} in a heat map")
            share = (value - low) / (high - low) if high > low else 1.0
            said = f"<title>{text(rows[r])}, {text(columns[c])}: {value:.3f}</title>" if titled else ""
            place = f'x="{left + c * cell_w:.2f}" y="{top + r * cell_h:.2f}"'
            size = f'width="{cell_w:.2f}" height="{cell_h:.2f}"'
            parts.append(f'<rect class="cell" {place} {size} fill="{viridis(share)}">{said}</rect>')
    for row, first, count in frames:
        place = f'x="{left + first * cell_w:.2f}" y="{top + row * cell_h:.2f}"'
        parts.append(f'<rect class="frame" {place} width="{count * cell_w:.2f}" height="{cell_h:.2f}"/>')
    parts += _ticks(columns, rows, left, top, bottom, cell_w, cell_h)
    middle = left + cell_w * len(columns) / 2
    parts.append(f'<text class="label middle" x="{middle:.0f}" y="{bottom + 33:.0f}">{text(x_label)}</text>')
    turned = f'transform="translate(12 {(top + bottom) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text class="label middle" {turned}>{text(y_label)}</text>')
    parts += _colour_scale(left, bottom + scale_room, min(cell_w * len(columns), 220), low, high)
    used = max(left + cell_w * len(columns) + 12, left + 240)
    return picture(parts, min(width, used), bottom + scale_room + 32, title, description, "heat")


def _ticks(
    columns: Sequence[Any], rows: Sequence[Any], left: float, top: float, bottom: float, cell_w: float, cell_h: float
) -> list[str]:
    """Names at the edge, as many as have room."""
    across = max(1, math.ceil(8.0 * max(len(str(name)) for name in columns) / cell_w))
    down = max(1, math.ceil(13 / cell_h))
    below = f"{bottom + 15:.1f}"
    parts = [
        f'<text class="tick middle" x="{left + (c + 0.5) * cell_w:.1f}" y="{below}">{text(columns[c])}</text>'
        for c in range(0, len(columns), across)
    ]
    parts += [
        f'<text class="tick end" x="{left - 5}" y="{top + (r + 0.5) * cell_h:.1f}" dy="4">{text(rows[r])}</text>'
        for r in range(0, len(rows), down)
    ]
    return parts


def _colour_scale(left: float, top: float, width: float, low: float, high: float) -> list[str]:
    steps = 40
    size = f'y="{top:.1f}" width="{width / steps + 0.3:.2f}" height="9"'
    parts = [
        f'<rect class="cell" x="{left + width * n / steps:.2f}" {size} fill="{viridis((n + 0.5) / steps)}"/>'
        for n in range(steps)
    ]
    for value in linear_ticks(low, high, 5):
        at = left + width * (value - low) / (high - low)
        parts.append(f'<text class="tick middle" x="{at:.1f}" y="{top + 23:.1f}">{text(label_of(value))}</text>')
    return parts


__all__ = ["heat_map", "ink_on"]
