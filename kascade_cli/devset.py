"""Dev sets: token-id prompts from a built-in task, a hub dataset, .jsonl, .parquet or a folder of .txt files.

The choice of prompts depends on the source and the seed alone, and prompt i not on how many are asked for.
Every dev set has a held-out twin (`held_out=True`) that shares no prompt with it: built-in tasks draw from
another seed split; of documents, every fourth usable one belongs to the twin.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kascade_cli.documents import Document, open_documents, source_kind
from kascade_cli.errors import KascadeError, UsageError, require_extra
from kascade_cli.tasks import natural
from kascade_cli.tasks.chat import encode_turns
from kascade_cli.tasks.encoding import EncodedPrompt, check_words, encode_prompt, encode_text, knows_words, predicting
from kascade_cli.tasks.haystack import LAYOUTS
from kascade_cli.tasks.questions import TASKS, make_prompt, member_tasks, prompt_rng

# The similarity of two layers compares their top 64 keys: a shorter prompt leaves nothing to choose.
MIN_TOKENS = 64
HELD_OUT_EVERY = 4
MAX_TOKENS = 16 << 20  # of a prompt: beyond any model
_MAX_TASK_TOKENS = 256 << 20  # of all prompts of a built-in task, which are built as long as asked for


@dataclass(frozen=True)
class DevSet:
    """Token ids of `prompts`, at most `max_length` each.

    sha256: of all token ids in order. answers: per prompt, the half-open token spans of its answers, and questions:
    those of its questions with their answers (tasks; empty lists otherwise). too_short, duplicates: documents passed
    over for that reason.
    """

    name: str
    sha256: str
    prompts: list[list[int]]
    seed: int
    max_length: int
    answers: list[list[tuple[int, int]]] = field(default_factory=list)
    questions: list[list[tuple[int, int]]] = field(default_factory=list)
    too_short: int = 0
    duplicates: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def answer_positions(self) -> list[list[int]]:
        """Per prompt, the token positions whose logits predict answer tokens, ascending."""
        return [predicting(spans) for spans in self.answers]

    def take(self, indices: Sequence[int]) -> DevSet:
        """These of its prompts, as a dev set of that name."""
        prompts, answers, questions = (
            [column[index] for index in indices] for column in (self.prompts, self.answers, self.questions)
        )
        return replace(self, sha256=ids_sha256(*prompts), prompts=prompts, answers=answers, questions=questions)

    def notes(self) -> list[str]:
        """What a user should know about the choice, one line each."""
        lines = []
        if self.too_short:
            shortest = min(MIN_TOKENS, self.max_length)
            lines.append(f"{self.too_short} documents shorter than {shortest} tokens dropped")
        if self.duplicates:
            lines.append(f"{self.duplicates} duplicates dropped")
        return lines


def ids_sha256(*prompts: Sequence[int]) -> str:
    """sha256 (hex) over prompts of token ids: each as little-endian int32, its length in front."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(np.asarray([len(ids), *ids], "<i4").tobytes())
    return digest.hexdigest()


def check_source(source: str, text_field: str | None = None, chat_template: bool | None = None) -> None:
    """Refuses what needs no look into the dev set: what is none, and options that mean nothing to it.

    Raises KascadeError or UsageError, as `load_devset` does after its model.
    """
    kind = source_kind(source)
    if kind == "hub":
        require_extra("datasets", "hub")
    elif kind == "parquet":
        require_extra("pyarrow", "parquet")
    what = f"the built-in task '{source}'" if kind == "task" else source
    if text_field is not None and kind in ("task", "folder"):
        raise UsageError(f"{what} is plain text without fields: leave --text-field out")
    if chat_template and kind == "task" and not natural.natural_names(source):
        raise UsageError(f"{what} is plain text: leave --chat-template out")


def default_devset(tokenizer: Any) -> str:
    """`hops` for a tokenizer whose tokens are the words of the demo tasks, `mix` for all others."""
    return "hops" if knows_words(tokenizer) else natural.MIX


def load_devset(
    source: str,
    tokenizer: Any,
    *,
    num_prompts: int,
    max_length: int,
    seed: int,
    text_field: str | None = None,
    chat_template: bool | None = None,
    held_out: bool = False,
    positions: int | None = None,
    haystack: str | None = None,
    lengths: Sequence[int] | None = None,
) -> DevSet:
    """Chooses and encodes `num_prompts` prompts of at most `max_length` tokens (fewer if there are no more).

    source: a built-in task (`mix`, `niah_multikey_1`, `hops` ...), a .jsonl or .parquet file, a folder of .txt
    files, or a dataset id `org/name[:config]:split`. text_field: which field of a record (default: the first
    known one). chat_template: True wraps plain text into one user turn; False joins the messages of a chat;
    None uses the template for chats and for tasks in natural language. positions: how many tokens the model takes; a
    built-in task, whose prompts are as long as asked for, is refused beyond that before it is built. haystack: file
    or folder of texts for tasks in natural language (None: what every Python brings). lengths: of their prompts, in
    turn (None: all have max_length). Raises KascadeError or UsageError with one line for anything unusable.
    """
    if num_prompts < 1:
        raise UsageError(f"a dev set needs at least one prompt, got {num_prompts}")
    if max_length < 1:
        raise UsageError(f"the maximum length must be positive, got {max_length}")
    if max_length > MAX_TOKENS:
        raise UsageError(f"a maximum length of {max_length} tokens is beyond any model: take at most {MAX_TOKENS}")
    built_in = source_kind(source) == "task"
    if haystack is not None and not natural.natural_names(source):
        raise UsageError(f"--haystack is for tasks in natural language, such as {natural.MIX}: {source} has none")
    if built_in:
        if positions is not None and max_length > positions:
            raise UsageError(f"the model takes {positions} tokens, not {max_length}: pass --max-length {positions}")
        if num_prompts * max_length > _MAX_TASK_TOKENS:
            most = _MAX_TASK_TOKENS // max_length
            raise UsageError(
                f"{num_prompts} prompts of {max_length} tokens do not fit in memory: take at most {most} of them"
            )
    if natural.natural_names(source):
        return _natural_devset(
            source, tokenizer, num_prompts, max_length, seed, chat_template, haystack, held_out, lengths
        )
    if built_in:
        if chat_template:
            raise UsageError(f"the built-in task {source!r} is plain text: leave the chat template off")
        return _task_devset(source, tokenizer, num_prompts, max_length, seed, held_out)
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UsageError("this tokenizer has no chat template: leave the chat template off")
    return _document_devset(source, tokenizer, num_prompts, max_length, seed, text_field, chat_template, held_out)


def _task_devset(source: str, tokenizer: Any, num_prompts: int, max_length: int, seed: int, held_out: bool) -> DevSet:
    """Haystacks followed by questions with their answers, about one eighth of the tokens."""
    check_words(tokenizer)
    split = "held-out" if held_out else "dev"

    def encode(limit: int) -> list[EncodedPrompt] | None:
        found = (_task_prompt(source, tokenizer, limit, (seed, split, index)) for index in range(num_prompts))
        prompts = list(itertools.takewhile(lambda prompt: prompt is not None, found))
        return prompts if len(prompts) == num_prompts else None

    encoded = encode(max_length)
    if encoded is None:
        least = next(limit for limit in itertools.count(max_length + 1) if encode(limit) is not None)
        raise KascadeError(f"{max_length} tokens cannot hold the task {source!r}: take at least {least}")
    prompts = [prompt.ids for prompt in encoded]
    name = f"{source}/held-out" if held_out else source
    spans = [prompt.answers for prompt in encoded], [prompt.questions for prompt in encoded]
    return DevSet(name, ids_sha256(*prompts), prompts, seed, max_length, *spans)


def _natural_devset(
    source: str,
    tokenizer: Any,
    num_prompts: int,
    max_length: int,
    seed: int,
    chat_template: bool | None,
    haystack: str | None,
    held_out: bool,
    lengths: Sequence[int] | None,
) -> DevSet:
    """Dialogues about long texts, answers written out."""
    chat = natural.use_template(tokenizer, chat_template)
    corpus, split = natural.open_corpus(haystack), "held-out" if held_out else "dev"
    lengths, turn = lengths or [max_length], len(natural.MIXED)
    found = [
        # Shifted by one from turn to turn of the mix, so that each of its tasks comes in every length.
        natural.dialogue(
            source, tokenizer, corpus, natural.Draw(seed, split, index),
            min(max_length, lengths[(index + index // turn) % len(lengths)]), chat,
        )
        for index in range(num_prompts)
    ]  # fmt: skip
    prompts = [prompt.ids for prompt in found]
    name = f"{source}/held-out" if held_out else source
    spans = [prompt.answers for prompt in found], [prompt.questions for prompt in found]
    return DevSet(name, ids_sha256(*prompts), prompts, seed, max_length, *spans)


def _task_prompt(source: str, tokenizer: Any, limit: int, stream: tuple[int, str, int]) -> EncodedPrompt | None:
    """The prompt of a stream (seed, split, index) in at most `limit` tokens, or None if they cannot hold one."""
    each = min(16, max(1, limit // (32 * len(member_tasks(source)))))
    length = limit - TASKS[source].words * each
    shortest = LAYOUTS[TASKS[source].layout].shortest
    # Words of several pieces, or fewer questions than asked for, change the length: shrink until it fits.
    while length >= shortest:
        encoded = encode_prompt(make_prompt(prompt_rng(*stream), length, each, tasks=(source,)), tokenizer)
        if len(encoded.ids) <= limit:
            return encoded
        length = min(length - 1, int(length * limit / len(encoded.ids)))
    return None


def _document_devset(
    source: str,
    tokenizer: Any,
    num_prompts: int,
    max_length: int,
    seed: int,
    text_field: str | None,
    chat_template: bool | None,
    held_out: bool,
) -> DevSet:
    documents = open_documents(source, text_field)
    if not len(documents):
        raise KascadeError(f"{source} holds no documents")
    shortest = min(MIN_TOKENS, max_length)
    seen: set[str] = set()
    prompts: list[list[int]] = []
    too_short = duplicates = usable = 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        ids = _encode(tokenizer, documents[int(index)], chat_template)[:max_length]
        digest = ids_sha256(ids)
        if len(ids) < shortest:
            too_short += 1
        elif digest in seen:
            duplicates += 1
        else:
            seen.add(digest)
            usable += 1
            if (usable % HELD_OUT_EVERY == 0) == held_out:
                prompts.append(ids)
                if len(prompts) == num_prompts:
                    break
    if not prompts:
        reason = f"{too_short} of {len(documents)} documents are shorter than {shortest} tokens"
        if usable:
            reason = f"{usable} usable documents, and only every {HELD_OUT_EVERY}th is held out"
        raise KascadeError(f"no prompts left of {source}: {reason}")
    name = f"{source}/held-out" if held_out else source
    nothing: list[list[tuple[int, int]]] = [[] for _ in prompts]
    return DevSet(name, ids_sha256(*prompts), prompts, seed, max_length, nothing, nothing, too_short, duplicates)


def _encode(tokenizer: Any, document: Document, chat_template: bool | None) -> list[int]:
    """Token ids with the tokenizer's own BOS once at most, whatever the template writes."""
    if chat_template is None:
        chat_template = not isinstance(document, str) and bool(getattr(tokenizer, "chat_template", None))
    if not chat_template:
        text = document if isinstance(document, str) else "\n".join(str(m["content"]) for m in document)
        return encode_text(tokenizer, text)
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    return encode_turns(tokenizer, messages, ask=messages[-1]["role"] == "user")
