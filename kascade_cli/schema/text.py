"""A profile as YAML text, and what is wrong with one in a line."""

from typing import Any

import yaml
from pydantic import ValidationError

from kascade_cli import strict_yaml
from kascade_cli.errors import plain

_BUDGET = {"ratio", "ratios", "min_keys", "tile"}
# Names of union members that pydantic adds to the place mean nothing to the reader of a YAML file.
_NOISE = {"Heads", "int", "constrained-int", "schema_", "[key]"}
_PLACES = {"budget", "layers", "model", "ratio", "ratios"}


def to_yaml(document: dict[str, Any]) -> str:
    """Block style for the document, one line per layer and per short mapping."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def represent_sequence(self, tag, sequence, flow_style=None):
        scalar = all(not isinstance(item, dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=True if scalar else flow_style)

    def represent_mapping(self, tag, mapping, flow_style=None):
        names = set(mapping)
        leaf = "role" in names or names <= {"decode", "prefill"} or {"ratio", "min_keys", "tile"} <= names <= _BUDGET
        return super().represent_mapping(tag, mapping, flow_style=True if leaf and mapping else flow_style)

    def ignore_aliases(self, data):
        return True


def first_problem(error: ValidationError, text: str | None = None) -> str:
    """One line: line number where it can be found in the YAML `text`, place, reason."""
    # A misspelt key is also a missing one; the unknown key says where to look.
    problem = min(
        error.errors(include_url=False, include_input=False), key=lambda entry: entry["type"] != "extra_forbidden"
    )
    location = [
        str(part)
        for part in problem["loc"]
        if str(part) not in _NOISE and not str(part).startswith(("list[", "tuple[", "dict["))
    ]
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        reason = "unknown key"
    # A check of several fields names the place itself: `layers.3.heads: ...`, inside of where it was made.
    found, colon, rest = reason.partition(": ")
    if problem["type"] == "value_error" and colon and found.split(".")[0] in _PLACES:
        location, reason = [*location, *found.split(".")], rest
    line = strict_yaml.line_of(text, location) if text is not None else None
    place = plain(".".join(location), 200)
    return (f"line {line}: " if line else "") + (f"{place}: " if place else "") + reason
