"""Common words: the ten that a list repeats most (RULER's `cwe`)."""

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.natural import words
from kascade_cli.tasks.natural.base import NEEDLES, TEXT, Asked, NaturalTask, Text
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

COMMON, OFTEN, SELDOM = 10, 30, 3  # common words; times that they and the others appear
_CHARACTERS = 13  # of an entry of the list, about


class CommonWords(NaturalTask):
    """Ten words stand 30 times each in a numbered list, the others 3 times; short lists have fewer of both."""

    name, summary, new_tokens = "cwe", "the ten most common words of a list", 64

    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        entries = size // _CHARACTERS
        often = min(OFTEN, entries // (2 * COMMON))
        if often < 4:
            raise KascadeError(f"{size} characters are too short for the task cwe: take a longer length")
        seldom = min(SELDOM, often // 2)
        common = draw.own(draw.rng(NEEDLES), words.common, COMMON)
        rng = draw.rng(TEXT)
        others = (entries - COMMON * often) // seldom
        # Where plain words run out, coded ones follow.
        rare = draw.own(rng, lambda g: words.common(g) if g.random() < 0.2 else words.coded(g), others + COMMON)
        rare = [word for word in rare if word not in common][:others]
        listed = common * often + rare * seldom
        order = rng.permutation(len(listed))
        body = " ".join(f"{number}. {listed[index]}" for number, index in enumerate(order, 1))
        return Text(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.",
            body,
            [
                Asked(
                    f"Question: What are the {COMMON} most common words in the above list?",
                    f"Answer: The top {COMMON} words that appear most often in the list are:",
                    tuple(common),
                )
            ],
        )


TASKS = (CommonWords(),)
