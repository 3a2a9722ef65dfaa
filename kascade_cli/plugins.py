"""Modules with strategies of the user's own, named on the command line (`--plugin`)."""

import importlib
import importlib.util
import sys
from pathlib import Path

from kascade_cli.errors import KascadeError, UsageError


def import_plugin(name: str) -> None:
    """Imports a module, found from the current folder too, or a .py file; its strategies register themselves.

    Raises UsageError where there is none, KascadeError where importing it fails.
    """
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
            return
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        importlib.import_module(name)
    except KascadeError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"--plugin {name}: no such module; name a module or a .py file") from error
        raise KascadeError(f"--plugin {name}: cannot be imported: {error}") from error
    except Exception as error:
        raise KascadeError(f"--plugin {name}: cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--plugin {path}: no such file")
    name = path.stem
    if (loaded := sys.modules.get(name)) and getattr(loaded, "__file__", None) == str(path.resolve()):
        return
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
