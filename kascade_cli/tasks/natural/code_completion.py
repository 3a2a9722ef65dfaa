"""The next line of source code, where an earlier place of the text shows what it is."""

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.natural.base import NEEDLES, TEXT, Asked, NaturalTask, Text
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

_SHOWN = 3  # lines that the answer goes on from
_SHORT = 12  # characters: shorter lines say little


class CodeCompletion(NaturalTask):
    """Source files of the corpus; a question shows three lines of them again and asks for the line that follows."""

    name, summary, new_tokens = "code_completion", "the line of source code that follows three others", 48

    def make(self, draw: Draw, corpus: Corpus, size: int, questions: int) -> Text:
        if "code" not in corpus.kinds(draw.split):
            raise KascadeError(f"the haystack {corpus.name} holds no source code for the task code_completion")
        passages = corpus.take(draw.rng(TEXT), "code", draw.split, size)
        body = "\n\n".join(passages)
        return Text(
            "The following source code is long. I will show you lines of it and ask for the line that follows them.",
            "```python\n" + body + "\n```",
            self._ask(draw, passages, max(1, questions)),
        )

    def _ask(self, draw: Draw, passages: list[str], count: int) -> list[Asked]:
        """Places whose lines stand in the text once."""
        lines = "\n\n".join(passages).split("\n")
        seen: dict[tuple[str, ...], int] = {}
        for at in range(len(lines) - _SHOWN):
            shown = tuple(lines[at : at + _SHOWN])
            seen[shown] = seen.get(shown, 0) + 1
        fit = [
            at
            for at in range(len(lines) - _SHOWN)
            if seen[tuple(lines[at : at + _SHOWN])] == 1
            and all(len(line.strip()) >= _SHORT for line in lines[at : at + _SHOWN + 1])
            and "```" not in "".join(lines[at : at + _SHOWN + 1])
        ]
        if not fit:
            raise KascadeError("the haystack's code has no four full lines in a row: take more, or a longer length")
        rng = draw.rng(NEEDLES)
        chosen = rng.choice(fit, size=min(count, len(fit)), replace=False).tolist()
        asked = []
        for at in chosen:
            shown, line = "\n".join(lines[at : at + _SHOWN]), lines[at + _SHOWN].rstrip()
            asked.append(
                Asked(
                    "Which line follows these lines in the source code above? Write that line only.\n\n"
                    f"```python\n{shown}\n```",
                    "The line that follows is:\n\n```python\n",
                    (line.strip(),),
                    written=line,
                )
            )
        return asked


TASKS = (CodeCompletion(),)
