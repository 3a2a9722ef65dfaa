"""Targets such as `kascade >= dense - 2`: parsed before anything runs, checked on the rows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kascade_cli.console import format_size
from kascade_cli.errors import UsageError
from kascade_cli.evaluation.run import MEAN

_COMPARE = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}
_NUMBER = r"\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Requirement:
    """`left` compared with `right` (a row's label, or None for a bare number) plus `offset`, in points of 100."""

    text: str
    task: str
    left: str
    sign: str
    right: str | None
    offset: float

    def check(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One verdict per length and ratio; a side without a ratio (dense) goes with every ratio of the other."""
        verdicts = []
        for row in (row for row in rows if row["strategy"] == self.left):
            if self.right is None:
                verdicts.append(self._verdict(row, row["ratio"], self.offset))
                continue
            beside = [r for r in rows if r["strategy"] == self.right and r["length"] == row["length"]]
            for other in beside:
                if row["ratio"] is None or other["ratio"] is None or row["ratio"] == other["ratio"]:
                    ratio = other["ratio"] if row["ratio"] is None else row["ratio"]
                    verdicts.append(self._verdict(row, ratio, self._value(other) + self.offset))
        return verdicts

    def _verdict(self, row: dict[str, Any], ratio: float | None, target: float) -> dict[str, Any]:
        value, target = self._value(row), round(target, 2)
        return {
            "require": self.text,
            "length": row["length"],
            "ratio": ratio,
            "value": value,
            "target": target,
            "met": _COMPARE[self.sign](value, target),
        }

    def _value(self, row: dict[str, Any]) -> float:
        return row[MEAN]["score"] if self.task == MEAN else row["scores"][self.task]["score"]


def describe_verdict(verdict: dict[str, Any]) -> str:
    """One line: what was asked for, where, and what came out."""
    ratio = "" if verdict["ratio"] is None else f", ratio {verdict['ratio']:g}"
    at = f"at {format_size(verdict['length'])} tokens{ratio}"
    return f"{verdict['require']} ({at}: {verdict['value']:.1f}, target {verdict['target']:.1f})"


def parse_requirement(text: str, labels: Sequence[str], tasks: Sequence[str]) -> Requirement:
    """`[task:]row >= row [- points]` or `[task:]row >= points`. Raises UsageError for anything else.

    labels: the rows that will be run; tasks: the kinds of question asked (`mean` is their mean, the default).
    """
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    pattern = (
        rf"\s*(?:(?P<task>[^\s:<>=]+)\s*:)?\s*(?P<left>{names})\s*(?P<sign>>=|<=|>|<)\s*"
        rf"(?:(?P<right>{names})\s*(?:(?P<plus>[+-])\s*(?P<offset>{_NUMBER}))?|(?P<number>{_NUMBER}))\s*"
    )
    match = re.fullmatch(pattern, text)
    if match is None:
        raise UsageError(
            f"--require '{text}' is not understood: write 'kascade >= dense - 2' (points of 100) or "
            f"'two-hop: kascade >= 90', with rows that are run: {', '.join(labels)}"
        )
    task = match["task"] or MEAN
    if task != MEAN and task not in tasks:
        raise UsageError(f"--require '{text}': no task '{task}' is evaluated; there are {', '.join(tasks)}")
    offset = float(match["number"] or match["offset"] or 0) * (-1 if match["plus"] == "-" else 1)
    return Requirement(text, task, match["left"], match["sign"], match["right"], offset)
