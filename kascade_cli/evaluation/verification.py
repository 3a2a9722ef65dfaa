"""Measures candidate anchor sets on the model that a capture was made from, on prompts held out from it.

search = Search(measured, Settings())
candidates, verified = verify(search, search.candidates(1), Verification(prompts=4))
decision = search.decide(candidates, verified)
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kascade_cli.evaluation.session import Session, Verification, open_session
from kascade_cli.provenance import portable_name
from kascade_cli.schema import Profile

if TYPE_CHECKING:
    from kascade_cli.analysis.candidates import Candidate
    from kascade_cli.analysis.decision import Search
    from kascade_cli.evaluation.forced import PromptKL
    from kascade_cli.evaluation.journal import Journal

__all__ = ["HELD_OUT", "Session", "Verification", "open_session", "verify"]

FINALISTS = 8  # sets that are measured on more prompts in the end
HELD_OUT = "/held-out"  # what the twin of a dev set adds to its name
Report = Callable[[int, int, str], None]  # runs done, runs at most, what the last one showed


def verify(
    search: "Search",
    candidates: Sequence["Candidate"],
    options: Verification | None = None,
    *,
    session: Session | None = None,
    journal: "Journal | None" = None,
    report: Report | None = None,
) -> tuple[list["Candidate"], dict[str, Any]]:
    """Races the candidates, then sets beside the one that would be chosen: with an anchor swapped, added, left out;
    at last read the other way (one set for all heads instead of head maps), and beside that again if it is better.
    No further round begins once a prompt has had `Effort.most` runs.

    Returns all of them with what they do, and what a profile records about the measurement. `journal`: what an
    interrupted verification knew and this one adds to (`Session.journal`). Raises KascadeError if the model is not the
    capture's or a prompt is too short, UsageError for a length that the model does not take.
    """
    from kascade_cli.evaluation.racing import HOPELESS_KL, final, planned, race, rounds
    from kascade_cli.integrations.transformers import compile_ahead

    session = session or open_session(search.measured.meta, search.settings.phases, options or Verification())
    layouts: dict[Any, Profile] = {}
    progress = _Progress(report)
    runs = session.runs(journal, progress.advance)

    def measure(entries: Sequence["Candidate"], prompt: int) -> Sequence["PromptKL"]:
        for entry in entries:
            if entry.key not in layouts:
                layouts[entry.key] = search.layout(entry.anchors, pooled=entry.pooled)
        # Those that race over a prompt race over the rest of its round.
        parts = [*rounds(prompts), range(prompts, len(session.devset.prompts))]
        ahead = [other for part in parts for other in part if prompt in part and other > prompt]
        return runs.measure([(_label(entry), layouts[entry.key]) for entry in entries], prompt, ahead)

    compile_ahead(session.model, search.layout(candidates[0].anchors), backend=session.options.backend)
    effort = session.effort
    prompts = min(effort.prompts, len(session.devset.prompts))
    everyone = list(candidates)

    def beside(best: "Candidate", entries: Sequence["Candidate"], hopeless: float = HOPELESS_KL) -> "Candidate":
        """Races sets against `best`, which is known; gives the best of all."""
        progress.total = progress.done + planned([len(entries)], prompts)
        race([best, *entries], prompts, measure, incumbent=best, hopeless=hopeless)
        everyone.extend(entries)
        return search.verdict(everyone).best

    def leading(count: int) -> list["Candidate"]:
        """The set that would be chosen, then those that keep most: the best of many is so by chance too."""
        chosen = search.verdict(everyone).best
        others = [entry for entry in final(everyone, count) if entry is not chosen]
        return [chosen, *others][:count]

    def other_ways() -> "Candidate":
        """Reads the leading sets the other way, on all prompts."""
        found = [search.other_way(entry, everyone) for entry in leading(effort.ways)]
        entries = list({entry.key: entry for entry in found if entry is not None}.values())
        progress.total = progress.done + len(entries) * prompts
        for prompt in range(prompts) if entries else ():
            for entry, result in zip(entries, measure(entries, prompt), strict=True):
                entry.add(result)
        everyone.extend(entries)
        return search.verdict(everyone).best

    def climb(best: "Candidate", rounds: int) -> "Candidate":
        """Swaps anchors while that helps."""
        for _ in range(rounds):
            if progress.done >= effort.most * prompts:
                break
            before, swapped = best, search.neighbours(best, everyone, effort)
            best = beside(best, swapped) if swapped else best
            if best is before:
                break
        return best

    def settle(best: "Candidate", rounds: int) -> "Candidate":
        """Climbs, and takes anchors more or less."""
        best = climb(best, rounds)
        # Neither weighting need know which anchor the answers lack, or which one can be left out.
        while progress.done < effort.most * prompts and (larger := search.more(best, everyone, effort)):
            before, best = best, beside(best, larger)
            if len(best.anchors) <= len(before.anchors):
                break
            best = climb(best, rounds)
        while progress.done < effort.most * prompts and (smaller := search.fewer(best, everyone, effort)):
            before, best = best, beside(best, smaller, hopeless=3 * search.settings.tolerance.kl)
            if len(best.anchors) == len(before.anchors):
                break
        return best

    sizes = [len(entry.anchors) for entry in candidates]
    more = 0 if search.given is not None else effort.promising + effort.moved
    progress.total = planned([sizes.count(size) for size in set(sizes)], prompts) + planned([more], prompts)
    race(candidates, prompts, measure)
    first = settle(search.verdict(everyone).best, effort.rounds)
    best = other_ways()
    if best.pooled != first.pooled:
        best = settle(best, effort.rounds - 1)
    if len(session.devset.prompts) > prompts:  # the best of many on few prompts is so by chance too
        progress.total = progress.done + FINALISTS * (len(session.devset.prompts) - prompts)
        last = leading(FINALISTS)
        for prompt in range(prompts, len(session.devset.prompts)):
            for entry, result in zip(last, measure(last, prompt), strict=True):
                entry.add(result)
        best = search.verdict(everyone).best
    everyone.sort(key=lambda entry: len(entry.anchors))
    return everyone, _record(session, best)


def _label(entry: "Candidate") -> str:
    return f"{len(entry.anchors)} anchors" + (", pooled" if entry.pooled else "")


class _Progress:
    """Counts runs, and says after each what it showed."""

    def __init__(self, report: Report | None) -> None:
        self.report, self.done, self.total = report, 0, 0

    def advance(self, what: str, result: "PromptKL") -> None:
        self.done += 1
        if self.report:
            kl = sum(result.kl.values()) / len(result.kl)
            kept = f", {result.kept} of {result.given} answers" if result.given else ""
            self.report(self.done, max(self.done, self.total), f"{what} KL {kl:.3f}{kept}")


def _record(session: Session, best: "Candidate") -> dict[str, Any]:
    devset = session.devset
    return {
        "model": portable_name(session.name),
        "dev_set": portable_name(devset.name.removesuffix(HELD_OUT)) + HELD_OUT,
        "dev_set_sha256": devset.sha256,
        "prompts": len(devset.prompts),
        "max_length": devset.max_length,
        "positions": "answers" if any(devset.answers) else "last",
        "answers": {"asked": best.asked, "given": best.given},
        "phases": session.phases,
        "dtype": str(session.model.dtype).removeprefix("torch."),
    }
