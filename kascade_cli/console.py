"""Terminal output and the parsing of option values, in one place for all commands."""

import contextlib
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from kascade_cli.errors import UsageError, plain

MAX_SIZE = 16 * 1024**2  # tokens: more than any model takes, and few enough to build a prompt of


class _PlainConsole(Console):
    """Reads no markup or emoji codes in text, and lets no control character through but line breaks and tabs.

    What is printed holds names from files. Where a style is wanted, a `rich.text.Text` has it (`cell`).
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(
            "\n".join(_printable(line) for line in text.replace("\r\n", "\n").split("\n")), **options
        )


def _printable(line: str) -> str:
    return "\t".join(plain(part) for part in line.split("\t"))


out = _PlainConsole(highlight=False, emoji=False, markup=False)
err = _PlainConsole(stderr=True, highlight=False, emoji=False, markup=False)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed, by this program or the libraries that it uses: for processes beside the one that speaks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = out.quiet, err.quiet
    out.quiet = err.quiet = True
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        out.quiet, err.quiet = before


def say(text: object) -> None:
    """One line on stdout, whatever `text` holds."""
    out.print(cell(text), soft_wrap=True)


def note(text: object) -> None:
    """One line on stderr, whatever `text` holds."""
    err.print(cell(text), soft_wrap=True)


def cell(text: object, style: str = "") -> Text:
    """Text from outside for a table's cell, title or caption: one line without markup or control characters."""
    return Text(plain(text), style=style)


def plain_table(columns: Sequence[str], *, title: object = None, right: Sequence[str] = ()) -> Any:
    """A rich Table without lines; the columns named in `right` are aligned so."""
    from rich.table import Table

    heading = None if title is None else cell(title)
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(cell(name), justify="right" if name in right else "left")
    return table


def progress(description: str = "", *, total: float | None = None):
    """A rich Progress on stderr with rate and time left; draws nothing when stderr is not a terminal.

    With `description`, a task is added at once and its id is the object's `first` attribute.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Description(ProgressColumn):
        """What is being done, which may name a file."""

        def render(self, task: Any) -> Text:
            return cell(task.description)

    bar = Progress(
        Description(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    bar.first = bar.add_task(description, total=total) if description else None
    return bar


class Steps:
    """How far a long run is: a bar with time left on a terminal, elsewhere a plain line now and then on stderr.

    A context manager. `update(done, total, text)` is called after each step, with what it showed.
    """

    EVERY = 30.0  # seconds between two lines; sooner when another tenth is done, but not within SOON
    SOON = 5.0

    def __init__(self, description: str, unit: str = "runs", *, clock: Callable[[], float] = time.monotonic) -> None:
        self.description, self.unit, self._clock = description, unit, clock
        self._bar = progress(description)
        self._began = self._said = clock()
        self._tenth = 0

    def __enter__(self) -> "Steps":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def update(self, done: int, total: int, text: str = "") -> None:
        shown = f"{self.description}: {text}" if text else self.description
        self._bar.update(self._bar.first, completed=done, total=total, description=shown)
        if err.is_terminal:
            return
        now, tenth = self._clock(), 10 * done // max(total, 1)
        waited = now - self._said
        if waited >= self.EVERY or (waited >= self.SOON and tenth > self._tenth):
            self._said, self._tenth = now, tenth
            left = (now - self._began) * (total - done) / max(done, 1)
            about = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
            detail = f", {text}" if text else ""
            note(f"{self.description}: {done} of {total} {self.unit}{detail}, about {about} left")


def to_json(document: Any) -> str:
    """The text of one JSON document, ending in a line break. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    # Half characters (from a name that is no text) and control characters of a terminal are written as \\uXXXX.
    return re.sub(r"[\ud800-\udfff\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def print_json(document: Any) -> None:
    """Prints one JSON document on stdout."""
    sys.stdout.write(to_json(document))


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises UsageError for an argument that is not valid text (UTF-8): it could be neither stored nor printed."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"argument '{argument[:200]}' is not valid UTF-8: rename the file, or quote it anew"
            ) from error


def parse_size(text: str | int, option: str = "") -> int:
    """`32k` -> 32768, `1m` -> 1048576, `4096` -> 4096. Raises UsageError, naming `option`, for anything else.

    More than MAX_SIZE is refused too, before anything of that size is built.
    """
    value = str(text).strip().lower()
    factor = {"k": 1024, "m": 1024**2}.get(value[-1:], 1)
    digits = value[:-1] if factor > 1 else value
    place = f"{option}: " if option else ""
    if not (digits.isascii() and digits.isdecimal()) or not digits.strip("0"):
        raise UsageError(
            f"{place}'{plain(text, 40)}' is not a size: use a whole number, 1 or more, such as 4096 or 32k"
        )
    if len(digits.lstrip("0")) > 12 or int(digits) * factor > MAX_SIZE:
        raise UsageError(f"{place}{plain(text, 40)} is too much: the most is {format_size(MAX_SIZE)}")
    return int(digits) * factor


def parse_sizes(text: str, option: str = "") -> list[int]:
    """`1k,2k` -> [1024, 2048]. Raises UsageError, naming `option`, for anything else."""
    return [parse_size(part, option) for part in text.split(",")]


def parse_ints(text: str) -> list[int]:
    """`0,2,8` -> [0, 2, 8]. Raises UsageError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"'{plain(text, 80)}' is not a list of whole numbers such as 0,2,8") from error


def parse_floats(text: str) -> list[float]:
    """`0.05,0.1` -> [0.05, 0.1]. Raises UsageError for anything else, NaN and infinity among it."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError(f"'{plain(text, 80)}' is not a list of numbers such as 0.05,0.1")
    return found


def format_size(length: int) -> str:
    """1024 -> `1k`, 16777216 -> `16m`; what `parse_size` reads back."""
    if length and length % 1024**2 == 0:
        return f"{length // 1024**2}m"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def format_bytes(count: float) -> str:
    """A byte count for people: `1.5 MB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def compiling(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar over kernels that are compiled; what it gives is called after each."""
    with progress("compiling kernels", total=total) as bar:
        yield lambda: bar.advance(bar.first)
