"""The rows of a user's .jsonl task: a prompt, what its answer shall be, how it is scored."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kascade_cli.errors import KascadeError
from kascade_cli.tasks.scoring import SCORES

_MOST_TOKENS = 65536


@dataclass(frozen=True)
class Row:
    """One line of the file. new_tokens: room for the answer, None where the row does not say."""

    line: int
    prompt: str
    answers: tuple[str, ...]
    score: str
    new_tokens: int | None


def read_rows(path: Path) -> list[Row]:
    """Rows with `prompt` and `answer` (a text) or `answers` (several); optional `score` (exact, all, any) and
    `max_new_tokens`. One `answer` must match exactly unless `score` says otherwise; of several all are looked for.

    Raises KascadeError naming the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise KascadeError(f"cannot read {path}: {reason}") from error
    return [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _row(path: Path, number: int, line: str) -> Row:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "too deep, or too long a number")
        raise KascadeError(f"{place}: not JSON ({reason})") from error
    row = row if isinstance(row, dict) else {}
    if not _is_text(row.get("prompt")):
        raise KascadeError(f'{place}: needs a non-empty text "prompt"')
    if "answer" in row and "answers" in row:
        raise KascadeError(f'{place}: give "answer" or "answers", not both')
    answers = row["answers"] if "answers" in row else [row.get("answer")]
    if not (isinstance(answers, list) and answers and all(map(_is_text, answers))):
        raise KascadeError(f'{place}: needs a non-empty text "answer", or a list of them in "answers"')
    score = row.get("score", "all" if "answers" in row else "exact")
    if score not in SCORES:
        raise KascadeError(f'{place}: "score" is one of {", ".join(SCORES)}')
    if score == "exact" and len(answers) > 1:
        raise KascadeError(f'{place}: "score": "exact" takes one answer; use all or any')
    new = row.get("max_new_tokens")
    if new is not None and not (isinstance(new, int) and not isinstance(new, bool) and 1 <= new <= _MOST_TOKENS):
        raise KascadeError(f'{place}: "max_new_tokens" is a number of tokens, 1 to {_MOST_TOKENS}')
    return Row(number, row["prompt"], tuple(answers), score, new)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
