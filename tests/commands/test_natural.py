"""Calibration and evaluation with nothing but defaults, by the command line, on a random model of a real kind."""

import json

import numpy as np
import pytest
import torch

from kascade_cli.capture.store import open_capture
from kascade_cli.models import load_model
from kascade_cli.schema import Profile
from kascade_cli.tasks.natural import open_corpus
from tests.capture.conftest import make_model
from tests.toy_tokenizers import TEMPLATE, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that takes 1,200 tokens, with a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    texts = open_corpus().take(np.random.default_rng(0), "prose", "dev", 30_000)
    tokenizer = trained(texts, TEMPLATE)
    make_model("Llama", vocab_size=1200, max_position_embeddings=1200).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_defaults_calibrate_on_the_mix_and_measure(run_kascade, folder, tmp_path):
    capture, profile = tmp_path / "c.h5", tmp_path / "p.yaml"
    few = ["--num-prompts", 2, "--tiles-per-prompt", 6, "--device", "cpu"]
    code, _, error = run_kascade("profile", folder, "-o", capture, *few)
    assert code == 0, error
    assert "prompts of up to 1.17k tokens, what this machine can afford" in error or "up to 1200 tokens" in error
    with open_capture(capture) as file:
        assert (file.meta["dev_set_name"], file.meta["max_length"]) == ("mix", 1200)
        assert len(file) == 2
    code, _, error = run_kascade("profile", folder, "-o", capture, *few, "--resume")  # the dev set is the capture's
    assert code == 0, error
    code, text, error = run_kascade(
        "select-anchors",
        capture,
        "-o",
        profile,
        "--anchors",
        2,
        "--verify-prompts",
        1,
        "--bootstrap",
        0,
        "--min-keys",
        8,
    )
    assert code == 0, error
    verified = Profile.load(profile).selection["verify"]
    assert (verified["dev_set"], verified["positions"]) == ("mix/held-out", "answers")
    assert "dense answers 0 of" in text + error


def test_a_task_that_dense_cannot_answer_is_said_and_nothing_else_is_run(run_kascade, folder):
    code, out, error = run_kascade(
        "evaluate", folder, "--task", "niah_multikey_1", "--max-length", 1100, "--num-prompts", 1, "--device", "cpu",
        "--strategies", "dense,oracle", "--max-new-tokens", 2,
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert error.splitlines()[-1] == "error: dense answers 0 of 4: choose another task or model"


def test_one_of_two_tasks_that_dense_cannot_answer_is_told(run_kascade, folder, tmp_path):
    """The rows of a file whose answer is what the dense model writes are right, others are not."""
    model, tokenizer = load_model(str(folder), device="cpu")
    prompt = "one two three four " * 20
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    whole = torch.ones_like(ids)  # or generate takes the first token, whose id is 0, for padding
    out = model.generate(ids, attention_mask=whole, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    said = tokenizer.decode(out, skip_special_tokens=True).strip()
    assert said
    for name, answers in (("right", [said]), ("half", [said, "no such word"]), ("wrong", ["no such word"])):
        row = {"prompt": prompt, "answers": answers, "max_new_tokens": 6}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    files = [tmp_path / f"{name}.jsonl" for name in ("right", "half", "wrong")]
    code, out, error = run_kascade(
        "evaluate", folder, "--chat", "--strategies", "dense", "--device", "cpu", "--json",
        *(word for file in files for word in ("--task", file)),
    )  # fmt: skip
    assert code == 0, error
    (row,) = json.loads(out)["rows"]
    assert {name: entry["score"] for name, entry in row["scores"].items()} == {"right": 100, "half": 50, "wrong": 0}
    assert "wrong: dense answers 0 of 1, so its column says nothing" in error


DENSE = ["--strategies", "dense", "--device", "cpu"]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["profile", "--haystack", "nowhere"], 2, "--haystack nowhere: no such file or folder"),
        (["evaluate", "--haystack", "nowhere", *DENSE], 2, "--haystack nowhere: no such file or folder"),
        (["evaluate", "--task", "niah", *DENSE], 2, "no task is called 'niah'; use mix, niah_"),
        (["evaluate", "--task", "vt", "--chat", *DENSE], 2, "--chat is for prompts of a file"),
        (["evaluate", "--task", "vt", "--max-length", "9k", *DENSE], 1, "lower --max-length"),
        (["evaluate", "--task", "vt", "--max-length", "90", *DENSE], 1, "cannot hold the task"),
    ],
)
def test_mistakes_are_one_line(run_kascade, folder, tmp_path, monkeypatch, options, code, problem):
    monkeypatch.chdir(tmp_path)
    got, out, error = run_kascade(options[0], folder, *options[1:])
    assert (got, out) == (code, "")
    assert problem in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())
