"""Long-context tasks in natural language, for any tokenizer, in the vocabulary of RULER (arXiv 2404.06654)."""

from kascade_cli.tasks.natural.corpus import Corpus, open_corpus
from kascade_cli.tasks.natural.encode import use_template
from kascade_cli.tasks.natural.prompts import dialogue, questions
from kascade_cli.tasks.natural.registry import MIX, MIX_TASKS, MIXED, NATURAL, natural_names
from kascade_cli.tasks.natural.splits import Draw, owner

__all__ = [
    "MIX",
    "MIX_TASKS",
    "MIXED",
    "NATURAL",
    "Corpus",
    "Draw",
    "dialogue",
    "natural_names",
    "open_corpus",
    "owner",
    "questions",
    "use_template",
]
