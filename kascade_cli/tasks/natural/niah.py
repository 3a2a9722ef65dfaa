"""Needles in a haystack, RULER's eight: single, multi-key, multi-value, multi-query."""

from collections.abc import Callable

import numpy as np

from kascade_cli.tasks.natural import words
from kascade_cli.tasks.natural.base import NEEDLES, TEXT, Asked, NaturalTask, Text, haystack, listed, noise, scatter
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_KINDS: dict[str, Callable[[np.random.Generator], str]] = {"numbers": words.number, "uuids": words.identifier}


class Niah(NaturalTask):
    """Keys with values hidden in a text.

    around: `text` (the corpus), `noise`, or `needles` (nothing but other needles). keys: how many are hidden beside
    those asked for; values of each key; asked_keys: how many one question names. keyed: what keys are made of.
    """

    def __init__(
        self,
        name: str,
        summary: str,
        *,
        around: str = "text",
        kind: str = "numbers",
        keyed: str = "words",
        keys: int = 1,
        values: int = 1,
        asked_keys: int = 1,
        new_tokens: int = 24,
    ) -> None:
        self.name, self.summary, self.around, self.kind, self.keyed = name, summary, around, kind, keyed
        self.keys, self.values, self.asked_keys, self.new_tokens = keys, values, asked_keys, new_tokens

    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        """Single needles carry one question; the others as many as there are keys, at least four."""
        rng = draw.rng(NEEDLES)
        single = self.keys == self.values == self.asked_keys == 1 and self.around != "needles"
        count = 1 if single else max(1, questions)
        total = max(self.keys, count * self.asked_keys)
        keys = draw.own(rng, words.identifier if self.keyed == "uuids" else words.key, total)
        values = draw.own(rng, _KINDS[self.kind], total * self.values)
        held = {key: values[number * self.values : (number + 1) * self.values] for number, key in enumerate(keys)}
        needles = [self._needle(key, value) for key in keys for value in held[key]]
        asked = [self._ask(keys[n * self.asked_keys : (n + 1) * self.asked_keys], held) for n in range(count)]
        opening = (
            f"Some special magic {self.kind} are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {self.kind} afterwards."
        )
        return Text(opening, self._body(draw, corpus, size, needles), asked)

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.kind, key=key, value=value)

    def _body(self, draw: Draw, corpus: Corpus, size: int, needles: list[str]) -> str:
        if self.around == "noise":
            return noise(draw, size, needles)
        if self.around == "text":
            return haystack(draw, corpus, size, needles)
        rng = draw.rng(TEXT)
        others = max(1, (size - len(needles) * len(needles[0])) // (len(needles[0]) + 1))
        maker = words.identifier if self.keyed == "uuids" else words.key
        # Keys of others may repeat one another, but never a key that is asked for.
        taken = {needle.split(" for ")[1].split(" is: ")[0] for needle in needles}
        lines = []
        while len(lines) < others:
            (key,), (value,) = draw.own(rng, maker, 1), draw.own(rng, _KINDS[self.kind], 1)
            if key not in taken:
                lines.append(self._needle(key, value))
        return "\n".join(scatter(draw, lines, needles))

    def _ask(self, keys: list[str], held: dict[str, list[str]]) -> Asked:
        answers = tuple(value for key in keys for value in held[key])
        query = listed(keys)
        if len(answers) == 1:
            kind = self.kind[:-1]
            return Asked(
                f"What is the special magic {kind} for {query} mentioned in the provided text?",
                f"The special magic {kind} for {query} mentioned in the provided text is",
                answers,
            )
        return Asked(
            f"What are all the special magic {self.kind} for {query} mentioned in the provided text?",
            f"The special magic {self.kind} for {query} mentioned in the provided text are",
            answers,
        )


TASKS = (
    Niah("niah_single_1", "one number, hidden in repeated sentences", around="noise"),
    Niah("niah_single_2", "one number, hidden in prose or code"),
    Niah("niah_single_3", "one UUID, hidden in prose or code", kind="uuids", new_tokens=64),
    Niah("niah_multikey_1", "numbers of several keys in prose or code; one is asked for", keys=4),
    Niah("niah_multikey_2", "a text of nothing but numbers of keys", around="needles", keys=4),
    Niah("niah_multikey_3", "the same with UUIDs as keys and values", around="needles", keys=4, kind="uuids",
         keyed="uuids", new_tokens=64),
    Niah("niah_multivalue", "four numbers of one key", values=4, new_tokens=64),
    Niah("niah_multiquery", "the numbers of four keys in one question", keys=4, asked_keys=4, new_tokens=64),
)  # fmt: skip
