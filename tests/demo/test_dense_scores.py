"""The script behind the model cards, on a handful of questions."""

import json

import torch

from benchmarks import dense_scores as script
from kascade_cli import tasks
from kascade_cli.models import load_model


def test_teacher_forcing_counts_what_greedy_decoding_would_answer():
    model, tokenizer = load_model("demo-small", dtype="float32", device="cpu")
    # Links to links are foreign to this model, so that some answers are wrong.
    prompts = tasks.make_prompts("hops", length=200, count=2, questions_per_task=2, seed=4)
    outcomes = []
    for prompt in prompts:
        encoded = tasks.encode_prompt(prompt, tokenizer)
        right = script.answers_right(model, encoded)
        for question, (start, stop), ok in zip(prompt.questions, encoded.answers, right, strict=True):
            ids = torch.tensor([encoded.ids[:start]])
            generated = model.generate(ids, max_new_tokens=stop - start, do_sample=False)[0, start:]
            assert tasks.exact_match(tokenizer.decode(generated), question.answer) == ok
            outcomes.append(ok)
    assert len(set(outcomes)) == 2


def test_writes_one_row_per_length_and_task(tmp_path, capsys):
    out = tmp_path / "scores.json"
    arguments = ["demo-small", "--lengths", "64,128", "--prompts", "3", "--questions", "2", "-o", str(out)]
    script.main([*arguments, "--device", "cpu"])
    record = json.loads(out.read_text())
    assert [(r["length"], r["task"]) for r in record["rows"]] == [
        (64, "single-hop"),
        (64, "two-hop"),
        (128, "single-hop"),
        (128, "two-hop"),
    ]
    assert all(0 <= r["low"] <= r["exact_match"] <= r["high"] <= 1 for r in record["rows"])
    assert record["command"].startswith("python benchmarks/dense_scores.py demo-small --lengths 64,128")
    assert "exact match" in capsys.readouterr().out
