"""Two dozen damaged files of each kind, as benchmarks/fuzz.py makes thousands; and that the fuzzer can see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz  # noqa: E402


def test_nothing_crashes_hangs_or_lies(tmp_path):
    output = tmp_path / "fuzz.json"
    arguments = ["--captures", "24", "--profiles", "24", "--seed", "11", "--offenders", tmp_path / "offenders"]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "fuzz.py", *arguments, "--output", output],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text())
    for kind in ("capture", "profile"):
        assert found[kind]["cases"] == sum(found[kind]["outcomes"].values()) == 24
        assert found[kind]["outcomes"]["refused"] >= 12
    assert found["capture"]["offenders"] == []
    hard = [row for row in found["profile"]["offenders"] if row["outcome"] in ("crash", "hang", "changed")]
    assert hard == []


@pytest.mark.parametrize(
    ("code", "err", "outcome"),
    [
        ("crash", "", "crash"),
        ("hang", "", "hang"),
        (1, "error: c.h5: damaged\n", "refused"),
        (2, "c.h5: 2 of 3 prompts\nerror: c.h5 exists\n", "refused"),
        (1, "error: TypeError: 'int' object is not iterable\n", "library"),
        (1, "error: h5py.errors.FooError: no\n", "library"),
        (1, "error: one line\nand another\n", "library"),
        (1, "Traceback (most recent call last):\n", "library"),
        (3, "error: missed\n", "library"),
        (0, "", "changed"),
    ],
)
def test_outcomes_are_told_apart(tmp_path, code, err, outcome):
    judged = fuzz.judge(code, '{"a": 1}', err, ["show", "x", "--json"], tmp_path, {"a": 2}, False)
    assert judged == outcome


def test_a_result_that_is_another_is_seen_unless_the_file_is_one_of_its_own(tmp_path):
    def judge(out, crafted=False):
        return fuzz.judge(0, json.dumps(out), "", ["show", "x", "--json"], tmp_path, {"a": 1, "name": "text"}, crafted)

    assert judge({"a": 1, "name": "renamed"}) == "unchanged"
    assert judge({"a": 1.5, "name": "x"}) == "changed"
    assert judge({"a": 1.5, "name": "x"}, crafted=True) == "valid"
    assert judge({"a": 2, "name": "x", "complete": False}) == "told"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "crash"), ("raise SystemExit(1)", 1)],
)
def test_a_process_that_dies_is_a_crash(tmp_path, monkeypatch, code, outcome):
    import kascade_cli.app

    monkeypatch.setattr(kascade_cli.app, "main", lambda arguments: exec(code))
    assert fuzz.run_case([], tmp_path)[0] == outcome


def test_a_process_that_spins_or_waits_is_a_hang(tmp_path, monkeypatch):
    import time

    import kascade_cli.app

    monkeypatch.setattr(fuzz, "_SECONDS", 0.2)
    monkeypatch.setattr(kascade_cli.app, "main", lambda arguments: time.sleep(60))
    monkeypatch.setattr(fuzz.resource, "setrlimit", lambda *_: None)
    assert fuzz.run_case([], tmp_path)[0] == "hang"
