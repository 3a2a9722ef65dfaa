"""Questions of many contexts answered by several processes: every process takes every N-th group of cases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.batched import answer_all, grouped
from kascade_cli.evaluation.cases import Case
from kascade_cli.integrations.transformers import attach_setting
from kascade_cli.processes import Ended, Team
from kascade_cli.sparse import Setting

Answers = list[list[list[int]]]  # per case and question, the tokens written
Counts = dict[str, tuple[float, float]]  # phase -> keys read, keys visible


@dataclass(frozen=True)
class Ask:
    """One setting to answer cases under: shares[rank] are (number of the case, case)."""

    setting: Setting
    shares: list[list[tuple[int, Case]]]


def answer(
    model: Any, setting: Setting, cases: Sequence[Case], advance: Callable[[int], None]
) -> tuple[Answers, dict[str, Any]]:
    """(what is written, the attachment's report). `advance(number)` is called when a case has been read."""
    with attach_setting(model, setting) as attachment:
        written = answer_all(model, cases, tile=attachment.budget.tile, advance=advance)
        return written, attachment.report()


def answer_shared(
    team: Team, model: Any, setting: Setting, cases: Sequence[Case], advance: Callable[[int], None]
) -> tuple[Answers, dict[str, Any]]:
    """`answer` for the leader: the others, in `follow_answers`, answer their shares. Keys are counted over all.

    Raises KascadeError where a process ends.
    """
    groups = list(grouped(cases))
    shares = [
        [(index, cases[index]) for group in groups[rank :: team.size] for index in group] for rank in range(team.size)
    ]
    team.hand_out(Ask(setting, shares))
    written: Answers = [[] for _ in cases]
    counts: list[Counts] = []
    working = {rank for rank, share in enumerate(shares) if rank and share}

    def collect() -> None:
        for rank, message in team.receive():
            if isinstance(message, int):
                advance(message)
                continue
            working.discard(rank)
            counts.append(message[1])
            _place(written, shares[rank], message[0])

    def read(number: int) -> None:
        advance(shares[0][number][0])
        collect()

    try:
        mine, report = answer(model, setting, [case for _, case in shares[0]], read)
        while working:
            team.pause()
            collect()
    except Ended as error:
        raise KascadeError(f"{error}; nothing is kept: run the command again") from error
    _place(written, shares[0], mine)
    return written, report | _summed([_counts(report), *counts])


def follow_answers(team: Team, model: Any) -> None:
    """What every process but the leader does once it has the model, until the leader is through (Over)."""
    for task in team.tasks():
        mine = task.shares[team.rank]
        if mine:
            written, report = answer(
                model, task.setting, [case for _, case in mine], lambda number, mine=mine: team.send(mine[number][0])
            )
            team.send((written, _counts(report)))


def _place(written: Answers, share: Sequence[tuple[int, Case]], found: Answers) -> None:
    for (number, _), answers in zip(share, found, strict=True):
        written[number] = answers


def _counts(report: dict[str, Any]) -> Counts:
    return {phase: (entry["keys_read"], entry["keys_visible"]) for phase, entry in report["phases"].items()}


def _summed(counts: Sequence[Counts]) -> dict[str, Any]:
    """Keys read and visible of all processes, as a report has them."""
    phases = {}
    for phase in dict.fromkeys(phase for entry in counts for phase in entry):
        read, visible = (sum(entry[phase][which] for entry in counts if phase in entry) for which in (0, 1))
        phases[phase] = _density(read, visible)
    totals = (sum(entry[name] for entry in phases.values()) for name in ("keys_read", "keys_visible"))
    return {"phases": phases} | _density(*totals)


def _density(read: float, visible: float) -> dict[str, float]:
    return {"keys_read": read, "keys_visible": visible, "density": read / visible if visible else float("nan")}
