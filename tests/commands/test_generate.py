"""`kascade generate` as a user meets it: streams, figures, comparison, mistakes."""

import io
import json
import subprocess
import sys

import pytest
import torch

from kascade_cli import attach
from kascade_cli.demo import DEMO_MODELS
from kascade_cli.models import describe
from kascade_cli.schema import Budget, Profile
from tests.conftest import tiny_model
from tests.integrations.transformers.naive import some_profile

SMALL = ["generate", "demo-small", "--device", "cpu", "--dtype", "float32"]


def test_text_on_stdout_figures_on_stderr(run_kascade, profile, small):
    prompt = "@ k1 v2 v3 @ k7 v8 v9 ? k7"
    code, out, err = run_kascade(*SMALL, "--profile", profile, "--prompt", prompt, "--max-new-tokens", "5")
    model, tokenizer = small
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with attach(model, Profile.load(profile)):
        alone = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert code == 0
    assert out.split() == tokenizer.decode(alone).split()
    assert f"{ids.shape[1]} prompt tokens, 5 new; first token" in err
    assert "note: kascade read every key: the prompt of 11 tokens is too short" in err


def test_task_says_what_was_expected(run_kascade, profile):
    options = [*SMALL, "--task", "two-hop", "--max-length", "512", "--profile", profile]
    code, out, err = run_kascade(*options)
    assert code == 0
    assert len(out.split()) == 3
    assert f"expected: {out.strip()} (right)" in err
    assert "read every key" not in err
    code, out, err = run_kascade(*options, "--strategy", "streaming-llm", "--ratio", "0.05")
    assert code == 0
    assert "(wrong)" in err


def test_compare_shows_both(run_kascade, profile):
    options = [*SMALL, "--task", "single-hop", "--max-length", "512", "--max-new-tokens", "6", "--profile", profile]
    code, out, err = run_kascade(*options, "--compare", "dense", "--json")
    assert code == 0
    document = json.loads(out)
    dense, sparse = document["runs"]
    assert (dense["strategy"], sparse["strategy"]) == ("dense", "kascade")
    assert dense["report"]["density"] == 1.0
    assert sparse["report"]["density"] < 0.3
    figures = document["comparison"]
    same = [a == b for a, b in zip(dense["tokens"], sparse["tokens"], strict=True)]
    assert figures["token_agreement"] == sum(same) / 6
    assert 0 < figures["kl_mean"] <= figures["kl_max"]
    assert document["prompt_tokens"] == 514
    code, out, err = run_kascade(*options, "--compare", "dense")
    assert code == 0
    for text in (
        "time to first token",
        "tokens/s after it",
        "keys read, prefill",
        "token agreement:",
        "KL(dense || kascade)",
    ):
        assert text in out
    assert f"mean {figures['kl_mean']:.2g}, max {figures['kl_max']:.2g} nats" in out


def test_every_key_read_is_no_difference(run_kascade, profile):
    options = [*SMALL, "--task", "single-hop", "--max-length", "256", "--profile", profile, "--min-keys", "1000"]
    code, out, err = run_kascade(*options, "--compare", "dense", "--json")
    figures = json.loads(out)["comparison"]
    assert code == 0
    assert figures["first_divergence"] is None
    assert figures["kl_max"] < 1e-6
    assert "kascade read every key" in err


def test_prompt_from_file_and_stdin(run_kascade, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text("@ k1 v2 v3 ? k1\n")
    options = [*SMALL, "--strategy", "dense", "--max-new-tokens", "2"]
    _, from_file, _ = run_kascade(*options, "--prompt-file", path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("@ k1 v2 v3 ? k1"))
    _, from_stdin, _ = run_kascade(*options, "--prompt-file", "-")
    _, from_option, _ = run_kascade(*options, "--prompt", "@ k1 v2 v3 ? k1")
    assert from_file == from_stdin == from_option != ""


def test_refresh(run_kascade, profile):
    """Only the strategy that it is for gets it; with 1 the text is kascade's."""
    options = [*SMALL, "--task", "single-hop", "--max-length", "512", "--max-new-tokens", "9", "--profile", profile]
    sparse = ["--compare", "kascade", "--json", "--strategy"]
    for every in (1, 4):
        code, out, _ = run_kascade(*options, *sparse, f"kascade-refresh:refresh={every}")
        assert code == 0
        document = json.loads(out)
        kascade, refresh = (run["report"] for run in document["runs"])
        assert "refresh" not in kascade
        steps = {"refreshes": 8, "between": 0} if every == 1 else {"refreshes": 2, "between": 6}
        assert refresh["refresh"] == {"every": every, **steps}
        assert (document["comparison"]["kl_max"] == 0) == (every == 1)


def test_unknown_words_are_mentioned(run_kascade):
    _, _, err = run_kascade(*SMALL, "--strategy", "dense", "--prompt", "hello k1", "--max-new-tokens", "1")
    assert "note: 1 of 3 prompt tokens are unknown to this tokenizer" in err


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ([], 2, "give the text to continue"),
        (["--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "  "], 2, "the prompt is empty"),
        (["--prompt", "a", "--task", "two-hop"], 2, "--prompt and --task exclude each other"),
        (["--task", "two-hop", "--strategy", "dense", "--chat"], 2, "--chat is for --prompt and --prompt-file"),
        (["--prompt", "a", "--strategy", "dense", "--max-length", "2k"], 2, "--max-length is the length of the text"),
        (["--prompt-file", "nowhere.txt"], 1, "cannot read nowhere.txt: No such file"),
        (["--prompt", "a"], 2, "strategy kascade needs a profile"),
        (["--prompt", "a", "--strategy", "magic"], 2, "strategy 'magic' is not known; use one of dense,"),
        (["--prompt", "a", "--strategy", "dense", "--compare", "kascade"], 2, "needs a profile"),
        (["--prompt", "a", "--profile", "nowhere.yaml"], 1, "cannot read profile nowhere.yaml"),
        (["--prompt", "a", "--strategy", "oracle", "--ratio", "0"], 2, "ratio 0 is outside"),
        (["--prompt", "a", "--strategy", "dense", "--backend", "nope"], 2, "backend 'nope' is not known"),
        (["--prompt", "a", "--strategy", "oracle", "--ratio", "2"], 2, "'--ratio'"),
        (["--prompt", "a", "--strategy", "oracle:refresh=4"], 2, "strategy oracle has no option 'refresh'"),
        (["--prompt", "a", "--strategy", "oracle:ratio=x"], 2, "ratio x is not a number"),
        (["--prompt", "a", "--strategy", "dense", "--chat"], 2, "has no chat template"),
        (["--prompt", "a", "--strategy", "dense", "--backend", "tilelang"], 1, "need a CUDA GPU"),
        (["--task", "nope", "--strategy", "dense"], 2, "no task is called 'nope'"),
        (["--task", "two-hop", "--strategy", "dense", "--max-length", "2x"], 2, "--max-length: '2x' is not a size"),
        (["--task", "two-hop", "--strategy", "dense", "--max-length", "8k"], 1, "has 4096: lower --max-length"),
        (
            ["--prompt", "? k1", "--strategy", "dense", "--max-new-tokens", "4094"],
            1,
            "use --max-new-tokens 4093 or less",
        ),
    ],
)
def test_mistakes_are_one_line(run_kascade, arguments, code, problem):
    got, out, err = run_kascade(*SMALL, *arguments)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert problem in err


def test_a_profile_of_another_model(run_kascade, profile, tmp_path):
    from transformers import AutoTokenizer

    prompt = ["--prompt", "? k1", "--max-new-tokens", "1", "--device", "cpu"]
    code, out, err = run_kascade("generate", "demo", "--profile", profile, *prompt)
    assert (code, out) == (1, "")
    assert "the profile is for demo-small with 8 layers; demo has 16" in err
    model = tiny_model("llama", vocab=512)
    model.save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(str(DEMO_MODELS["demo-small"])).save_pretrained(tmp_path / "tiny")
    other = tiny_model("llama", vocab=512, seed=1)
    some_profile(describe(other, "other")).model_copy(update={"budget": Budget()}).save(tmp_path / "other.yaml")
    tiny = ["generate", tmp_path / "tiny", "--profile", tmp_path / "other.yaml", *prompt]
    code, out, err = run_kascade(*tiny)
    assert (code, out) == (1, "")
    assert "--allow-other-weights" in err
    code, out, err = run_kascade(*tiny, "--allow-other-weights")
    assert code == 0


def test_tokens_stream(profile):
    """The first word is there before the process is done."""
    command = [sys.executable, "-m", "kascade_cli", *SMALL, "--strategy", "dense", "--prompt", "? k1"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    first = process.stdout.read(2)
    running = process.poll() is None
    rest, _ = process.communicate(timeout=60)
    assert running
    assert process.returncode == 0
    assert len((first + rest).split()) == 400
