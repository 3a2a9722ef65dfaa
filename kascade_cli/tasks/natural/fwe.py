"""Frequent words: the three most frequent words of a coded text (RULER's `fwe`)."""

import numpy as np

from kascade_cli.tasks.natural import words
from kascade_cli.tasks.natural.base import NEEDLES, TEXT, Asked, NaturalTask, Text
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

EXPONENT, KINDS = 2.0, 200  # of the Zipf law; different words


class FrequentWords(NaturalTask):
    """Words without a meaning, as often as a Zipf law with exponent 2 says, between dots."""

    name, summary, new_tokens = "fwe", "the three most frequent words of a coded text", 32

    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        found = draw.own(draw.rng(NEEDLES), words.coded, KINDS)
        total = max(16, size // 8)
        shares = np.arange(1, KINDS + 1) ** -EXPONENT
        counts = np.round(total * shares / shares.sum()).astype(int)
        counts[1] = min(counts[1], counts[0] - 1)
        counts[2], counts[3:] = min(counts[2], counts[1] - 1), np.minimum(counts[3:], counts[2] - 1)
        text = [word for word, count in zip(found, counts.tolist(), strict=True) for _ in range(count)]
        order = draw.rng(TEXT).permutation(len(text))
        body = " ".join("...." if index < 0 else text[index] for index in _dotted(order))
        return Text(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words.",
            body,
            [
                Asked(
                    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                    "frequently appeared words in the above coded text?",
                    "Answer: According to the coded text above, the three most frequently appeared words are:",
                    tuple(found[:3]),
                )
            ],
        )


def _dotted(order: np.ndarray) -> list[int]:
    """`order` with a place for dots after every sixth entry."""
    result: list[int] = []
    for number, index in enumerate(order.tolist(), 1):
        result.append(index)
        if number % 6 == 0:
            result.append(-1)
    return result


TASKS = (FrequentWords(),)
