"""How few keys are enough at each length: the profile's table of ratios (`select-anchors --ratio auto`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kascade_cli.analysis.record import number
from kascade_cli.analysis.verdict import Tolerance
from kascade_cli.errors import UsageError
from kascade_cli.evaluation.kl import MeanKL
from kascade_cli.evaluation.racing import HOPELESS_KL
from kascade_cli.schema import Budget, Profile

if TYPE_CHECKING:
    from kascade_cli.evaluation.forced import PromptKL
    from kascade_cli.evaluation.runs import Runs
    from kascade_cli.evaluation.session import Session
    from kascade_cli.evaluation.verification import Report

GRID = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
SHORTEST = 1024


@dataclass(frozen=True)
class AtLength:
    """What was found for prompts of `length` tokens. tried: every ratio measured, rising, the last of the grid among
    them, with what it does."""

    length: int
    ratio: float
    tried: dict[float, MeanKL]

    def document(self) -> dict[str, Any]:
        rows = [
            {"ratio": ratio, "kl": number(mean.score), "given": mean.given, "kept": mean.kept, "prompts": mean.prompts}
            for ratio, mean in self.tried.items()
        ]
        return {"length": self.length, "ratio": self.ratio, "tried": rows}


def lengths(longest: int) -> list[int]:
    """Powers of two from 1k to `longest`. Raises UsageError if there is none."""
    found = [1 << power for power in range(SHORTEST.bit_length() - 1, longest.bit_length()) if 1 << power <= longest]
    if not found:
        raise UsageError(
            f"--ratio auto measures from {SHORTEST} tokens on, and held-out prompts have {longest}: pass "
            "--verify-length 1k or more"
        )
    return found


def grid(length: int, budget: Budget) -> list[float]:
    """The ratios that differ in what they read of `length` keys: of those that the floor makes equal, the largest."""
    by_count = {budget.override(ratio=ratio).count(length): ratio for ratio in GRID}
    return sorted(by_count.values())


def smallest(ratios: Sequence[float], enough: Callable[[float], bool]) -> float:
    """The smallest of rising `ratios` that is enough, by bisection; the last counts as such."""
    low, high = 0, len(ratios) - 1
    while low < high:
        middle = (low + high) // 2
        if enough(ratios[middle]):
            high = middle
        else:
            low = middle + 1
    return ratios[high]


def find_ratio(
    measure: Callable[[float, int], "PromptKL"], ratios: Sequence[float], prompts: int, tolerance: Tolerance
) -> tuple[float, dict[float, MeanKL]]:
    """(the smallest ratio that does as well as the last, what each measured one does).

    `measure(ratio, prompt)` runs one prompt. A ratio does as well if it keeps the answers: no more of them lost than
    with the last ratio, plus `tolerance.ratio` of those that dense gives. Where it gives none, KL is within
    `tolerance.kl` of the last's. A ratio that cannot any more is measured on no further prompt.
    """
    tried: dict[float, MeanKL] = {}
    best = tried[ratios[-1]] = MeanKL()
    partial = []  # the last ratio's score after each prompt
    for prompt in range(prompts):
        best.add(measure(ratios[-1], prompt))
        partial.append(best.score)
    allowed = best.given - best.kept + tolerance.ratio * best.given

    def enough(ratio: float) -> bool:
        mean = tried[ratio] = MeanKL()
        for prompt in range(prompts):
            mean.add(measure(ratio, prompt))
            if mean.given - mean.kept > allowed or mean.score > partial[prompt] + HOPELESS_KL:
                return False
        return bool(best.given) or mean.score <= best.score + tolerance.kl

    return smallest(ratios, enough), dict(sorted(tried.items()))


def find_ratios(
    session: "Session",
    layout: Profile,
    tolerance: Tolerance,
    *,
    journal: Any = None,
    report: "Report | None" = None,
) -> list[AtLength]:
    """The smallest ratio that does for each power of two of the length up to the session's, held-out prompts of it.

    layout: the chosen anchors, with the floor and the tile of the budget. Raises UsageError where prompts are shorter
    than 1k.
    """
    found, done = [], 0
    wanted = lengths(session.longest)
    per_length = len(GRID).bit_length() * session.count  # a bisection and the last ratio

    def shown(what: str, result: "PromptKL") -> None:
        nonlocal done
        done += 1
        if report:
            kl = sum(result.kl.values()) / len(result.kl)
            kept = f", {result.kept} of {result.given} answers" if result.given else ""
            report(done, max(done, per_length * len(wanted)), f"{what} KL {kl:.3f}{kept}")

    for place, length in enumerate(wanted):
        runs = session.runs(journal, shown, session.answerable(length))
        ratio, tried = find_ratio(
            _measure(runs, layout, length), grid(length, layout.budget), len(runs.devset.prompts), tolerance
        )
        found.append(AtLength(length, ratio, tried))
        done = per_length * (place + 1)
    return found


def _measure(runs: "Runs", layout: Profile, length: int) -> Callable[[float, int], "PromptKL"]:
    def measure(ratio: float, prompt: int) -> "PromptKL":
        profile = layout.model_copy(update={"budget": layout.budget.override(ratio=ratio)})
        ahead = range(prompt + 1, len(runs.devset.prompts))
        return runs.measure([(f"{length} tokens, ratio {ratio:g}", profile)], prompt, ahead)[0]

    return measure


def table(found: Sequence[AtLength]) -> dict[int, float]:
    """length -> ratio, never rising: a long prompt has early queries too, which were measured with its own ratio."""
    ratios: dict[int, float] = {}
    highest = 0.0
    for entry in sorted(found, key=lambda entry: -entry.length):
        highest = max(highest, entry.ratio)
        ratios[entry.length] = highest
    return dict(sorted(ratios.items()))


def notes(found: Sequence[AtLength], tolerance: Tolerance) -> list[str]:
    """A line for every length at which the largest ratio loses answers."""
    lines = []
    for entry in found:
        ratio, most = list(entry.tried.items())[-1]
        lost = most.given - most.kept
        if most.asked and not most.given:
            lines.append(f"at {entry.length} tokens dense answers 0 of {most.asked}: the ratio is chosen by KL alone")
        elif lost > tolerance.ratio * most.given:
            lines.append(f"at {entry.length} tokens ratio {ratio:g} too loses {lost} of {most.given} answers")
    return lines
