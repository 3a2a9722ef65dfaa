"""Rows of a .jsonl task: what they may carry, and what is wrong with one, by its line."""

import json

import pytest

from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.cases import Asking, file_cases, score_question
from kascade_cli.evaluation.rows import Row, read_rows
from kascade_cli.models import load_model


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_rows(tmp_path):
    rows = [
        {"prompt": "a", "answer": "v1 v2"},
        {"prompt": "b", "answers": ["v1", "v2"]},
        {"prompt": "c", "answers": ["v1", "v2"], "score": "any", "max_new_tokens": 7},
        {"prompt": "d", "answer": "v3", "score": "all"},
    ]
    assert read_rows(write(tmp_path / "t.jsonl", *rows)) == [
        Row(1, "a", ("v1 v2",), "exact", None),
        Row(2, "b", ("v1", "v2"), "all", None),
        Row(3, "c", ("v1", "v2"), "any", 7),
        Row(4, "d", ("v3",), "all", None),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "answer": "b", "answers": ["c"]}, 'give "answer" or "answers", not both'),
        ({"prompt": "a", "answers": []}, 'needs a non-empty text "answer", or a list'),
        ({"prompt": "a", "answers": ["b", 1]}, 'needs a non-empty text "answer", or a list'),
        ({"prompt": "a", "answers": "b"}, 'needs a non-empty text "answer", or a list'),
        ({"prompt": "a", "answer": "b", "score": "half"}, '"score" is one of exact, all, any'),
        ({"prompt": "a", "answers": ["b", "c"], "score": "exact"}, "takes one answer"),
        ({"prompt": "a", "answer": "b", "max_new_tokens": 0}, '"max_new_tokens" is a number of tokens'),
        ({"prompt": "a", "answer": "b", "max_new_tokens": True}, '"max_new_tokens" is a number of tokens'),
        (["a"], 'needs a non-empty text "prompt"'),
    ],
)
def test_rows_that_cannot_be(tmp_path, row, problem):
    with pytest.raises(KascadeError) as caught:
        read_rows(write(tmp_path / "t.jsonl", {"prompt": "a", "answer": "b"}, row))
    assert str(caught.value).startswith(f"{tmp_path / 't.jsonl'}, line 2: ")
    assert problem in str(caught.value)


def test_room_for_an_answer_and_its_score(tmp_path):
    """Exactly as many tokens as must match; twice that and a sentence where the answer is looked for."""
    _, tokenizer = load_model("demo-small", device="cpu")
    rows = [
        {"prompt": "? k1", "answer": "v2 v3"},
        {"prompt": "? k1", "answers": ["v2", "v3"]},
        {"prompt": "? k1", "answers": ["v2", "v3"], "max_new_tokens": 5},
    ]
    path = write(tmp_path / "t.jsonl", *rows)
    cases, _ = file_cases(path, tokenizer, max_length=None, room=None, asking=Asking())
    asked = [case.questions[0] for case in cases]
    assert asked[0].new_tokens == 2
    assert asked[1].new_tokens > 32
    assert asked[2].new_tokens == 5
    written = tokenizer("v3 v9", add_special_tokens=False)["input_ids"]
    assert [score_question(tokenizer, written, question) for question in asked] == [0, 0.5, 0.5]
    cases, _ = file_cases(path, tokenizer, max_length=None, room=None, asking=Asking(new_tokens=9))
    assert {case.questions[0].new_tokens for case in cases} == {9}
