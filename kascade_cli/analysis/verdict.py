"""What measured candidates decide: the fewest anchors that keep the answers and whose KL is near the best."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kascade_cli.analysis.candidates import Candidate

KL_TOLERANCE = 0.02  # nats above the best
LOST_TOLERANCE = 0.01  # share of the answers, above what the best set loses
RATIO_TOLERANCE = 0.03  # the same of ratios: fewer keys always lose something, and the user asked for few


@dataclass(frozen=True)
class Tolerance:
    """What is as good as the best. kl: nats; lost: share of the answers that dense gives; ratio: the same where ratios
    are compared."""

    kl: float = KL_TOLERANCE
    lost: float = LOST_TOLERANCE
    ratio: float = RATIO_TOLERANCE

    def loses(self, lost: int, given: int) -> bool:
        """Whether a set that loses `lost` of `given` answers keeps too few; a single one is chance."""
        return lost > max(self.lost * given, 1 if self.lost else 0)


@dataclass(frozen=True)
class Verdict:
    """The chosen candidate, one line that says why, and lines that the user should know besides."""

    best: Candidate
    why: str
    notes: list[str] = field(default_factory=list)


def finalists(measured: Sequence[Candidate]) -> list[Candidate]:
    """Those that were measured on all prompts: only they can be compared with each other."""
    most = max(entry.prompts for entry in measured)
    return [entry for entry in measured if entry.prompts == most]


def decide(measured: Sequence[Candidate], size: int | None = None, tolerance: Tolerance | None = None) -> Verdict:
    """The fewest anchors that keep the answers and whose KL is within tolerance of the best that keeps them.

    A set keeps the answers if it loses no more of those that dense gives than the set that loses fewest, plus
    `tolerance.lost` of them. If even that one loses more than the tolerance, and more than one answer, the lowest KL
    decides between those that lose so few, whatever their size. With `size`, only sets of so many anchors count. Ties
    go to the lower KL, then to the lexicographically smallest set.
    """
    tolerance = tolerance or Tolerance()
    pool = [entry for entry in finalists(measured) if size is None or len(entry.anchors) == size]
    fewest_lost = min(entry.lost for entry in pool)
    allowed = fewest_lost + tolerance.lost * pool[0].given
    keeping = [entry for entry in pool if entry.lost <= allowed]
    lowest = min(keeping, key=_by_kl)
    losing = tolerance.loses(fewest_lost, pool[0].given)  # every set
    close = [entry for entry in keeping if entry.score <= lowest.score + (0 if losing else tolerance.kl)]
    fewest = min(len(entry.anchors) for entry in close)
    best = min((entry for entry in close if len(entry.anchors) == fewest), key=_by_kl)
    answers = f"{best.kept} of {best.given} answers" if best.given else ""
    if size is not None:
        which = "that keep the answers" if answers else f"with {size} anchors"
        detail = f"{answers}, {best.score:.4f} nats" if answers else f"{best.score:.4f} nats"
        why = f"the lowest measured KL of the candidates {which} ({detail})"
    elif losing:
        why = f"no set keeps the answers; the lowest measured KL ({best.score:.4f}) of those that lose the fewest"
        why += f" ({best.kept} of {best.given} kept)" + _what_decided(measured, best, allowed, lowest.score, tolerance)
    else:
        near = f"within {tolerance.kl:g} nats of the best ({best.score:.4f}; the best is {lowest.score:.4f}"
        near += f" with {len(lowest.anchors)} anchors)"
        kept = f"that keep the answers ({best.kept} of {best.given} kept) and whose measured KL is"
        why = f"the fewest anchors {kept if answers else 'with a measured KL'} {near}"
        why += _what_decided(measured, best, allowed, lowest.score, tolerance)
    return Verdict(best, why, _notes(pool, best, tolerance))


def _by_kl(entry: Candidate) -> tuple:
    return entry.score, len(entry.anchors), entry.key


def _what_decided(
    measured: Sequence[Candidate], best: Candidate, allowed: float, lowest: float, tolerance: Tolerance
) -> str:
    """Which of the two excluded the next smaller number of anchors: `; the answers decided: ...`."""
    smaller = [entry for entry in measured if len(entry.anchors) < len(best.anchors) and entry.prompts]
    if not smaller:
        return ""
    size = max(len(entry.anchors) for entry in smaller)
    beaten = [entry for entry in smaller if len(entry.anchors) == size]
    most = max(entry.prompts for entry in beaten)
    beaten = [entry for entry in beaten if entry.prompts == most]
    early = "" if most == best.prompts else f", given up after {most} of {best.prompts} prompts"
    # Of sets that were given up early the answers lost so far are the fewest that they can lose.
    keeping = [entry for entry in beaten if entry.lost <= allowed]
    nearest = min(keeping or beaten, key=lambda entry: (entry.score,) if keeping else (entry.lost, entry.score))
    lost = f"{nearest.lost} of {nearest.given} are lost"
    if keeping:
        return f"; KL decided: with {size} anchors it is {nearest.score:.4f}{early}"
    if nearest.score > lowest + tolerance.kl:
        return f"; both decided: with {size} anchors KL is {nearest.score:.4f} and of the answers {lost}{early}"
    return f"; the answers decided: with {size} anchors {lost}{early}"


def _notes(pool: Sequence[Candidate], best: Candidate, tolerance: Tolerance) -> list[str]:
    asked, given = best.asked, best.given
    if asked and not given:
        return [
            f"dense answers 0 of {asked}: the choice is by KL alone; another model or --verify-dev-set would show "
            "whether answers are kept"
        ]
    fewest = min(entry.lost for entry in pool)
    if tolerance.loses(fewest, given):
        most = max(len(entry.anchors) for entry in pool)
        return [
            f"no set of up to {most} anchors keeps the answers: the best loses {fewest} of {given}; raise "
            "--max-anchors or --ratio"
        ]
    return []
