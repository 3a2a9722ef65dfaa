"""What a task in natural language is: a long text, questions about it, and how answers are scored.

The vocabulary is that of RULER (Hsieh et al., arXiv 2404.06654): names, wording, answer prefixes, scoring.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

# Streams of a Draw: needles stay the same when the text around them grows.
NEEDLES, TEXT, PLACES, KIND = range(4)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Asked:
    """A question that follows the text, how the answer begins, and the strings that it shall hold, in order.

    written: the answer as it is written out in a dev set; the strings joined by commas by default.
    """

    question: str
    prefix: str
    answers: tuple[str, ...]
    written: str = ""

    @property
    def answer(self) -> str:
        return self.written or ", ".join(self.answers)


@dataclass(frozen=True)
class Text:
    """`opening` says what will be asked; `body` is long; `asked` are questions about it, each on its own."""

    opening: str
    body: str
    asked: list[Asked] = field(default_factory=list)

    def user(self, asked: Asked) -> str:
        """The user's turn."""
        return "\n\n".join(part for part in (self.opening, self.body, asked.question) if part)


class NaturalTask(ABC):
    """One task. `score`: which share of the answers counts (tasks.scoring); new_tokens: room for the answer."""

    name: str
    summary: str
    new_tokens: int = 32
    score: str = "all"

    @abstractmethod
    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        """A text of about `size` characters with up to `questions` questions.

        For one draw the questions stay the same whatever the size (but for code_completion). Raises KascadeError if
        the corpus is too short, or `size` cannot hold the task.
        """


def haystack(draw: Draw, corpus: Corpus, size: int, needles: Sequence[str], kind: str | None = None) -> str:
    """Passages of the corpus with the needles between them, each on a line of its own.

    kind: `prose` or `code`; by default one of them at random, of those that the corpus has enough of.
    """
    kinds = corpus.kinds(draw.split)
    if not kinds:
        raise KascadeError(f"the haystack {corpus.name} is too short: no text is left for the {draw.split} split")
    if kind is None:
        enough = [name for name in kinds if corpus.characters(name, draw.split) >= size] or [kinds[-1]]
        kind = enough[int(draw.rng(KIND).integers(len(enough)))]
    room = size - sum(len(needle) + 2 for needle in needles)
    passages = corpus.take(draw.rng(TEXT), kind, draw.split, max(room, 1))
    return "\n\n".join(scatter(draw, passages, needles))


def noise(draw: Draw, size: int, needles: Sequence[str], ordered: bool = False) -> str:
    """RULER's noise: five sentences again and again, with the needles between them."""
    room = size - sum(len(needle) + 1 for needle in needles)
    return "\n".join(scatter(draw, [NOISE] * max(1, room // (len(NOISE) + 1)), needles, ordered))


def scatter(draw: Draw, passages: Sequence[str], needles: Sequence[str], ordered: bool = False) -> list[str]:
    """Needles at random depths between the passages; `ordered` keeps them in their order."""
    depths = draw.rng(PLACES).random(len(needles))
    if ordered:
        depths = np.sort(depths)
    places = sorted(zip((depths * (len(passages) + 1)).astype(int).tolist(), range(len(needles)), strict=True))
    result: list[str] = []
    begin = 0
    for place, number in places:
        result += [*passages[begin:place], needles[number]]
        begin = place
    return result + list(passages[begin:])


def listed(words: Sequence[str]) -> str:
    """`a, b, and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]
