"""Runs over prompts shared out over processes: the leader hands tasks out, and the others follow.

What is run is what one process runs, prompt by prompt, so results are the same to the last bit on equal devices.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kascade_cli.errors import KascadeError
from kascade_cli.processes import Ended, Team

if TYPE_CHECKING:
    from kascade_cli.devset import DevSet
    from kascade_cli.evaluation.runs import Runs
    from kascade_cli.evaluation.session import Session
    from kascade_cli.schema import Profile

T = TypeVar("T")
Item = tuple[int, int]  # prompt, place of a profile
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Prompts:
    """A dev set that later tasks name by `number`."""

    number: int
    devset: "DevSet"


@dataclass(frozen=True)
class Given:
    """How many answers dense gives: shares[rank] are prompts of dev set `number`."""

    number: int
    shares: list[list[int]]


@dataclass(frozen=True)
class Compare:
    """Profiles to run over prompts of dev set `number`: shares[rank] are items."""

    number: int
    profiles: list["Profile"]
    shares: list[list[Item]]


def even(items: Sequence[T], size: int) -> list[list[T]]:
    """`size` shares in order, whose lengths differ by one at most; the first are the longer ones."""
    short, more = divmod(len(items), size)
    ends = list(itertools.accumulate(short + (rank < more) for rank in range(size)))
    return [list(items[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


class SharedRuns:
    """The leader's side of runs over one dev set."""

    def __init__(self, team: Team, runs: "Runs") -> None:
        self.team, self.runs = team, runs
        self.number = announce(team, runs.devset)

    def measure(
        self,
        profiles: Sequence[tuple[str, "Profile"]],
        keys: Sequence[str],
        order: Sequence[int],
        prompts: Sequence[int],
    ) -> None:
        """Has the runs know what every profile does on all `prompts`. order: places of profiles, like ones in a row.

        Raises KascadeError where a process ends; what was measured until then is in the journal.
        """
        layouts = [profile for _, profile in profiles]
        todo = [(prompt, place) for prompt in prompts for place in order if not self.runs.knows(keys[place], prompt)]
        if len(todo) < 2:
            return
        shares = even(todo, self.team.size)
        self.team.hand_out(Compare(self.number, layouts, shares))
        missing = {item for share in shares[1:] for item in share}

        def collect() -> None:
            for _, (prompt, place, result) in self.team.receive():
                missing.discard((prompt, place))
                self.runs.learn(keys[place], prompt, profiles[place][0], result)

        try:
            for prompt, places in _by_prompt(shares[0]):
                for place, result in self.runs.compare(layouts, prompt, places):
                    self.runs.learn(keys[place], prompt, profiles[place][0], result)
                    collect()
            while missing:
                self.team.pause()
                collect()
        except Ended as error:
            raise KascadeError(f"{error}; {_kept(self.runs)}") from error


def _kept(runs: "Runs") -> str:
    if runs.journal is None:
        return "run the command again"
    return f"{len(runs.journal)} runs are kept in {runs.journal.path}: run the same command again"


def _by_prompt(items: Sequence[Item]) -> Iterator[tuple[int, list[int]]]:
    for prompt, group in itertools.groupby(items, key=lambda item: item[0]):
        yield prompt, [place for _, place in group]


def announce(team: Team, devset: "DevSet") -> int:
    """Tells the others of a dev set; returns its number."""
    number = next(_numbers)
    team.hand_out(Prompts(number, devset))
    return number


def shared_given(team: Team, devset: "DevSet", prompts: Sequence[int], given: Callable[[int], int]) -> dict[int, int]:
    """prompt -> how many of its answers dense gives, for the leader. `given(prompt)` runs one here.

    Raises KascadeError where a process ends.
    """
    shares = even(prompts, team.size)
    team.hand_out(Given(announce(team, devset), shares))
    found = {prompt: given(prompt) for prompt in shares[0]}
    while len(found) < len(prompts):
        team.pause()
        found.update(answer for _, answer in team.receive())
    return found


def follow(team: Team, session: "Session") -> None:
    """What every process but the leader does once it has the model, until the leader is through (Over)."""
    devsets: dict[int, Any] = {}
    runs: dict[int, Runs] = {}
    for task in team.tasks():
        if isinstance(task, Prompts):
            devsets[task.number] = task.devset
        elif isinstance(task, Given):
            for prompt in task.shares[team.rank]:
                team.send((prompt, session.dense(devsets[task.number], prompt).given))
        else:
            if task.number not in runs:
                runs[task.number] = session.runs(devset=devsets[task.number])
            for prompt, places in _by_prompt(task.shares[team.rank]):
                for place, result in runs[task.number].compare(task.profiles, prompt, places):
                    team.send((prompt, place, result))
