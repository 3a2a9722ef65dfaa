"""Questions about a haystack, and the prompts that carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kascade_cli.errors import KascadeError
from kascade_cli.tasks import vocabulary as voc
from kascade_cli.tasks.haystack import LAYOUTS, Haystack, haystack_of_length

# Words of every draw come from SeedSequence(seed, spawn_key=(split, index)). Different splits are different
# spawn keys, so that no seed of one split can give the stream of another.
SPLITS = {"train": 0, "dev": 1, "held-out": 2, "test": 3}


@dataclass(frozen=True)
class Task:
    """One kind of question.

    `marker` opens the question; `hops` counts the look-ups; in a silent task the intermediate keys are not
    written out, so that all hops happen inside one forward pass. A mix (`members`) has no questions of its
    own.
    """

    name: str
    summary: str
    layout: str
    marker: int = voc.UNK
    hops: int = 0
    silent: bool = False
    members: tuple[str, ...] = ()

    @property
    def words(self) -> int:
        """Words of one question with its answer; of a mix, of one question of each kind."""
        if self.members:
            return sum(TASKS[name].words for name in self.members)
        return 4 if self.silent or self.hops == 1 else 5


@dataclass(frozen=True)
class Question:
    """`prompt` (words) is to be continued with exactly `answer` (words)."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """One haystack and the questions asked after it. `layout` names its distribution."""

    haystack: str
    questions: list[Question]
    layout: str

    def text(self) -> str:
        """Haystack, questions and answers in order: the text to score with teacher forcing."""
        return " ".join([self.haystack, *(f"{q.prompt} {q.answer}" for q in self.questions)])


_HOPS = ("single-hop", "two-hop", "silent-two-hop", "silent-three-hop")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("single-hop", "a record's values: ? k -> v1 v2", "hops", voc.ASK, 1),
        Task("two-hop", "follow a link, in writing: ?? a -> k v1 v2", "hops", voc.ASK_TWO, 2),
        Task("silent-two-hop", "follow a link unwritten: <r0> a -> v1 v2", "hops", voc.ASK_SILENT_TWO, 2, True),
        Task("silent-three-hop", "two links unwritten: <r1> b -> v1 v2", "hops", voc.ASK_SILENT_THREE, 3, True),
        Task("hops", "all four kinds about one haystack (16-layer model)", "hops", members=_HOPS),
        Task("pairs", "single-hop and two-hop, no links to links (8-layer model)", "pairs", members=_HOPS[:2]),
    )
}


def get_task(name: str) -> Task:
    """The task of that name, or KascadeError with the names there are."""
    try:
        return TASKS[name]
    except KeyError:
        raise KascadeError(f"no task is called {name!r}: choose from {', '.join(TASKS)}") from None


def member_tasks(name: str) -> tuple[str, ...]:
    """The kinds of question that `name` asks: its members, or itself."""
    return get_task(name).members or (name,)


def prompt_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Generator of prompt `index` of a split (`train`, `dev`, `held-out`, `test`); all are independent.

    Prompt i does not depend on how many prompts are drawn.
    """
    if seed < 0:
        raise KascadeError(f"the seed must not be negative, got {seed}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS[split], index)))


def question_ids(task: str, haystack: Haystack, item: int) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of the question about record (single-hop), link or link to a link `item`."""
    kind = TASKS[task]
    if kind.hops == 1:
        return [kind.marker, haystack.record_keys[item]], list(haystack.record_values[item])
    if kind.hops == 2:
        key, record = haystack.link_keys[item], haystack.link_target[item]
    else:
        key, record = haystack.relink_keys[item], haystack.link_target[haystack.relink_target[item]]
    answer = list(haystack.record_values[record])
    return [kind.marker, key], answer if kind.silent else [haystack.record_keys[record], *answer]


def final_record(task: str, haystack: Haystack, item: int) -> int:
    """The record that holds the answer."""
    hops = TASKS[task].hops
    if hops == 1:
        return item
    return int(haystack.link_target[item if hops == 2 else haystack.relink_target[item]])


def item_count(task: str, haystack: Haystack) -> int:
    """How many different questions of this kind the haystack can carry."""
    return len((haystack.record_keys, haystack.link_keys, haystack.relink_keys)[TASKS[task].hops - 1])


def make_prompt(
    rng: np.random.Generator,
    length: int,
    questions_per_task: int,
    *,
    tasks: Sequence[str] = ("hops",),
    layout: str | None = None,
) -> Prompt:
    """A haystack of `length` tokens (`length - 1` words and the BOS token) and shuffled questions about it.

    No two questions of a prompt end at the same record, so an earlier answer never gives a later one away.
    Where a short haystack has no more such questions, a task gets fewer than `questions_per_task`. `layout`
    (a key of LAYOUTS) defaults to that of the tasks. Raises KascadeError for an unknown task, or a layout or
    length that cannot carry it.
    """
    kinds = list(dict.fromkeys(kind for name in tasks for kind in member_tasks(name)))
    layout = layout or get_task(tasks[0]).layout
    if layout not in LAYOUTS:
        raise KascadeError(f"no layout is called {layout!r}: choose from {', '.join(LAYOUTS)}")
    haystack = haystack_of_length(rng, length, LAYOUTS[layout])
    missing = [kind for kind in kinds if not item_count(kind, haystack)]
    if missing:
        raise KascadeError(f"the layout {layout!r} has no {missing[0]} questions: use the layout 'hops'")

    candidates = {kind: list(rng.permutation(item_count(kind, haystack))) for kind in kinds}
    used: set[int] = set()
    questions: list[Question] = []
    # Kinds with few candidates choose first and take turns; single-hop has every record to choose from.
    kinds.sort(key=lambda kind: -TASKS[kind].hops)
    for group in ([k for k in kinds if TASKS[k].hops > 1], [k for k in kinds if TASKS[k].hops == 1]):
        for kind in group * questions_per_task:
            while candidates[kind]:
                item = candidates[kind].pop()
                record = final_record(kind, haystack, item)
                if record not in used:
                    used.add(record)
                    prompt, answer = question_ids(kind, haystack, item)
                    questions.append(Question(kind, voc.to_text(prompt), voc.to_text(answer)))
                    break
    order = rng.permutation(len(questions))
    return Prompt(voc.to_text(haystack.ids), [questions[i] for i in order], layout)


def make_prompts(
    task: str, *, length: int, count: int, questions_per_task: int, seed: int, split: str = "test"
) -> list[Prompt]:
    """Prompts 0 .. count-1 of a split, for one task or mix: the usual way to get a test set."""
    return [make_prompt(prompt_rng(seed, split, i), length, questions_per_task, tasks=(task,)) for i in range(count)]
