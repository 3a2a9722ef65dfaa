"""Measures candidate anchor sets on the model that a capture was made from, on prompts held out from it.

search = Search(measured, Settings())
candidates, verified = verify(search, search.candidates(1), Verification(prompts=4))
decision = search.decide(candidates, verified)
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kascade_cli.analysis.candidates import MOVED, NEIGHBOURS
from kascade_cli.evaluation.session import Session, Verification, open_session
from kascade_cli.provenance import portable_name
from kascade_cli.schema import Profile

if TYPE_CHECKING:
    from kascade_cli.analysis.candidates import Candidate
    from kascade_cli.analysis.decision import Search
    from kascade_cli.evaluation.forced import PromptKL
    from kascade_cli.evaluation.journal import Journal

__all__ = ["HELD_OUT", "Session", "Verification", "open_session", "verify"]

SWAPS = 2  # rounds of swapped anchors, each from the best set of the last
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
    """Races the candidates, then neighbours of the set that would be chosen: with an anchor swapped, added, left out.

    Returns all of them with what they do, and what a profile records about the measurement. `journal`: what an
    interrupted verification knew and this one adds to (`Session.journal`). Raises KascadeError if the model is not the
    capture's or a prompt is too short, UsageError for a length that the model does not take.
    """
    from kascade_cli.evaluation.racing import planned, race, rounds
    from kascade_cli.integrations.transformers import compile_ahead

    session = session or open_session(search.measured.meta, search.settings.phases, options or Verification())
    layouts: dict[tuple[int, ...], Profile] = {}
    progress = _Progress(report)
    runs = session.runs(journal, progress.advance)

    def measure(entries: Sequence["Candidate"], prompt: int) -> Sequence["PromptKL"]:
        for entry in entries:
            layouts.setdefault(entry.anchors, search.layout(entry.anchors))
        # Those that race over a prompt race over the rest of its round.
        ahead = [other for part in rounds(prompts) for other in part if prompt in part and other > prompt]
        return runs.measure([(_label(entry), layouts[entry.anchors]) for entry in entries], prompt, ahead)

    compile_ahead(session.model, search.layout(candidates[0].anchors), backend=session.options.backend)
    prompts = len(session.devset.prompts)
    sizes = [len(entry.anchors) for entry in candidates]
    more = 0 if search.given is not None else NEIGHBOURS + MOVED
    progress.total = planned([sizes.count(size) for size in set(sizes)], prompts) + planned([more], prompts)
    race(candidates, prompts, measure)
    everyone = list(candidates)
    best = search.verdict(everyone).best
    for _ in range(SWAPS):
        swapped = search.neighbours(best, everyone)
        if not swapped:
            break
        progress.total = progress.done + planned([len(swapped)], prompts)
        race([best, *swapped], prompts, measure, incumbent=best)
        everyone += swapped
        before, best = best, search.verdict(everyone).best
        if best is before:
            break
    # Neither weighting need know which anchor the answers lack, or which one can be left out.
    for step in (search.more, search.fewer):
        while beside := step(best, everyone):
            progress.total = progress.done + planned([len(beside)], prompts)
            race([best, *beside], prompts, measure, hopeless=3 * search.settings.tolerance.kl)
            everyone += beside
            before, best = best, search.verdict(everyone).best
            if len(best.anchors) == len(before.anchors):
                break
    everyone.sort(key=lambda entry: len(entry.anchors))
    return everyone, _record(session, best)


def _label(entry: "Candidate") -> str:
    return f"{len(entry.anchors)} anchors"


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
