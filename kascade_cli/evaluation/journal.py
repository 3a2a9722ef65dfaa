"""What was measured so far, beside the output: a run that is interrupted goes on where it was.

A JSON document a line. The first says what all lines depend on; each other line is one run: a layout (profile
without its record), a prompt, a result. Written through to the disk run by run.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.forced import PromptKL
from kascade_cli.files import atomic_write, check_output, disk_reason, read_bounded

_KIND = "kascade-verification"
_MAX_BYTES = 64 << 20


def digest(*parts: Any) -> str:
    """sha256 (hex, shortened) of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def journal_path(output: Path) -> Path:
    """`profile.yaml` -> `profile.yaml.verify.jsonl`."""
    return output.with_name(output.name + ".verify.jsonl")


class Journal:
    """Results by (layout, prompt). `context` is what they all depend on: model, dtype, backend ..."""

    def __init__(self, path: Path, context: dict[str, Any], notify: Callable[[str], None]) -> None:
        """Reads what is there and begins anew where that is of other runs, with a line to `notify`.

        Raises UsageError for a file that is no journal (it is left alone), KascadeError if it cannot be written.
        """
        self.path, self._head = path, {"kind": _KIND, "context": digest(context)}
        self._known: dict[tuple[str, str], PromptKL] = {}
        lines = []
        if os.path.lexists(path):
            lines = self._load(notify)
        else:
            check_output(path, overwrite=False)
        # Written anew: a line that a kill cut short would spoil the next one.
        atomic_write(path, "".join(line + "\n" for line in [json.dumps(self._head), *lines]))

    def __len__(self) -> int:
        return len(self._known)

    def _load(self, notify: Callable[[str], None]) -> list[str]:
        head, *lines = read_bounded(self.path, _MAX_BYTES, "journal").decode("utf-8", "replace").split("\n")
        found = _parsed(head)
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise UsageError(f"{self.path} is no journal of a verification: move it, or name another output")
        if found != self._head:
            notify(f"{self.path}: of another model, dtype or backend; measuring anew")
            return []
        good = []
        for line in lines:
            entry = _result(_parsed(line))
            if entry is not None:
                self._known[entry[0]] = entry[1]
                good.append(line)
        if damaged := sum(map(bool, lines)) - len(good):
            notify(f"{self.path}: {damaged} unreadable lines are measured again")
        if good:
            notify(f"{self.path}: going on after {len(self._known)} runs")
        return good

    def get(self, layout: str, prompt: str) -> PromptKL | None:
        return self._known.get((layout, prompt))

    def add(self, layout: str, prompt: str, result: PromptKL) -> None:
        """Raises KascadeError if it cannot be written."""
        self._known[layout, prompt] = result
        line = json.dumps({"layout": layout, "prompt": prompt, **asdict(result)})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise KascadeError(f"cannot write {self.path}: {disk_reason(error, self.path.parent)}") from error

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _result(entry: Any) -> tuple[tuple[str, str], PromptKL] | None:
    """The run that a line describes, or None if it describes none."""
    if not isinstance(entry, dict) or entry.keys() != {"layout", "prompt", "kl", "asked", "given", "kept"}:
        return None
    kl, counts = entry["kl"], [entry[name] for name in ("kept", "given", "asked")]
    texts = isinstance(entry["layout"], str) and isinstance(entry["prompt"], str)
    sound = isinstance(kl, dict) and kl and all(isinstance(v, float) and v >= 0 for v in kl.values())
    if not (texts and sound and set(kl) <= {"prefill", "decode"} and all(type(count) is int for count in counts)):
        return None
    if not 0 <= counts[0] <= counts[1] <= counts[2]:
        return None
    return (entry["layout"], entry["prompt"]), PromptKL(kl, *counts[::-1])
