"""Texts with questions as token ids, as long as asked for, by any tokenizer; in its chat template if it has one."""

from collections.abc import Callable
from typing import Any, TypeVar

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.tasks.encoding import EncodedPrompt, encode_text
from kascade_cli.tasks.natural.base import Asked, NaturalTask, Text
from kascade_cli.tasks.natural.corpus import Corpus
from kascade_cli.tasks.natural.splits import Draw

Encoded = TypeVar("Encoded")
_CHARACTERS_PER_TOKEN = 3.0
_FIRST = 6000  # characters of the text that shows how long a token is
_CLOSE = 0.97  # of the length: near enough
_ATTEMPTS = 8


def use_template(tokenizer: Any, wanted: bool | None) -> bool:
    """Whether prompts go through the chat template: where there is one, unless told otherwise. Raises UsageError."""
    there = bool(getattr(tokenizer, "chat_template", None))
    if wanted and not there:
        raise UsageError("this tokenizer has no chat template: leave the chat template off")
    return there if wanted is None else wanted


def question_ids(tokenizer: Any, text: Text, asked: Asked, chat: bool) -> list[int]:
    """The whole prompt of one question, up to where the answer begins (RULER's answer prefix included)."""
    if not chat:
        return encode_text(tokenizer, f"{text.user(asked)}\n\n{asked.prefix}")
    messages = [{"role": "user", "content": text.user(asked)}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(turn + asked.prefix, add_special_tokens=False, verbose=False)["input_ids"])


def encode_questions(tokenizer: Any, text: Text, chat: bool) -> tuple[list[int], list[list[int]]]:
    """(what all prompts of the text have in common, what each question adds to it)."""
    prompts = [question_ids(tokenizer, text, asked, chat) for asked in text.asked]
    shared = 0
    # A question keeps a token of its own at least.
    while shared < min(map(len, prompts)) - 1 and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    return prompts[0][:shared], [prompt[shared:] for prompt in prompts]


def encode_dialogue(tokenizer: Any, text: Text, chat: bool) -> EncodedPrompt:
    """All questions as turns of one dialogue with their answers written out; it ends with the last answer.

    Every expected string is an answer span of its own. Raises KascadeError for a template that rewrites what is said.
    """
    messages, marks = _dialogue(text)
    if chat:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        whole = "\n\n".join(message["content"] for message in messages)
    spans, asked, at = [], [], 0
    for question, reply, begins, answers in marks:
        first = _find(whole, question, at)
        at = _find(whole, reply, first) + begins
        for answer in answers:
            start = _find(whole, answer, at)
            at = start + len(answer)
            spans.append((start, at))
        asked.append((first, at))
    whole = whole[: spans[-1][1]]
    ids, token_of = _tokens(tokenizer, whole, chat)
    return EncodedPrompt(
        ids,
        [token_of(*span) for span in spans],
        [token_of(*span) for span in asked],
        token_of(*asked[0])[0],
    )


def _dialogue(text: Text) -> tuple[list[dict[str, str]], list[tuple[str, str, int, tuple[str, ...]]]]:
    """(messages, per question: it, the whole reply, where in the reply the answer begins, the expected strings)."""
    messages, marks = [], []
    for number, asked in enumerate(text.asked):
        content = text.user(asked) if number == 0 else asked.question
        opening = asked.prefix if asked.prefix.endswith("\n") else asked.prefix + " "
        reply = opening + asked.answer
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
        marks.append((asked.question, reply, len(opening), asked.answers))
    return messages, marks


def _find(whole: str, part: str, begin: int) -> int:
    at = whole.find(part, begin)
    if at < 0:
        raise KascadeError("this tokenizer's chat template rewrites messages: pass --no-chat-template")
    return at


def _tokens(tokenizer: Any, whole: str, chat: bool) -> tuple[list[int], Callable[[int, int], tuple[int, int]]]:
    """(token ids, characters [start, stop) -> tokens [start, stop) that hold them)."""
    if not getattr(tokenizer, "is_fast", False):
        raise KascadeError("this tokenizer does not say where its tokens stand (it is no fast one): use other texts")
    encoded = tokenizer(whole, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    # An end-of-sequence token that the tokenizer appends is no part of the text.
    while len(ids) > 1 and offsets[-1][1] < len(whole):
        ids, offsets = ids[:-1], offsets[:-1]

    def token_of(start: int, stop: int) -> tuple[int, int]:
        first = next(index for index, (_, end) in enumerate(offsets) if end > start)
        last = next(index for index in range(len(offsets) - 1, -1, -1) if offsets[index][0] < stop)
        return first, last + 1

    return ids, token_of


def fit(
    task: NaturalTask,
    draw: Draw,
    corpus: Corpus,
    length: int,
    questions: int,
    encode: Callable[[Text], tuple[int, Encoded]],
) -> Encoded:
    """What `encode` makes of the text of the task that takes at most `length` tokens, and nearly that many.

    encode: (how many tokens a text takes, whatever the caller wants of it).

    Where the questions do not fit, there are fewer. Raises KascadeError if not even the shortest fits, or the corpus
    is too short for the length.
    """
    size = min(_FIRST, int(length * _CHARACTERS_PER_TOKEN))
    best: tuple[int, Encoded] | None = None
    low, high = 0, None  # sizes known to fit, and not to
    for _ in range(_ATTEMPTS):
        text = task.make(draw, corpus, size, questions)
        tokens, encoded = encode(text)
        if tokens <= length:
            low = size
            if best is None or tokens > best[0]:
                best = tokens, encoded
            if tokens >= _CLOSE * length:
                break
        else:
            high = size
        # What the text itself takes grows with it; the rest is the same.
        guess = int(size * (1 + 1.02 * (0.99 * length - tokens) / max(tokens, 1)))
        if high is not None and not low < guess < high:
            guess = (low + high) // 2
        if guess <= 0 or guess == size:
            break
        size = guess
    if best is None and questions > 1:
        return fit(task, draw, corpus, length, questions // 2, encode)
    if best is None:
        raise KascadeError(f"{length} tokens cannot hold the task {task.name}: take a longer length")
    return best[1]
