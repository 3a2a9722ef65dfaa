"""Task prompts as token ids of any tokenizer that round-trips the task words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.questions import Prompt
from kascade_cli.tasks.vocabulary import TASK_WORDS


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a whole prompt, answers included.

    answers: per question of the prompt, the half-open token span [start, stop) of its answer. The logits at
    [start - 1, stop - 1) predict it. questions: the spans of the questions, each with its answer.
    haystack_tokens: tokens before the first question, BOS included.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    questions: list[tuple[int, int]]
    haystack_tokens: int

    @property
    def answer_positions(self) -> list[int]:
        """Token positions whose logits predict answer tokens, ascending."""
        return predicting(self.answers)


def predicting(answers: Iterable[tuple[int, int]]) -> list[int]:
    """Positions whose logits predict the tokens of answers (half-open token spans), ascending."""
    return [position for start, stop in answers for position in range(start - 1, stop - 1)]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that opens a sequence: the tokenizer's own BOS once at most, no trailing EOS."""
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        del ids[0]
    added_eos = eos not in (None, bos) and ids and ids[-1] == eos
    if added_eos and not text.rstrip().endswith(tokenizer.eos_token):
        del ids[-1]
    return ids


def encode_more(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that continues a sequence: no special tokens, a space in front."""
    return list(tokenizer(" " + text, add_special_tokens=False, verbose=False)["input_ids"])


def _round_trips(tokenizer: Any, ids: list[int], text: str) -> bool:
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return False
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).split() == text.split()


def check_words(tokenizer: Any) -> None:
    """Raises KascadeError naming the task words that the tokenizer cannot write and read back.

    Words of several pieces are fine as long as decoding gives the word again.
    """
    text = " ".join(TASK_WORDS)
    if _round_trips(tokenizer, encode_more(tokenizer, text), text):
        return
    lost = [word for word in TASK_WORDS if not _round_trips(tokenizer, encode_more(tokenizer, word), word)]
    if lost:
        names = " ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        raise KascadeError(f"this tokenizer lacks words of the built-in tasks ({names}): use other texts")
    raise KascadeError("this tokenizer joins the words of the built-in tasks: use other texts")


def knows_words(tokenizer: Any) -> bool:
    """Whether the words of the demo tasks are one token each, as for the models that were trained on them."""
    text = " ".join(TASK_WORDS)
    ids = encode_more(tokenizer, text)
    return len(ids) == len(TASK_WORDS) and _round_trips(tokenizer, ids, text)


def encode_prompt(prompt: Prompt, tokenizer: Any) -> EncodedPrompt:
    """Token ids and answer spans. Encoded piece by piece, so that every span is exact for any tokenizer."""
    ids = encode_text(tokenizer, prompt.haystack)
    haystack_tokens = len(ids)
    answers, questions = [], []
    for question in prompt.questions:
        asked = len(ids)
        ids += encode_more(tokenizer, question.prompt)
        start = len(ids)
        ids += encode_more(tokenizer, question.answer)
        answers.append((start, len(ids)))
        questions.append((asked, len(ids)))
    return EncodedPrompt(ids, answers, questions, haystack_tokens)
