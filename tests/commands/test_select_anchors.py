"""`kascade select-anchors` from a capture file to a profile file."""

import hashlib
import json
import sys

import h5py
import numpy as np
import pytest
import yaml

from kascade_cli.analysis import anchors as search
from kascade_cli.analysis.similarity import measure
from kascade_cli.schema import Profile
from tests.toy_captures import toy


def test_profile_holds_what_the_analysis_says(select, tmp_path):
    code, text, _, target = select("--anchors", "3")
    assert code == 0
    profile = Profile.load(target)
    assert profile.dumps() == target.read_text()  # round trip, byte for byte
    measured = measure(tmp_path / "capture.h5", top_k=9)
    sims = {phase: measured.mean(phase) for phase in ("decode", "prefill")}
    both = np.mean([search.layer_similarity(sim) for sim in sims.values()], axis=0)
    best = search.best_sets(search.layer_gains(both, measured.importance), 3)[2]
    assert profile.anchors == list(best.anchors)
    for layer in set(range(6)) - set(best.anchors):
        anchor = max(a for a in best.anchors if a < layer)
        for phase, sim in sims.items():
            assert profile.head_map(layer, phase) == [(anchor, head) for head in search.head_map(sim, anchor, layer)]
    selection, origin = profile.selection, profile.provenance
    assert selection["objective"] == pytest.approx(best.objective, abs=1e-6)
    assert (selection["method"], selection["rule"], len(selection["budgets"])) == ("dp", "anchors", 3)
    assert selection["stability"]["resamples"] == 20
    assert origin["capture_sha256"] == hashlib.sha256((tmp_path / "capture.h5").read_bytes()).hexdigest()
    assert origin["dev_set"]["name"] == "toy-set"
    assert profile.model.fingerprint == "sha256:" + "a" * 64
    assert "because: 3 anchors were asked for" in text


def test_json_is_one_document_and_agrees_with_the_profile(select):
    code, text, _, target = select("--json", "--anchors", "2", "--weights", "uniform", "--phase", "decode")
    document = json.loads(text)
    assert code == 0
    assert document["chosen"]["anchors"] == Profile.load(target).anchors
    assert [len(row["anchors"]) for row in document["budgets"]] == [1, 2, 3]
    assert document["cost"]["context"] == 131072
    assert Profile.load(target).selection["weights"] == "uniform"


def test_the_table_shows_every_budget(select):
    _, text, _, _ = select("--max-anchors", "4")
    for size in range(1, 5):
        assert any(line.replace("*", " ").split()[:1] == [str(size)] for line in text.splitlines())
    assert "recovered" in text
    assert "because:" in text


def test_permuting_prompts_changes_nothing_but_the_files_hash(select, tmp_path):
    documents = []
    for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [4, 2, 0, 3, 1])):
        capture = toy(tmp_path / f"{name}.h5", order=order)
        _, _, _, target = select("--anchors", "3", capture=capture, output=f"{name}.yaml")
        document = yaml.safe_load(target.read_text())
        for key in ("created", "capture", "capture_sha256"):
            del document["provenance"][key]
        documents.append(document)
    assert documents[0] == documents[1]


def test_free_assignment_writes_pairs_and_is_compared_with_the_dp(select):
    code, text, _, target = select("--anchors", "3", "--assignment", "free", "--json")
    assert code == 0
    profile = Profile.load(target)
    raw = yaml.safe_load(target.read_text())["layers"]
    pairs = [
        entry for layer in raw if layer["role"] == "reuse" for phase in layer["heads"].values() for entry in phase
    ]
    assert pairs
    assert all(isinstance(entry, list) and entry[0] in profile.anchors for entry in pairs)
    assert profile.selection["method"] == "milp"
    for row in json.loads(text)["budgets"]:
        assert row["objective"] >= row["objective_nearest"] - 1e-6
        assert "proven_optimal" not in row


def test_hybrid_capture_leaves_other_layers_alone(select, tmp_path):
    capture = toy(tmp_path / "hybrid.h5", layers=4, profiled_layers=[1, 3, 5, 7], total=9)
    code, _, _, target = select("--anchors", "2", capture=capture)
    assert code == 0
    profile = Profile.load(target)
    assert [layer.role for layer in profile.layers][0::2] == ["passthrough"] * 5
    assert profile.layers[1].role == "dense"
    assert profile.anchors[0] == 1


def test_budget_options_reach_the_profile(select):
    _, _, _, target = select("--anchors", "2", "--ratio", "0.05", "--min-keys", "16")
    assert Profile.load(target).budget.model_dump() == {"ratio": 0.05, "min_keys": 16, "tile": 32}


def test_plots(select, tmp_path):
    code, text, _, _ = select("--anchors", "2", "--plots", str(tmp_path / "plots"))
    assert code == 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    assert "similarity.png" in text.replace("\n", "")


def test_target_speedup_uses_the_cost_table(select, tmp_path):
    row = {"phase": "decode", "context": 4096, "dense_ms": 1, "layer0_ms": 1, "anchor_ms": 1, "reuse_ms": 0.01}
    (tmp_path / "cost.json").write_text(json.dumps([row]))
    _, text, _, target = select("--target-speedup", "2.9", "--cost", str(tmp_path / "cost.json"), "--json")
    assert len(Profile.load(target).anchors) == 2  # 6 / 2.04 = 2.94x; three give 1.98x
    assert json.loads(text)["chosen"]["speedup"] == {"decode": 2.941, "prefill": None}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--anchors", "0"], 2, "--anchors 0 is outside 1..6"),
        (["--anchors", "7"], 2, "--anchors 7 is outside 1..6"),
        (["--max-anchors", "0"], 2, "--max-anchors 0"),
        (["--anchors", "3", "--max-anchors", "2"], 2, "more than --max-anchors"),
        (["--anchors", "3", "--min-recovered", "0.5"], 2, "two rules"),
        (["--min-recovered", "2"], 2, "outside (0, 1]"),
        (["--min-recovered", "0.99999", "--min-keys", "8"], 3, "recovers 100.0% of the attention; the most is"),
        (["--target-speedup", "50"], 3, "no set reaches 50x"),
        (["--ratio", "0"], 2, "--ratio"),
        (["--min-keys", "0"], 2, "--min-keys"),
        (["--context", "long"], 2, "long"),
        (["--cost", "/nonexistent.json"], 1, "cost table"),
        (["--phase", "both-ish"], 2, "both-ish"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(select, options, code, message):
    found, text, error, target = select(*options)
    assert found == code
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert text == ""
    assert not list(target.parent.glob("*profile.yaml*"))


def test_an_existing_profile_is_kept_unless_told(select):
    _, _, _, target = select("--anchors", "2")
    before = target.read_text()
    code, _, error, _ = select("--anchors", "3")
    assert code == 2
    assert "--overwrite" in error
    assert target.read_text() == before
    assert select("--anchors", "3", "--overwrite")[0] == 0
    assert len(Profile.load(target).anchors) == 3


def test_missing_foreign_and_truncated_captures(select, tmp_path):
    missing = tmp_path / "missing.h5"
    text = tmp_path / "text.h5"
    text.write_text("not hdf5")
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["x"] = 1
    short = tmp_path / "short.h5"
    short.write_bytes(toy(tmp_path / "whole.h5").read_bytes()[:20_000])
    for path in (missing, text, foreign, short):
        code, out, error, target = select(capture=path)
        assert code == 1, path
        assert error.count("error: ") == 1
        assert str(path) in error
        assert out == ""
        assert not target.exists()


def test_an_unfinished_capture_is_used_and_said_to_be(select, tmp_path):
    capture = toy(tmp_path / "part.h5", incomplete=[2])
    code, _, error, target = select("--anchors", "2", capture=capture)
    assert code == 0
    assert "4 of 5 prompts" in error
    assert Profile.load(target).provenance["prompts"] == 4


def test_nan_in_the_capture(select, tmp_path):
    capture = toy(tmp_path / "nan.h5")
    with h5py.File(capture, "r+") as file:
        file["prompts/000003/mass"][1, 2, 0, 5] = np.nan
    code, _, error, target = select(capture=capture)
    assert code == 1
    assert "NaN" in error
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--verify", "--backend", "nope"], "backend 'nope' is not known"),
        (["--verify", "--dtype", "nope"], "dtype 'nope' is not known"),
        (["--verify", "--device", "nope"], "device 'nope' is not available"),
        (["--no-verify", "--model", "demo"], "--model is for verification"),
        (["--no-verify", "--verify-dev-set", "hops"], "--verify-dev-set is for verification"),
        (["--no-verify", "--verify-length", "1k"], "--verify-length is for verification"),
        (["--no-verify", "--revision", "main"], "--revision is for verification"),
        (["--no-verify", "--verify-prompts", "4"], "--verify-prompts is for verification"),
        (["--no-verify", "--candidates", "2"], "--candidates is for verification"),
        (["--no-verify", "--kl-tolerance", "0.5"], "--kl-tolerance is for verification"),
        (["--no-verify", "--lost-tolerance", "0.5"], "--lost-tolerance is for verification"),
        (["--no-verify", "--dtype", "float32"], "--dtype is for verification"),
        (["--no-verify", "--device", "cpu"], "--device is for verification"),
        (["--no-verify", "--backend", "torch"], "--backend is for verification"),
        (["--plots", __file__], "is a file; name a folder"),
        (["--plots", "/proc/plots"], "cannot write into the folder /"),
    ],
)
def test_options_are_refused_before_the_capture_is_read(run_kascade, tmp_path, options, problem):
    code, out, error = run_kascade("select-anchors", "nowhere.h5", "-o", tmp_path / "p.yaml", *options)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert problem in error


def test_plots_without_matplotlib_are_refused_before_the_capture_is_read(run_kascade, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, error = run_kascade(
        "select-anchors", "nowhere.h5", "-o", tmp_path / "p.yaml", "--plots", tmp_path / "new" / "plots"
    )
    assert (code, out) == (1, "")
    assert error == "error: matplotlib is not installed: pip install 'kascade-cli[plot]'\n"
    assert not list(tmp_path.iterdir())


def test_explicit_layers_from_the_command_line(select, tmp_path):
    capture = toy(tmp_path / "hybrid.h5", layers=4, profiled_layers=[1, 3, 5, 7], total=9)
    code, text, error, target = select("--anchors", "1,5", "--json", capture=capture)
    assert code == 0, error
    profile, document = Profile.load(target), json.loads(text)
    assert profile.anchors == document["chosen"]["anchors"] == [1, 5]
    assert (profile.selection["rule"], profile.selection["method"]) == ("anchors", "given")
    assert document["why"] == "these anchors were asked for"
    # Beside the best sets of every size stands the one asked for.
    assert [1, 5] in [row["anchors"] for row in document["budgets"]]
    code, text, _, _ = select("--anchors", "1,5", "--overwrite", "--assignment", "free", capture=capture)
    assert code == 0
    assert [line.split()[:4] for line in text.splitlines() if line.startswith("*")] == [["*", "2", "1", "5"]]


@pytest.mark.parametrize(
    ("anchors", "line"),
    [
        ("1,3", "the first full-attention layer, 0, is always an anchor: put it first"),
        ("0,9", "layer 9 is not a full-attention layer of the capture; these are: 0-5"),
        ("0,3,2", "in rising order, each once: 0,2,3"),
        ("0,2,2", "in rising order, each once: 0,2"),
        ("0,two", "'0,two' is not a list of whole numbers such as 0,2,8, nor how many there shall be, such as 5"),
        ("five", "'five' is not a list of whole numbers"),
        ("", "'' is not a list of whole numbers"),
        ("1.5", "'1.5' is not a list of whole numbers"),
        ("9" * 5000, "is not a list of whole numbers"),
        ("1" + "0" * 20, "is outside 1..6"),
        ("-1", "--anchors -1 is outside 1..6"),
    ],
)
def test_anchors_that_cannot_be_are_one_line(select, anchors, line):
    code, out, error, target = select(f"--anchors={anchors}")
    assert (code, out) == (2, "")
    assert len(error.splitlines()) == 1
    assert error.startswith("error: --anchors")
    assert line in error
    assert len(error) < 300
    assert not target.exists()


HOSTILE = "a[/b]:smile:[red]\x1b[31mR\x1b]0;t\x07"


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_names_from_the_capture_and_the_cost_file_are_text(select, tmp_path, json_option, run_kascade):
    capture = toy(
        tmp_path / "capture.h5", dev_set_name=HOSTILE + ".jsonl", model_name=HOSTILE, tool_version=HOSTILE,
        versions=json.dumps({HOSTILE: HOSTILE}), device=HOSTILE,
    )  # fmt: skip
    row = {"phase": "decode", "context": 4096, "dense_ms": 1, "layer0_ms": 1, "anchor_ms": 1, "reuse_ms": 0.01}
    cost = tmp_path / "[b][x].json"
    cost.write_text(json.dumps({"gpu": "[/x]" + HOSTILE, "rows": [row]}))
    code, out, error, target = select("--anchors", "2", "--cost", str(cost), *json_option, capture=capture)
    assert code == 0, error
    assert "\x1b" not in out + error
    assert "[b][x].json ([/x]a[/b]:smile:[red]R)" in " ".join(out.split())
    for path in (target, capture):
        code, out, error = run_kascade("show", path, *json_option)
        assert code == 0, error
        assert "\x1b" not in out + error
        assert "a[/b]:smile:[red]R" in out or json_option
    code, out, error = run_kascade("export", target)
    assert code == 0, error
    assert "\x1b" not in out + error


def test_nothing_is_written_if_the_result_cannot_be_shown(select, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ValueError("no table")

    monkeypatch.setattr("kascade_cli.commands.selection_report.budget_table", fail)
    code, _, error, target = select("--anchors", "2")
    assert code == 1
    assert "no table" in error
    assert not target.exists()


def test_a_profile_records_names_that_mean_something_elsewhere(select, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, dev_set, shown in (
        (tmp_path / "models" / "mine", tmp_path / "sets" / "dev.jsonl", ("models/mine", "sets/dev.jsonl")),
        ("/srv/elsewhere/mine", "/srv/sets/dev.jsonl", ("mine", "dev.jsonl")),
        ("org/model", "org/set:train", ("org/model", "org/set:train")),
        ("../mine", "texts", ("../mine", "texts")),
    ):
        capture = toy(tmp_path / "capture.h5", model_name=str(model), dev_set_name=str(dev_set))
        code, _, error, target = select("--anchors", "2", "--overwrite", capture=capture)
        assert code == 0, error
        profile = Profile.load(target)
        assert (profile.model.name, profile.provenance["dev_set"]["name"]) == shown
        assert str(tmp_path) not in target.read_text()
        assert "/srv" not in target.read_text()


def test_a_profile_that_could_not_be_read_back_is_not_written(select, tmp_path):
    """A tile of 0, or a model that no profile can describe, in the capture's attributes."""
    for name, changes in (("tile", {"tile": 0}), ("heads", {"query_heads": 3}), ("print", {"model_fingerprint": "x"})):
        capture = toy(tmp_path / f"{name}.h5", **changes)
        code, out, error, target = select("--anchors", "2", capture=capture)
        assert (code, out) == (1, "")
        assert len(error.splitlines()) == 1
        assert not target.exists()


def test_old_figures_are_kept_unless_told(select, tmp_path):
    (tmp_path / "plots").mkdir()
    mine = tmp_path / "plots" / "pareto.png"
    mine.write_text("mine")
    code, _, error, target = select("--anchors", "2", "--plots", str(tmp_path / "plots"))
    assert code == 2
    assert "pareto.png exists; pass --overwrite" in error
    assert mine.read_text() == "mine"
    assert not target.exists()
    assert select("--anchors", "2", "--plots", str(tmp_path / "plots"), "--overwrite")[0] == 0
    assert mine.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--kl-tolerance", "nan"], "--kl-tolerance"),
        (["--kl-tolerance", "inf"], "--kl-tolerance inf must be a number"),
        (["--context", "999m"], "--context: 999m is too much: the most is 16m"),
        (["--verify-length", "999m", "--verify"], "--verify-length: 999m is too much"),
        (["--bootstrap", "1" + "0" * 20], "--bootstrap"),
        (["--top-k", "1" + "0" * 20], "--top-k"),
        (["--candidates", "1" + "0" * 20], "--candidates"),
        (["--min-keys", "1" + "0" * 20], "--min-keys"),
        (["--workers", "1" + "0" * 20], "--workers"),
        (["--ratio", "nan"], "--ratio nan is outside (0, 1]"),
        (["--verify", "--device", "meta"], "device 'meta' holds no data"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_capture_is_read(run_kascade, tmp_path, options, problem):
    code, out, error = run_kascade("select-anchors", "nowhere.h5", "-o", tmp_path / "p.yaml", *options)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert problem in error


@pytest.mark.parametrize("options", [["x\udcff.h5"], ["a.h5", "-o", "x\udcff"], ["a.h5", "--model", "x\udcff"]])
def test_arguments_that_are_no_text_are_refused(run_kascade, options):
    code, out, error = run_kascade("select-anchors", *options)
    assert (code, out) == (2, "")
    assert error.startswith("error: argument 'x?")
    assert error.count("\n") == 1


def test_names_that_no_file_can_have(run_kascade, tmp_path):
    for arguments in (["select-anchors", "x" * 300], ["show", "x" * 300], ["select-anchors", "a.h5", "-o", "x" * 300]):
        code, out, error = run_kascade(*arguments)
        assert (code, out) == (2, "")
        assert "too long for a name" in error
        assert error.count("\n") == 1
