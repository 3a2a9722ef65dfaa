"""Errors that reach the user as one line: what is wrong and what to do."""

import importlib
import re
from types import ModuleType

# Terminal control sequences: CSI, OSC and other strings up to their end, two-character ones.
_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]"
)
_BREAK = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
# C0, DEL and C1 controls; marks that turn the direction of text around.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def plain(text: object, limit: int | None = None) -> str:
    """Text from outside (a file, an argument) as it may stand in a line on a terminal.

    Without escape sequences and control characters; line breaks become spaces, lone surrogates `?`. More than
    `limit` characters are cut, with `...`.
    """
    line = _SEQUENCE.sub("", str(text))
    line = _SURROGATE.sub("?", _CONTROL.sub("", _BREAK.sub(" ", line)))
    return line if limit is None or len(line) <= limit else line[: max(0, limit - 3)] + "..."


class KascadeError(Exception):
    """Something failed; the message is one plain line for the user. The command exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(message, 2000))


class UsageError(KascadeError):
    """The command was called in a way that cannot work."""

    exit_code = 2


class TargetMissed(KascadeError):
    """The command ran, and the result misses the target that was asked for (`--require`)."""

    exit_code = 3


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional module, or raises KascadeError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise KascadeError(f"{package} is not installed: pip install 'kascade-cli[{extra}]'") from error
