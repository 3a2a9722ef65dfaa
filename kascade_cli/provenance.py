"""What a result says about where it comes from: versions, date, commit, hashes, names. Knows no terminal."""

import contextlib
import datetime
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from kascade_cli.version import __version__

_BLOCK = 1 << 22


def tool() -> str:
    """`kascade 0.1.0`."""
    return f"kascade {__version__}"


def now() -> str:
    """The time in UTC, `2026-01-02T03:04:05+00:00`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version(package: str) -> str | None:
    """The installed version of a package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of `packages` that are installed."""
    found = {name: version(name) for name in packages}
    return {"python": platform.python_version()} | {name: value for name, value in found.items() if value}


def commit() -> str | None:
    """The commit of the source tree that this package runs from, `+` if it has changes; None outside a git tree.

    `KASCADE_COMMIT` stands in where the tree was copied without its history.
    """
    if given := os.environ.get("KASCADE_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    options = {"capture_output": True, "text": True, "timeout": 10}
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **options)
        if head.returncode:
            return None
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **options).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def command_line(name: str) -> str:
    """The command line as it was typed, absolute paths cut to their last part (they mean nothing elsewhere).

    `kascade NAME` where the command `name` runs in another program.
    """
    words = [portable_name(word) for word in sys.argv[1:]]
    return shlex.join(["kascade", *words]) if name in words else f"kascade {name}"


def file_sha256(*paths: str | Path) -> str:
    """sha256 of the files' bytes, one after the other. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def portable_name(name: str) -> str:
    """A model's or dev set's name as it means something on another machine too.

    Built-in names, hub ids and relative paths stay. Of an absolute path: what is below the current folder, or the
    hub id of a folder in the hub's cache, or the last part. Of a .gguf file without its ending, and `model.gguf` is
    called what its folder is.
    """
    if not os.path.isabs(name):
        return name
    path = Path(os.path.normpath(name))
    gguf = path.suffix.lower() == ".gguf"
    if cached := re.search(r"(?:^|/)(?:models|datasets)--([^/]+)/snapshots/", path.as_posix()):
        hub_id = cached.group(1).replace("--", "/", 1)
        return f"{hub_id}/{path.stem}" if gguf else hub_id  # such a repository holds many
    with contextlib.suppress(ValueError, OSError):
        if (below := path.relative_to(Path.cwd()).as_posix()) != ".":
            return below
    if gguf:
        return path.parent.name if path.stem == "model" and path.parent.name else path.stem
    return path.name or name


def short(fingerprint: str | None) -> str:
    """A fingerprint's first digits, enough to tell two apart."""
    head, _, digits = (fingerprint or "").rpartition(":")
    return f"{head}:{digits[:12]}" if head else digits[:12]
