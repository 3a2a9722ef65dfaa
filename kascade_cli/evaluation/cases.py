"""What is asked: contexts with questions, from the built-in tasks' test split or from the user's own .jsonl file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kascade_cli.console import format_size
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import ModelInfo
from kascade_cli.tasks import TASKS, check_words, exact_match, get_task, make_prompt, member_tasks, prompt_rng
from kascade_cli.tasks.chat import encode_request
from kascade_cli.tasks.encoding import encode_more, encode_text

DEFAULT_PROMPTS = 16


@dataclass(frozen=True)
class EncodedQuestion:
    """`ids` follow the case's context; the answer is right when the words that follow are `answer`."""

    task: str
    ids: list[int]
    answer: str
    answer_tokens: int


@dataclass(frozen=True)
class Case:
    """One context (token ids, BOS included) and the questions about it: a cluster of the intervals."""

    context: list[int]
    questions: list[EncodedQuestion]

    @property
    def tokens(self) -> int:
        """Length of the context with its longest question."""
        return len(self.context) + max(len(question.ids) for question in self.questions)

    @property
    def positions(self) -> int:
        """Positions that the longest question takes with its answer."""
        return len(self.context) + max(len(question.ids) + question.answer_tokens for question in self.questions)


def is_right(tokenizer: Any, tokens: Sequence[int], question: EncodedQuestion) -> bool:
    """Whether the tokens written (as many as the answer has) read as the answer's words: all of them, in order."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return exact_match(text, question.answer)


def split_sources(names: Sequence[str], demo_task: str | None = None) -> tuple[list[str], str | None, list[Path]]:
    """(kinds of built-in question, their haystack layout or None, files) of what `--task` names.

    `demo_task` is the mix that a shipped model was trained on: it lends its layout where that has every kind asked
    for. Raises UsageError for a name that is neither, and for tasks that cannot share a haystack.
    """
    files = [Path(name) for name in names if name not in TASKS and name.endswith((".jsonl", ".ndjson"))]
    for name in names:
        if name not in TASKS and not name.endswith((".jsonl", ".ndjson")):
            raise UsageError(f"no task is called '{name}'; use {', '.join(TASKS)}, or a .jsonl file")
    built_in = [name for name in names if name in TASKS]
    kinds = list(dict.fromkeys(kind for name in built_in for kind in member_tasks(name)))
    layouts = {get_task(name).layout for name in built_in}
    if demo_task and set(kinds) <= set(member_tasks(demo_task)) and not any(get_task(n).members for n in built_in):
        layouts = {get_task(demo_task).layout}
    if len(layouts) > 1:
        raise UsageError(f"--task {','.join(built_in)} mixes two kinds of haystack; evaluate them one by one")
    return kinds, (layouts.pop() if kinds else None), files


def built_in_cases(
    kinds: Sequence[str], layout: str, tokenizer: Any, *, length: int, num_prompts: int, questions: int, seed: int
) -> list[Case]:
    """Test prompts whose haystacks have `length` tokens (fewer where words take several), questions of every kind.

    The test split of the seed: disjoint from every dev and held-out prompt by construction. Raises KascadeError if
    the tokenizer lacks the words or the length cannot carry the tasks.
    """
    check_words(tokenizer)
    cases = [_built_in_case(kinds, layout, tokenizer, length, questions, seed, index) for index in range(num_prompts)]
    asked = {question.task for case in cases for question in case.questions}
    if missing := [kind for kind in kinds if kind not in asked]:
        raise KascadeError(f"a text of {length} tokens is too short for {missing[0]} questions: raise --max-length")
    return cases


def _built_in_case(
    kinds: Sequence[str], layout: str, tokenizer: Any, length: int, questions: int, seed: int, index: int
) -> Case:
    words = length
    while True:
        # The same stream for every length tried, so that a prompt depends on the seed and its index alone.
        rng = prompt_rng(seed, "test", index)
        prompt = make_prompt(rng, words, questions, tasks=tuple(kinds), layout=layout)
        context = encode_text(tokenizer, prompt.haystack)
        if len(context) <= length:
            break
        words = min(words - 1, int(words * length / len(context)))
    asked = []
    for question in prompt.questions:
        answer = encode_more(tokenizer, question.answer)
        asked.append(
            EncodedQuestion(question.task, encode_more(tokenizer, question.prompt), question.answer, len(answer))
        )
    return Case(context, asked)


def file_cases(
    path: Path, tokenizer: Any, *, max_length: int | None, limit: int | None, chat: bool, room: int | None = None
) -> tuple[list[Case], int]:
    """(cases, rows left out as too long) of a .jsonl file with {"prompt": ..., "answer": ...} rows.

    A row is a case of its own. `max_length` bounds the prompt's tokens, `room` those of prompt and answer; `limit`
    takes the first so many usable rows. Raises KascadeError naming the line that cannot be used.
    """
    cases: list[Case] = []
    dropped = 0
    for number, row in _rows(path):
        if limit is not None and len(cases) == limit:
            break
        ids = encode_request(tokenizer, row["prompt"], chat=chat, place=f"{path}, line {number}")
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] if chat else None
        answer = encode_more(tokenizer, row["answer"]) if answer is None else answer
        if (max_length and len(ids) > max_length) or (room and len(ids) + len(answer) > room):
            dropped += 1
            continue
        cases.append(Case(ids[:-1], [EncodedQuestion(path.stem, ids[-1:], row["answer"], len(answer))]))
    if not cases:
        # A prompt needs room for an answer too, but its own length is what the user can change.
        limit = min(bound for bound in (max_length, room) if bound) if dropped else None
        reason = f"all {dropped} prompts are longer than {limit} tokens" if dropped else "it has no rows"
        raise KascadeError(f"no prompts left of {path}: {reason}")
    return cases, dropped


def gather_cases(
    sources: tuple[Sequence[str], str | None, Sequence[Path]],
    tokenizer: Any,
    info: ModelInfo,
    length: int | None,
    *,
    num_prompts: int | None,
    questions: int,
    seed: int,
    chat: bool,
    note: Callable[[str], None] = lambda text: None,
) -> list[Case]:
    """The cases of all `sources` (split_sources) at one length. `note` gets one line where a file's rows are left out.

    Raises KascadeError for texts that do not fit into the model's positions.
    """
    kinds, layout, files = sources
    cases: list[Case] = []
    if kinds:
        count = num_prompts or DEFAULT_PROMPTS
        cases += built_in_cases(
            kinds, layout, tokenizer, length=length, num_prompts=count, questions=questions, seed=seed
        )
        longest = max(case.positions for case in cases)
        if info.max_positions and longest > info.max_positions:
            raise KascadeError(
                f"prompts of {format_size(length)} tokens take {longest} positions with question and answer, and "
                f"{info.name} has {info.max_positions}: lower --max-length"
            )
    for path in files:
        found, dropped = file_cases(
            path, tokenizer, max_length=length, limit=num_prompts, chat=chat, room=info.max_positions
        )
        if dropped:
            bound = min(bound for bound in (length, info.max_positions) if bound)
            note(f"{path}: {dropped} prompts longer than {format_size(bound)} left out")
        cases += found
    return cases


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise KascadeError(f"cannot read {path}: {reason}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KascadeError(f"{path}, line {number}: not JSON ({error.msg})") from error
        for name in ("prompt", "answer"):
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise KascadeError(f'{path}, line {number}: needs a non-empty text "{name}"')
        rows.append((number, row))
    return rows
