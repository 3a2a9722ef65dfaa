"""Which row of the table is chosen: the one rule given, the default, or what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kascade_cli.analysis.rows import Row
from kascade_cli.analysis.similarity import PHASES
from kascade_cli.errors import TargetMissed, UsageError

RECOVERED_TOLERANCE = 0.015  # share of the attention: as good as the largest set looked at


@dataclass(frozen=True)
class Choice:
    """A chosen row, the rule that chose it and one line that says why."""

    row: Row
    rule: str
    why: str


def check_rules(anchors: Any, min_recovered: float | None, target_speedup: float | None) -> None:
    """Raises UsageError unless at most one rule is given, with a number that can make sense."""
    rules = {"--anchors": anchors, "--min-recovered": min_recovered, "--target-speedup": target_speedup}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are two rules for one choice; give one of them")
    if min_recovered is not None and not 0 < min_recovered <= 1:
        raise UsageError(f"--min-recovered {min_recovered} is outside (0, 1]")
    if target_speedup is not None and not target_speedup > 0:
        raise UsageError(f"--target-speedup {target_speedup} must be above 0")


def choose(
    rows: Sequence[Row],
    *,
    anchors: int | None = None,
    min_recovered: float | None = None,
    target_speedup: float | None = None,
    phase: str = "both",
    own: float | None = None,
) -> Choice:
    """Applies the one rule given, or the default (docs/select-anchors.md). Where mass decides, the rows' is measured.
    own: the mass recovered where every layer chooses for itself.

    Raises UsageError for more than one rule or an impossible number, TargetMissed if no row meets the target.
    """
    check_rules(anchors, min_recovered, target_speedup)
    if anchors is not None:
        by_size = {row.size: row for row in rows}
        if anchors not in by_size:
            raise UsageError(f"--anchors {anchors} is outside 1..{max(by_size)}")
        return Choice(by_size[anchors], "anchors", f"{anchors} anchors were asked for")
    if target_speedup is not None:
        return _fast_enough(rows, target_speedup, "prefill" if phase == "prefill" else "decode")
    if min_recovered is None:
        return _on_the_plateau(rows, phase)
    enough = [row for row in rows if row.recovered_mean >= min_recovered]
    if not enough:
        most = max(rows, key=lambda row: (row.recovered_mean, -row.size))
        ceiling = "" if own is None else f", and {own:.1%} if every layer chose for itself"
        cure = "--ratio" if own is not None and own < min_recovered else "--max-anchors or --ratio"
        raise TargetMissed(
            f"no set of up to {rows[-1].size} anchors recovers {min_recovered:.1%} of the attention; the most is "
            f"{most.recovered_mean:.1%} with {most.size}{ceiling}: raise {cure}, or lower --min-recovered"
        )
    row = min(enough, key=lambda row: row.size)
    why = f"the fewest anchors that recover {min_recovered:.1%} of the attention ({row.recovered_mean:.1%})"
    return Choice(row, "min-recovered", why)


def _on_the_plateau(rows: Sequence[Row], phase: str) -> Choice:
    """The fewest anchors that recover nearly what the best of those predicted faster than dense does."""
    phases = PHASES if phase == "both" else (phase,)
    faster = [row for row in rows if all((row.speedup[name] or 2) > 1 for name in phases)] or list(rows)
    most = max(faster, key=lambda row: (row.recovered_mean, -row.size))
    close = [row for row in faster if row.recovered_mean >= most.recovered_mean - RECOVERED_TOLERANCE]
    best = min(close, key=lambda row: row.size)
    return Choice(
        best,
        "default",
        f"the fewest anchors that recover within {100 * RECOVERED_TOLERANCE:g} points of the most "
        f"({best.recovered_mean:.1%}; {most.recovered_mean:.1%} with {most.size}); --verify measures what they keep",
    )


def _fast_enough(rows: Sequence[Row], target: float, phase: str) -> Choice:
    if any(row.speedup[phase] is None for row in rows):
        raise UsageError(f"the cost table has no {phase} rows, so --target-speedup cannot be judged")
    enough = [row for row in rows if row.speedup[phase] >= target]
    if not enough:
        best = max(rows, key=lambda row: row.speedup[phase])
        raise TargetMissed(
            f"no set reaches {target:g}x in {phase}: the most predicted is {best.speedup[phase]:.2f}x with "
            f"{best.size} anchors; lower --target-speedup or give another --cost table"
        )
    row = max(enough, key=lambda row: row.size)
    why = f"the most anchors whose predicted {phase} speed-up is {target:g}x or more ({row.speedup[phase]:.2f}x)"
    return Choice(row, "target-speedup", why)
