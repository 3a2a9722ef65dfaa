"""Which candidates are measured on which prompts: all on few, the better half of every size on more.

Knows no model: `measure(candidates, prompt)` gives what each does on one prompt.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from kascade_cli.analysis.candidates import Candidate
from kascade_cli.evaluation.forced import PromptKL
from kascade_cli.evaluation.kl import MeanKL

HOPELESS_KL = 0.25  # nats above the best of all, over FIRM prompts: a set that is measured no further
WORSE_KL = 0.02  # nats above a smaller set, that keeps as many answers: of no use
FIRM = 4  # of n prompts fewer than this, FIRM / n times as much: one prompt says little
HOPELESS_LOST = 0.25  # of the answers, above the best of all (and 2 at least)

Measure = Callable[[Sequence[Candidate], int], Sequence[PromptKL]]


def rounds(prompts: int) -> Iterator[range]:
    """The prompts of every round: a quarter of them, then half, then all."""
    done = 0
    for until in (math.ceil(prompts / 4), math.ceil(prompts / 2), prompts):
        if until > done:
            yield range(done, until)
            done = until


def race(
    entrants: Sequence[Candidate],
    prompts: int,
    measure: Measure,
    incumbent: Candidate | None = None,
    hopeless: float = HOPELESS_KL,
) -> None:
    """Measures `entrants`, filling in what they do; those that are dropped on the way keep fewer prompts.

    After each round the worse half of every size is dropped (first by answers lost, then by KL), and every set that is
    hopeless: `hopeless` nats above the best of all, or a quarter of the answers, or worse than a smaller set. Over few
    prompts it takes more than that.
    With an `incumbent` (one of the entrants, which may have been measured before) only those go on that are ahead of
    it on the same prompts.
    """
    running, sums = list(entrants), {id(entry): MeanKL() for entry in entrants}
    for prompts_of_round in rounds(prompts):
        for prompt in prompts_of_round:
            for entry, result in zip(running, measure(running, prompt), strict=True):
                mean = sums[id(entry)]
                mean.add(result)
                if mean.prompts >= entry.prompts:  # a set that has been in a race before knows more
                    entry.kl, entry.prompts = dict(mean.kl), mean.prompts
                    entry.asked, entry.given, entry.kept = mean.asked, mean.given, mean.kept
        if prompts_of_round.stop < prompts:
            running = survivors([(entry, sums[id(entry)]) for entry in running], incumbent, hopeless)
            if running == [incumbent]:
                return


def survivors(
    measured: Sequence[tuple[Candidate, MeanKL]], incumbent: Candidate | None = None, hopeless: float = HOPELESS_KL
) -> list[Candidate]:
    """Who goes on, in the order given; at least one."""
    sizes: dict[int, list[tuple[Candidate, MeanKL]]] = defaultdict(list)
    for entry, mean in measured:
        sizes[len(entry.anchors)].append((entry, mean))
    doubt = max(1, FIRM / measured[0][1].prompts)
    lowest = min(mean.score for _, mean in measured) + hopeless * doubt
    most = min(mean.lost for _, mean in measured) + max(2, HOPELESS_LOST * measured[0][1].given)
    going = set()
    for group in sizes.values():
        group.sort(key=_order)
        ahead = [
            entry
            for entry, mean in group
            if mean.score <= lowest and mean.lost <= most and not _useless(entry, mean, measured, WORSE_KL * doubt)
        ]
        if incumbent in ahead:
            ahead = ahead[: ahead.index(incumbent) + 1]
        going.update(map(id, ahead[: math.ceil(len(group) / 2)]))
    if not going:  # the set with the lowest KL loses answers, and those that keep them have a high KL
        going = {id(min(measured, key=_order)[0])}
    return [entry for entry, _ in measured if id(entry) in going]


def _useless(entry: Candidate, mean: MeanKL, measured: Sequence[tuple[Candidate, MeanKL]], margin: float) -> bool:
    """Whether a smaller set does better: this one will neither be chosen nor be the best."""
    return any(
        len(other.anchors) < len(entry.anchors) and theirs.lost <= mean.lost and theirs.score + margin < mean.score
        for other, theirs in measured
    )


def _order(pair: tuple[Candidate, MeanKL]) -> tuple:
    entry, mean = pair
    return mean.lost, mean.score, entry.anchors


def planned(sizes: Sequence[int], prompts: int) -> int:
    """The most runs that a race of so many sets of each size can take."""
    left, total = list(sizes), 0
    for part in rounds(prompts):
        total += len(part) * sum(left)
        left = [math.ceil(count / 2) for count in left]
    return total
