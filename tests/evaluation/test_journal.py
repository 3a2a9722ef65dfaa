"""The journal of a verification: what it takes back, what it refuses, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kascade_cli.app import main
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.evaluation import forced, runs
from kascade_cli.evaluation.forced import PromptKL
from kascade_cli.evaluation.journal import Journal, journal_path
from kascade_cli.schema import Profile
from tests.integrations.transformers.naive import some_profile

CONTEXT = {"model": "v2-sha256:" + "0" * 64, "dtype": "torch.float32"}
RESULT = PromptKL({"prefill": 0.25, "decode": float("inf")}, 4, 3, 2)


def opened(path, context=CONTEXT):
    lines = []
    return Journal(path, context, lines.append), lines


def test_what_is_written_is_read_back(tmp_path):
    path = journal_path(tmp_path / "p.yaml")
    assert path.name == "p.yaml.verify.jsonl"
    journal, lines = opened(path)
    assert (len(journal), lines) == (0, [])
    journal.add("layout", "prompt", RESULT)
    journal.add("layout", "other", PromptKL({"decode": 0.0}))
    again, lines = opened(path)
    assert lines == [f"{path}: going on after 2 runs"]
    assert again.get("layout", "prompt") == RESULT
    assert again.get("layout", "other") == PromptKL({"decode": 0.0})
    assert again.get("other", "prompt") is None
    again.remove()
    assert not path.exists()
    again.remove()


def test_a_line_cut_short_is_measured_again_and_spoils_nothing(tmp_path):
    path = tmp_path / "j"
    journal, _ = opened(path)
    for name in "abc":
        journal.add("layout", name, RESULT)
    data = path.read_bytes()
    for size in range(data.index(b"\n") + 1, len(data)):
        path.write_bytes(data[:size])
        again, _ = opened(path)
        whole = data[:size].count(b"\n") - 1 + (data[size : size + 1] == b"\n")
        assert len(again) == whole
        again.add("layout", "z", RESULT)
        final, lines = opened(path)
        assert len(final) == whole + 1
        assert final.get("layout", "z") == RESULT
        assert lines == [f"{path}: going on after {whole + 1} runs"]


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "null", '{"layout": "a"}', "\x00\x01", "[" * 5000,
        json.dumps({"layout": "a", "prompt": "b", "kl": {}, "asked": 1, "given": 1, "kept": 1}),
        json.dumps({"layout": "a", "prompt": "b", "kl": {"decode": -1.0}, "asked": 1, "given": 1, "kept": 1}),
        json.dumps({"layout": "a", "prompt": "b", "kl": {"decode": float("nan")}, "asked": 1, "given": 1, "kept": 1}),
        json.dumps({"layout": "a", "prompt": "b", "kl": {"other": 1.0}, "asked": 1, "given": 1, "kept": 1}),
        json.dumps({"layout": "a", "prompt": "b", "kl": {"decode": 1.0}, "asked": 1, "given": 1, "kept": 2}),
        json.dumps({"layout": "a", "prompt": "b", "kl": {"decode": 1.0}, "asked": 1, "given": True, "kept": 1}),
        json.dumps({"layout": [], "prompt": "b", "kl": {"decode": 1.0}, "asked": 1, "given": 1, "kept": 1}),
    ],
)  # fmt: skip
def test_damaged_lines_are_ignored_with_a_line(tmp_path, line):
    path = tmp_path / "j"
    journal, _ = opened(path)
    journal.add("layout", "prompt", RESULT)
    path.write_text(path.read_text() + line + "\n")
    again, lines = opened(path)
    assert lines == [f"{path}: 1 unreadable lines are measured again", f"{path}: going on after 1 runs"]
    assert again.get("layout", "prompt") == RESULT


def test_a_journal_of_other_runs_is_begun_anew_with_a_line(tmp_path):
    path = tmp_path / "j"
    journal, _ = opened(path)
    journal.add("layout", "prompt", RESULT)
    again, lines = opened(path, CONTEXT | {"dtype": "torch.bfloat16"})
    assert lines == [f"{path}: of another model, dtype or backend; measuring anew"]
    assert again.get("layout", "prompt") is None


def test_a_file_that_is_none_is_left_alone(tmp_path):
    path = tmp_path / "j"
    for text in ("mine\n", "", '{"kind": "notes"}\n'):
        path.write_text(text)
        with pytest.raises(UsageError, match="is no journal"):
            opened(path)
        assert path.read_text() == text
    path.unlink()
    path.mkdir()
    with pytest.raises(KascadeError, match="directory"):
        opened(path)


def test_results_are_those_of_one_budget_head_map_and_prompt(small):
    from kascade_cli.models import describe

    profile = some_profile(describe(small[0], "demo-small"), anchors=[0, 2], ratio=0.1, min_keys=16)
    key = runs.layout_key(profile)
    assert runs.layout_key(profile.model_copy(update={"selection": {"x": 1}, "provenance": {"y": 2}})) == key
    assert runs.layout_key(profile.model_copy(update={"budget": profile.budget.override(ratio=0.11)})) != key
    other = some_profile(describe(small[0], "demo-small"), anchors=[0, 3], ratio=0.1, min_keys=16)
    assert runs.layout_key(other) != key


@pytest.fixture(scope="module")
def small():
    from kascade_cli.models import load_model

    return load_model("demo-small", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def capture(small, tmp_path_factory):
    from kascade_cli.capture.run import CaptureOptions, plan_capture, run_capture
    from kascade_cli.devset import load_devset
    from kascade_cli.models import describe

    path = tmp_path_factory.mktemp("real") / "capture.h5"
    options = CaptureOptions(num_prompts=2, max_length=256, tiles_per_prompt=6)
    devset = load_devset("pairs", small[1], num_prompts=2, max_length=256, seed=0)
    info = describe(small[0], "demo-small")
    run_capture(small[0], info, devset, path, options, plan=plan_capture(info, devset, options))
    return path


def test_a_killed_verification_goes_on_where_it_was(capture, tmp_path, monkeypatch, capsys):
    def arguments(output):
        return ["select-anchors", str(capture), "-o", str(output), "--anchors", "3", "--verify-prompts", "2",
                "--min-keys", "16", "--device", "cpu", "--bootstrap", "0"]  # fmt: skip

    killed, whole = tmp_path / "killed.yaml", tmp_path / "whole.yaml"
    journal = journal_path(killed)
    process = subprocess.Popen(
        [sys.executable, "-m", "kascade_cli", *arguments(killed)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if journal.exists() and journal.read_bytes().count(b"\n") > 3:
                break
            time.sleep(0.02)
        assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not killed.exists()
    known = journal.read_bytes().count(b"\n") - 1
    assert known >= 3

    calls, real = [], forced.DensePrompt.compare
    monkeypatch.setattr(forced.DensePrompt, "compare", lambda *a, **o: calls.append(1) or real(*a, **o))
    counts = []
    for output in (killed, whole):
        calls.clear()
        with pytest.raises(SystemExit) as stop:
            main(arguments(output))
        assert not stop.value.code
        counts.append(len(calls))
        error = capsys.readouterr().err
        assert (f"going on after {known} runs" in error) == (output == killed)
        assert not journal_path(output).exists()
    assert counts[0] == counts[1] - known
    assert Profile.load(killed).selection == Profile.load(whole).selection
