"""What is asked: contexts with questions, from the built-in tasks' test split or from the user's own .jsonl file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kascade_cli.console import format_size
from kascade_cli.demo import DEMO_TASKS
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation.rows import Row, read_rows
from kascade_cli.models import ModelInfo
from kascade_cli.tasks import TASKS, check_words, get_task, make_prompt, member_tasks, natural, prompt_rng
from kascade_cli.tasks.chat import encode_request
from kascade_cli.tasks.encoding import encode_more, encode_text
from kascade_cli.tasks.scoring import score_answer

DEFAULT_PROMPTS = 16
DEFAULT_QUESTIONS, NATURAL_QUESTIONS = 8, 4  # about one prompt: of each demo task, of a task in natural language


@dataclass(frozen=True)
class EncodedQuestion:
    """`ids` follow the case's context; `answers` are looked for in the `new_tokens` tokens that follow, by `score`."""

    task: str
    ids: list[int]
    answers: tuple[str, ...]
    new_tokens: int
    score: str = "exact"


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
        return len(self.context) + max(len(question.ids) + question.new_tokens for question in self.questions)


class Sources(NamedTuple):
    """What `--task` names: kinds of demo question with their haystack's layout, tasks in natural language, files."""

    kinds: list[str]
    layout: str | None
    natural: list[str]
    files: list[Path]

    @property
    def names(self) -> list[str]:
        """The columns of the table."""
        return [*self.kinds, *self.natural, *(path.stem for path in self.files)]

    @property
    def built_in(self) -> bool:
        """Whether anything is made to a length."""
        return bool(self.kinds or self.natural)


@dataclass(frozen=True)
class Asking:
    """How much is asked. None: the default of the kind of task. chat: files go through the chat template (natural
    tasks always do where there is one). new_tokens: room for an answer, instead of the task's own."""

    num_prompts: int | None = None
    questions: int | None = None
    seed: int = 0
    chat: bool = False
    new_tokens: int | None = None
    haystack: str | None = None
    note: Callable[[str], None] = field(default=lambda text: None)


def score_question(tokenizer: Any, tokens: Sequence[int], question: EncodedQuestion) -> float:
    """0 to 1, for the tokens written."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return score_answer(text, question.answers, question.score)


def split_sources(names: Sequence[str], demo_task: str | None = None) -> Sources:
    """`demo_task` is the mix that a shipped model was trained on: it lends its layout where that has every kind asked
    for. Raises UsageError for a name that is neither a task nor a file, and for tasks that cannot share a haystack.
    """
    files = [Path(name) for name in names if _is_file(name)]
    for name in names:
        if not (name in TASKS or natural.natural_names(name) or _is_file(name)):
            known = ", ".join([natural.MIX, *natural.NATURAL, *TASKS])
            raise UsageError(f"no task is called '{name}'; use {known}, or a .jsonl file")
    built_in = [name for name in names if name in TASKS]
    kinds = list(dict.fromkeys(kind for name in built_in for kind in member_tasks(name)))
    layouts = {get_task(name).layout for name in built_in}
    if demo_task and set(kinds) <= set(member_tasks(demo_task)) and not any(get_task(n).members for n in built_in):
        layouts = {get_task(demo_task).layout}
    if len(layouts) > 1:
        raise UsageError(f"--task {','.join(built_in)} mixes two kinds of haystack; evaluate them one by one")
    others = list(dict.fromkeys(task for name in names for task in natural.natural_names(name)))
    return Sources(kinds, layouts.pop() if kinds else None, others, files)


def named_tasks(task: Sequence[str] | None, model: str) -> tuple[list[str], Sources]:
    """What `--task` names (comma-separated, repeatable), or the default of a model, as given and as sources."""
    demo_task = DEMO_TASKS.get(model)
    names = [part.strip() for entry in task or [demo_task or natural.MIX] for part in entry.split(",")]
    return names, split_sources(names, demo_task)


def _is_file(name: str) -> bool:
    known = name in TASKS or natural.natural_names(name)
    return not known and name.endswith((".jsonl", ".ndjson"))


def natural_cases(names: Sequence[str], tokenizer: Any, length: int, asking: Asking) -> list[Case]:
    """Test prompts of tasks in natural language, `length` tokens long with question and answer.

    One context for all questions about it. Raises KascadeError for a length or a haystack that cannot hold a task.
    """
    chat = natural.use_template(tokenizer, None)
    if not chat:
        asking.note("this tokenizer has no chat template: the tasks are plain text to be continued")
    corpus = natural.open_corpus(asking.haystack)
    cases = []
    for name in names:
        task = natural.NATURAL[name]
        count = asking.questions or NATURAL_QUESTIONS
        for index in range(asking.num_prompts or DEFAULT_PROMPTS):
            draw = natural.Draw(asking.seed, "test", index)
            text, context, added = natural.questions(task, tokenizer, corpus, draw, length, count, chat)
            asked = [
                EncodedQuestion(name, ids, one.answers, asking.new_tokens or task.new_tokens, task.score)
                for one, ids in zip(text.asked, added, strict=True)
            ]
            cases.append(Case(context, asked))
    return cases


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
        ids = encode_more(tokenizer, question.prompt)
        asked.append(EncodedQuestion(question.task, ids, (question.answer,), len(answer)))
    return Case(context, asked)


def file_cases(
    path: Path, tokenizer: Any, *, max_length: int | None, room: int | None, asking: Asking
) -> tuple[list[Case], int]:
    """(cases, rows left out as too long) of a .jsonl file with rows of a prompt and its answers (rows.read_rows).

    A row is a case of its own. `max_length` bounds the prompt's tokens, `room` those of prompt and answer;
    `num_prompts` takes the first so many usable rows. Raises KascadeError naming the line that cannot be used.
    """
    cases: list[Case] = []
    dropped = 0
    for row in read_rows(path):
        if asking.num_prompts is not None and len(cases) == asking.num_prompts:
            break
        ids = encode_request(tokenizer, row.prompt, chat=asking.chat, place=f"{path}, line {row.line}")
        new = asking.new_tokens or row.new_tokens or _answer_tokens(tokenizer, row, asking.chat)
        if (max_length and len(ids) > max_length) or (room and len(ids) + new > room):
            dropped += 1
            continue
        cases.append(Case(ids[:-1], [EncodedQuestion(path.stem, ids[-1:], row.answers, new, row.score)]))
    if not cases:
        # A prompt needs room for an answer too, but its own length is what the user can change.
        limit = min(bound for bound in (max_length, room) if bound) if dropped else None
        reason = f"all {dropped} prompts are longer than {limit} tokens" if dropped else "it has no rows"
        raise KascadeError(f"no prompts left of {path}: {reason}")
    return cases, dropped


def _answer_tokens(tokenizer: Any, row: Row, chat: bool) -> int:
    """Room for an answer: as long as it is where it must match exactly, twice that and a sentence to be found in."""
    text = ", ".join(row.answers) if row.score == "all" else max(row.answers, key=len)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if chat else encode_more(tokenizer, text)
    return len(ids) if row.score == "exact" else 2 * len(ids) + 32


def gather_cases(sources: Sources, tokenizer: Any, info: ModelInfo, length: int | None, asking: Asking) -> list[Case]:
    """The cases of all `sources` at one length; `asking.note` gets one line where a file's rows are left out.

    Raises KascadeError for texts that do not fit into the model's positions.
    """
    cases: list[Case] = []
    if sources.kinds:
        cases += built_in_cases(
            sources.kinds,
            sources.layout,
            tokenizer,
            length=length,
            num_prompts=asking.num_prompts or DEFAULT_PROMPTS,
            questions=asking.questions or DEFAULT_QUESTIONS,
            seed=asking.seed,
        )
    if sources.natural:
        cases += natural_cases(sources.natural, tokenizer, length, asking)
    longest = max((case.positions for case in cases), default=0)
    if info.max_positions and longest > info.max_positions:
        raise KascadeError(
            f"prompts of {format_size(length)} tokens take {longest} positions with question and answer, and "
            f"{info.name} has {info.max_positions}: lower --max-length"
        )
    for path in sources.files:
        found, dropped = file_cases(path, tokenizer, max_length=length, room=info.max_positions, asking=asking)
        if dropped:
            bound = min(bound for bound in (length, info.max_positions) if bound)
            asking.note(f"{path}: {dropped} prompts longer than {format_size(bound)} left out")
        cases += found
    return cases
