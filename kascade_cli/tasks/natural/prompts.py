"""Prompts of the tasks in natural language, ready to be run: dialogues to calibrate on, and questions to be scored."""

from typing import Any

from kascade_cli.tasks.encoding import EncodedPrompt, encode_text
from kascade_cli.tasks.natural.base import TEXT, NaturalTask, Text
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.encode import encode_dialogue, encode_questions, fit, question_ids
from kascade_cli.tasks.natural.registry import MIX, MIXED, NATURAL
from kascade_cli.tasks.natural.splits import Draw

_CHARACTERS = 8  # per token, at most: how much plain text is encoded to be cut


def dialogue(name: str, tokenizer: Any, corpus: Corpus, draw: Draw, length: int, chat: bool) -> EncodedPrompt:
    """Prompt `draw.index` of a task or of the mix, answers written out: at most `length` tokens.

    Raises KascadeError if the length cannot hold it, or the corpus is too short.
    """
    kind = MIXED[draw.index % len(MIXED)] if name == MIX else name
    if kind not in NATURAL:
        return _plain(kind, tokenizer, corpus, draw, length)

    def encode(text: Text) -> tuple[int, EncodedPrompt]:
        found = encode_dialogue(tokenizer, text, chat)
        return len(found.ids), found

    return fit(NATURAL[kind], draw, corpus, length, max(1, min(4, length // 256)), encode)


def _plain(kind: str, tokenizer: Any, corpus: Corpus, draw: Draw, length: int) -> EncodedPrompt:
    """A text without a question: `prose` or `code`, or what the corpus has of the two."""
    kinds = corpus.kinds(draw.split)
    kind = kind if kind in kinds else kinds[0]
    size = min(length * _CHARACTERS, corpus.characters(kind, draw.split) * 9 // 10)
    ids = encode_text(tokenizer, "\n\n".join(corpus.take(draw.rng(TEXT), kind, draw.split, size)))[:length]
    return EncodedPrompt(ids, [], [], len(ids))


def questions(
    task: NaturalTask, tokenizer: Any, corpus: Corpus, draw: Draw, length: int, count: int, chat: bool
) -> tuple[Text, list[int], list[list[int]]]:
    """(text, what its prompts share, what each question adds): prompts and answers take at most `length` tokens.

    Raises KascadeError if the length cannot hold the task, or the corpus is too short.
    """

    def encode(text: Text) -> tuple[int, Text]:
        # Prompts of one text differ by their questions alone: the longest is that with the longest question.
        asked = max(text.asked, key=lambda asked: len(asked.question) + len(asked.prefix))
        return len(question_ids(tokenizer, text, asked, chat)), text

    text = fit(task, draw, corpus, length - task.new_tokens, count, encode)
    return text, *encode_questions(tokenizer, text, chat)
