"""Which candidates are measured on which prompts: all on few, the better half of every size on more.

Knows no model: `measure(candidates, prompt)` gives what each does on one prompt.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from kascade_cli.analysis.candidates import Candidate, Figures
from kascade_cli.analysis.verdict import finalists
from kascade_cli.evaluation.forced import PromptKL
from kascade_cli.evaluation.kl import MeanKL

HOPELESS_KL = 0.25  # nats above the best of all, over FIRM prompts: a set that is measured no further
WORSE_KL = 0.02  # nats above a smaller set, that keeps as many answers: of no use
FIRM = 4  # of n prompts fewer than this, FIRM / n times as much: one prompt says little
CHANCE = 1  # an answer that a set may lose more than the incumbent, over part of the prompts
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
    With an `incumbent` (one of the entrants, which may have been measured before) only those of its size go on that
    lose at most one answer more on the same prompts, or, where nobody loses any, are ahead of it.
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


def final(measured: Sequence[Candidate], count: int) -> list[Candidate]:
    """The `count` best of those that ran on all prompts, as `survivors` orders them."""
    return sorted(finalists(measured), key=lambda entry: _order((entry, entry)))[:count]


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
        going.update(map(id, _not_behind(group, ahead, incumbent)[: math.ceil(len(group) / 2)]))
    if not going:  # the set with the lowest KL loses answers, and those that keep them have a high KL
        going = {id(min(measured, key=_order)[0])}
    return [entry for entry, _ in measured if id(entry) in going]


def _not_behind(
    group: Sequence[tuple[Candidate, MeanKL]], ahead: list[Candidate], incumbent: Candidate | None
) -> list[Candidate]:
    """Of `ahead` (in order) those that may still beat the incumbent: one answer over part of the prompts is chance."""
    if incumbent not in ahead:
        return ahead
    lost = {id(entry): mean.lost for entry, mean in group}
    place = ahead.index(incumbent)
    near = [entry for entry in ahead[place + 1 :] if 0 < lost[id(entry)] <= lost[id(incumbent)] + CHANCE]
    return [*ahead[: place + 1], *near]


def _useless(entry: Candidate, mean: MeanKL, measured: Sequence[tuple[Candidate, MeanKL]], margin: float) -> bool:
    """Whether a smaller set does better: this one will neither be chosen nor be the best."""
    return any(
        len(other.anchors) < len(entry.anchors) and theirs.lost <= mean.lost and theirs.score + margin < mean.score
        for other, theirs in measured
    )


def _order(pair: tuple[Candidate, Figures]) -> tuple:
    entry, mean = pair
    return mean.lost, mean.score, entry.key


def planned(sizes: Sequence[int], prompts: int) -> int:
    """The most runs that a race of so many sets of each size can take."""
    left, total = list(sizes), 0
    for part in rounds(prompts):
        total += len(part) * sum(left)
        left = [math.ceil(count / 2) for count in left]
    return total
