"""A sweep's result file: what was asked, and a row for every point that has been measured so far."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kascade_cli.console import to_json
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.files import atomic_write, read_bounded
from kascade_cli.sweeps.plan import Point, point_key

SCHEMA = "kascade-sweep/v1"
MAX_BYTES = 64 << 20
_AT = ("ratio", "keys", "tile", "anchors")


class Result:
    """The document at `path` while a sweep runs; every `add` makes it durable. `path` None: kept in memory."""

    def __init__(self, path: Path | None, head: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> None:
        self.path, self.head = path, head
        self.rows = {row_key(row): row for row in rows}

    def has(self, point: Point) -> bool:
        return point.key in self.rows

    def add(self, point: Point, row: dict[str, Any]) -> None:
        """Keeps a row and writes the file. Raises KascadeError if it cannot be written."""
        self.rows[point.key] = row
        self.write()

    def write(self) -> None:
        if self.path is not None:
            atomic_write(self.path, to_json(self.document()))

    def document(self, order: Sequence[Point] = ()) -> dict[str, Any]:
        """The whole file; rows in the order of the points, then others that earlier runs left."""
        first = {point.key: None for point in order if point.key in self.rows}
        return self.head | {"rows": [self.rows[key] for key in dict.fromkeys([*first, *self.rows])]}


def row_key(row: dict[str, Any]) -> tuple:
    """The `Point.key` of the point that made a row."""
    return point_key(row["strategy"], {name: row[name] for name in _AT if row.get(name) is not None})


def open_result(path: Path | None, head: dict[str, Any], overwrite: bool) -> Result:
    """A new result, or the one at `path` to go on with.

    Raises UsageError if `path` is something else, or was made with other settings; `overwrite` replaces it.
    """
    if path is None or overwrite or not path.exists():
        return Result(path, head)
    old = read_result(path)
    for name in ("sweep", "model", "fingerprint"):
        if old.get(name) != head[name]:
            raise UsageError(f"{path} is of {name} {old.get(name)}, not {head[name]}: pass --overwrite to replace it")
    before, now = old.get("settings"), head["settings"]
    if not isinstance(before, dict):
        raise UsageError(f"{path} does not say with what settings it was made: pass --overwrite to replace it")
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            was, is_ = (_shown(settings.get(name)) for settings in (before, now))
            what = name.replace("_", " ")
            raise UsageError(f"{path} was made with {what} {was}, now {is_}: repeat the old one, or pass --overwrite")
    try:
        return Result(path, head, old["rows"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} has rows that are no sweep's: pass --overwrite to replace it") from error


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 40 else f"{text[:37]}..."


def read_result(path: Path) -> dict[str, Any]:
    """Raises UsageError if the file is no sweep's result."""
    try:
        found = json.loads(read_bounded(path, MAX_BYTES, "sweep"))
    except (ValueError, RecursionError, KascadeError) as error:
        raise UsageError(f"{path} exists and is no sweep's result: pass --overwrite to replace it") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("rows"), list):
        raise UsageError(f"{path} exists and is no sweep's result: pass --overwrite to replace it")
    return found
