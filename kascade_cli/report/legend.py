"""The key of a figure, in HTML above it, so that it covers no mark."""

from collections.abc import Iterable
from typing import Any

from kascade_cli.report.markup import Safe, tag
from kascade_cli.report.svg import marker


def legend(entries: Iterable[tuple[str, Any, str]], *, line: bool = False) -> Safe:
    """(series class, label, marker) swatches, in the markers' shapes; with `line` on a stroke."""
    items = []
    stroke = '<line class="line" x1="1" y1="6" x2="25" y2="6"/>' if line else ""
    width = 26 if line else 14
    for series, label, shape in entries:
        swatch = Safe(
            f'<svg class="swatch" width="{width}" height="12" viewBox="0 0 {width} 12" aria-hidden="true">'
            f'<g class="{series}">{stroke}{marker(shape, width / 2, 6, 5)}</g></svg>'
        )
        items.append(tag("li", swatch, label))
    return tag("ul", *items, class_="legend")
