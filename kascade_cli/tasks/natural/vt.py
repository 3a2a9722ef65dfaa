"""Variable tracking: which variables hold a value, through chains of assignments (RULER's `vt`)."""

from kascade_cli.tasks.natural import words
from kascade_cli.tasks.natural.base import NEEDLES, Asked, NaturalTask, Text, noise
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

HOPS = 4


class VariableTracking(NaturalTask):
    """One chain of four hops for each question; the assignments of a chain stand in order, between noise."""

    name, summary, new_tokens = "vt", "variables that hold a value, through chains of assignments", 48

    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        rng, chains = draw.rng(NEEDLES), max(1, questions)
        values = draw.own(rng, words.value, chains)
        names = draw.own(rng, words.variable, chains * (HOPS + 1))
        needles, asked = [], []
        for number, value in enumerate(values):
            chain = names[number * (HOPS + 1) : (number + 1) * (HOPS + 1)]
            needles.append(f"VAR {chain[0]} = {value}")
            needles += [f"VAR {after} = VAR {before}" for before, after in zip(chain, chain[1:], strict=False)]
            asked.append(
                Asked(
                    f"Question: Find all variables that are assigned the value {value} in the text above.",
                    f"Answer: According to the chain(s) of variable assignment in the text above, {len(chain)} "
                    f"variables are assigned the value {value}, they are:",
                    tuple(chain),
                )
            )
        opening = "Memorize and track the chain(s) of variable assignment hidden in the following text."
        return Text(opening, noise(draw, size, needles, ordered=True), asked)


TASKS = (VariableTracking(),)
