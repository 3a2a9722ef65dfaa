"""HTML from text that nobody has checked: everything that is not `Safe` is escaped."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from kascade_cli.errors import plain

_LONGEST = 2000


class Safe(str):
    """Markup that was made here."""


def text(value: Any, limit: int | None = _LONGEST) -> Safe:
    """Text from outside as it may stand in HTML, in an attribute too: without control characters, escaped."""
    if isinstance(value, Safe):
        return value
    return Safe(html.escape(plain(value, limit), quote=True))


def join(parts: Iterable[Any], between: str = "") -> Safe:
    return Safe(between.join(text(part) for part in parts))


def tag(name: str, *inside: Any, **attributes: Any) -> Safe:
    """`tag("p", "a < b", class_="note")`; an attribute of None is left out, `_` in names becomes `-`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Safe(f"<{name}{given}>{join(inside)}</{name}>")


def code(value: Any) -> Safe:
    return tag("code", value)


def command(line: str) -> Safe:
    """A command line that breaks between its words, not within an option."""
    return tag("code", join((tag("span", word) for word in line.split()), " ")) if line else Safe("–")


def table(
    columns: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    caption: Any = None,
    left: int = 1,
    class_: str | None = None,
) -> Safe:
    """A table that scrolls sideways where it is too wide. The first `left` columns are names, the others numbers.

    A row that is a `Safe` is taken as it is (`<tr>...</tr>`).
    """
    head = join(
        tag("th", name, scope="col", class_="name" if place < left else None) for place, name in enumerate(columns)
    )
    body = []
    for row in rows:
        if isinstance(row, Safe):
            body.append(row)
            continue
        first = tag("th", row[0], scope="row", class_="name")
        rest = join(
            tag("td", value, class_="name" if place < left else None) for place, value in enumerate(row[1:], 1)
        )
        body.append(tag("tr", first, rest))
    title = tag("caption", caption) if caption else Safe("")
    inside = tag("table", title, tag("thead", tag("tr", head)), tag("tbody", *body), class_=class_)
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label="table")


def details(summary: Any, *inside: Any) -> Safe:
    return tag("details", tag("summary", summary), *inside)


def figure(picture: Any, caption: Any, *, id_: str | None = None, more: Any = Safe("")) -> Safe:
    """A picture (one or more svg), what it shows, and the numbers behind it."""
    return tag("figure", tag("div", picture, class_="panels"), tag("figcaption", caption), more, id_=id_)


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
