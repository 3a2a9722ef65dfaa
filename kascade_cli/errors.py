"""Errors that reach the user as one line: what is wrong and what to do."""

import importlib
from types import ModuleType


class KascadeError(Exception):
    """Something failed; the message is one line for the user. The command exits with `exit_code`."""

    exit_code = 1


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
