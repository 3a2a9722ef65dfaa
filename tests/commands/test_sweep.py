"""`kascade sweep` as a user meets it: files, tables, JSON, mistakes."""

import json

import pytest

from kascade_cli.report.files import load
from kascade_cli.report.page import page

FAST = ["demo-small", "--device", "cpu", "--dtype", "float32", "--max-length", "128", "--num-prompts", "1"]
FAST += ["--questions", "1", "--kl-prompts", "1", "--min-keys", "8"]


def test_oracle_then_more_of_it(run_kascade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_kascade("sweep", "oracle", *FAST, "--ratio", "0.1")
    assert code == 0
    assert "Figure 2: demo-small, 128 tokens, 1 prompts" in out
    assert "1 of 2: dense: " in err
    assert err.endswith("wrote sweep-oracle.json\n")
    first = json.loads((tmp_path / "sweep-oracle.json").read_text())
    code, out, err = run_kascade("sweep", "oracle", *FAST, "--ratio", "0.1,0.4", "--keys", "8", "--json")
    assert code == 0
    assert "sweep-oracle.json has 2 of 4 rows" in err
    document = json.loads(out)
    assert document == json.loads((tmp_path / "sweep-oracle.json").read_text())
    assert document["rows"][:2] == first["rows"]
    assert [(row.get("ratio"), row.get("keys")) for row in document["rows"]] == [
        (None, None), (0.1, None), (0.4, None), (None, 8),
    ]  # fmt: skip
    assert set(document["tasks"]) == {"two-hop", "single-hop"}
    assert document["rows"][1]["kl"]["prompts"] == 1
    source = load(tmp_path / "sweep-oracle.json")
    assert (source.kind, source.model) == ("sweep", "demo-small")
    assert 'id="oracle"' in page([source], {})
    code, _, err = run_kascade("sweep", "oracle", *FAST, "--ratio", "0.1", "--seed", "1")
    assert code == 2
    assert "was made with questions sha256" in err or "was made with seed 0, now 1" in err


def test_pooling(run_kascade, tmp_path):
    path = tmp_path / "p.json"
    code, out, _ = run_kascade("sweep", "pooling", *FAST, "--tiles", "8,64", "-o", path)
    assert code == 0
    assert "Figure 5" in out
    rows = json.loads(path.read_text())["rows"]
    assert [(row["strategy"], row.get("tile")) for row in rows] == [
        ("dense", None), ("post-softmax", 8), ("post-softmax", 64), ("pre-softmax", 8), ("pre-softmax", 64),
    ]  # fmt: skip
    assert 'id="pooling"' in page([load(path)], {})


def test_remap(run_kascade, profile, tmp_path):
    path = tmp_path / "r.json"
    code, out, _ = run_kascade("sweep", "remap", *FAST, "--profile", profile, "--ratio", "0.1", "-o", path)
    assert code == 0
    assert "Figure 6" in out
    document = json.loads(path.read_text())
    assert [row["strategy"] for row in document["rows"]] == ["dense", "kascade", "kascade-pooled", "kascade-no-remap"]
    assert document["rows"][1]["anchors"] == [0, 1, 2, 7]
    assert 'id="remap"' in page([load(path)], {})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["oracle", "--ratio", ""], "nothing to sweep: give --ratio or --keys"),
        (["oracle", "--keys", "0"], "--keys 0 must be 1 or more"),
        (["oracle", "--ratio", "0.1,0.1"], "oracle, ratio 0.1 is asked for twice"),
        (["oracle", "--ratio", "3"], "ratio 3 is outside"),
        (["oracle", "--task", "none"], "no task is called 'none'"),
        (["pooling", "--tiles", "0"], "--tiles 0 is outside 1..4096"),
        (["remap", "--profile", "PROFILE", "--anchors", "3"], "--capture and --anchors go together"),
        (["remap"], "Missing option '--profile'"),
        (["oracle", "-o", "FILE"], "exists and is no sweep's result"),
    ],
)
def test_mistakes(run_kascade, arguments, reason, profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    named = {"PROFILE": profile, "FILE": tmp_path / "x.json"}
    name, *rest = (named.get(argument, argument) for argument in arguments)
    code, out, err = run_kascade("sweep", name, *FAST, *rest)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert reason in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
