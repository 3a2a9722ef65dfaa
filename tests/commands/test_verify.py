"""`kascade select-anchors` where sets are measured on the model."""

import json

import pytest

from kascade_cli.schema import Profile


@pytest.fixture(scope="module")
def real_capture(tmp_path_factory):
    """A real capture of the small demo model: 2 short prompts."""
    from kascade_cli.capture.run import CaptureOptions, plan_capture, run_capture
    from kascade_cli.devset import load_devset
    from kascade_cli.models import describe, load_model

    path = tmp_path_factory.mktemp("real") / "capture.h5"
    model, tokenizer = load_model("demo-small", device="cpu")
    options = CaptureOptions(num_prompts=2, max_length=384, tiles_per_prompt=8)
    devset = load_devset("pairs", tokenizer, num_prompts=2, max_length=384, seed=0)
    info = describe(model, "demo-small")
    run_capture(model, info, devset, path, options, plan=plan_capture(info, devset, options))
    return path


def test_verify_measures_and_decides(run_kascade, real_capture, tmp_path):
    target = tmp_path / "profile.yaml"
    code, text, error = run_kascade(
        "select-anchors", real_capture, "-o", target, "--verify", "--max-anchors", "4", "--verify-prompts", "1",
        "--min-keys", "32", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, error
    document = json.loads(text)
    profile = Profile.load(target)
    found = {tuple(entry["anchors"]): entry for entry in profile.selection["verify"]["candidates"]}
    assert profile.selection["method"] == "verify"
    assert profile.selection["verify"]["dev_set"] == "pairs/held-out"
    assert all(set(entry["kl"]) == {"decode", "prefill"} for entry in found.values())
    best = min(entry["kl_mean"] for entry in found.values())
    chosen = found[tuple(profile.anchors)]
    assert chosen["kl_mean"] <= best + 0.02
    fewer = [entry for key, entry in found.items() if len(key) < len(profile.anchors)]
    assert fewer
    assert all(entry["kl_mean"] > best + 0.02 for entry in fewer)
    assert max(entry["kl_mean"] for entry in fewer) > 1  # layer 0 alone cannot answer
    assert document["verify"]["candidates"] == profile.selection["verify"]["candidates"]
    assert document["why"].startswith("the fewest anchors that keep the answers")


def test_verify_keeps_to_the_number_asked_for(run_kascade, real_capture, tmp_path):
    target = tmp_path / "profile.yaml"
    code, text, error = run_kascade(
        "select-anchors", real_capture, "-o", target, "--verify", "--candidates", "2", "--anchors", "3",
        "--verify-prompts", "1", "--min-keys", "32", "--device", "cpu", "--phase", "decode",
        "--verify-dev-set", "single-hop",
    )  # fmt: skip
    assert code == 0, error
    selection = Profile.load(target).selection
    scores = {tuple(entry["anchors"]): entry["kl_mean"] for entry in selection["verify"]["candidates"]}
    assert {len(anchors) for anchors in scores} == {3}
    assert len(scores) > 1
    assert tuple(selection["anchors"]) == min(scores, key=scores.get)
    assert selection["verify"]["dev_set"] == "single-hop/held-out"
    assert "held-out" in text


def test_verify_refuses_another_model(run_kascade, real_capture, tmp_path):
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "p.yaml", "--verify", "--model", "demo"
    )
    assert code == 1
    assert "weights are not those of demo" in error
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize("model", ["demo-small", "demo"])
def test_verify_refuses_a_revision_of_a_local_model(run_kascade, real_capture, tmp_path, monkeypatch, model):
    monkeypatch.setattr("kascade_cli.analysis.similarity.measure", lambda *_, **__: pytest.fail("read the capture"))
    options = [] if model == "demo-small" else ["--model", model]  # the capture's own is demo-small
    code, out, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "p.yaml", "--verify", "--revision", "main", *options
    )
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {model} is shipped with the package and has no revisions")


def test_verify_refuses_prompts_longer_than_the_model_takes(run_kascade, real_capture, tmp_path):
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "p.yaml", "--verify", "--verify-length", "1m"
    )
    assert code == 2
    assert "positions" in error


def test_verify_measures_an_explicit_set_and_no_other(run_kascade, real_capture, tmp_path):
    target = tmp_path / "profile.yaml"
    code, text, error = run_kascade(
        "select-anchors", real_capture, "-o", target, "--verify", "--candidates", "3", "--anchors", "0,1,5",
        "--verify-prompts", "1", "--min-keys", "32", "--device", "cpu", "--json", "--bootstrap", "0",
    )  # fmt: skip
    assert code == 0, error
    selection = Profile.load(target).selection
    (only,) = selection["verify"]["candidates"]
    assert only["anchors"] == selection["anchors"] == [0, 1, 5]
    assert only["kl"]["decode"] > 0
    assert set(only["objectives"]) == {"importance", "uniform"}
    assert json.loads(text)["why"].startswith("these anchors were asked for; their measured KL is ")


def test_without_the_model_the_similarity_decides_and_says_so(select):
    code, _, error, target = select("--anchors", "2")
    assert code == 0
    (line,) = error.splitlines()
    assert line == (
        "not verified: model toy is not on this machine; pass --model, or --no-verify to choose by the similarity "
        "alone"
    )
    assert "verify" not in Profile.load(target).selection
    code, _, error, _ = select("--anchors", "2", "--no-verify", "--overwrite")
    assert (code, error) == (0, "")
    for options in (["--verify"], ["--model", "nowhere/at-all"], ["--verify-dev-set", "hops"]):
        code, out, error, target = select("--anchors", "2", *options, output="other.yaml")
        assert (code, out) == (1, "")
        assert error.count("\n") == 1
        assert error.startswith("error: cannot load ")
        assert not target.exists()


def test_verification_is_what_happens_where_the_model_is(run_kascade, real_capture, tmp_path):
    target = tmp_path / "profile.yaml"
    code, text, error = run_kascade(
        "select-anchors", real_capture, "-o", target, "--verify-prompts", "1", "--min-keys", "32", "--device", "cpu",
        "--anchors", "3", "--bootstrap", "0",
    )  # fmt: skip
    assert code == 0, error
    verified = Profile.load(target).selection["verify"]
    proposed = [entry for entry in verified["candidates"] if len(entry["objectives"]) == 1]
    assert {name for entry in proposed for name in entry["objectives"]} == {"importance", "uniform"}
    assert len(verified["candidates"]) >= len(proposed) + 8  # and the neighbours of the best
    assert all(entry["answers"]["given"] == verified["answers"]["given"] > 0 for entry in verified["candidates"])
    assert "dense answers" in text
    assert not list(tmp_path.glob("*.jsonl"))  # the journal goes when the profile is written


def test_ratios_by_length(run_kascade, real_capture, tmp_path):
    """What the table says is what was measured: the smallest ratio that does as well as a half of the keys."""
    target = tmp_path / "profile.yaml"
    code, text, error = run_kascade(
        "select-anchors", real_capture, "-o", target, "--ratio", "auto", "--verify-length", "1k", "--anchors", "0,2,7",
        "--verify-prompts", "1", "--min-keys", "16", "--device", "cpu", "--bootstrap", "0",
    )  # fmt: skip
    assert code == 0, error
    profile = Profile.load(target)
    (found,) = profile.selection["ratios"]
    assert profile.budget.ratios == {1024: found["ratio"]}
    assert profile.selection["ratio"] == 0.1  # that anchors are compared at
    tried = {row["ratio"]: row for row in found["tried"]}
    most = tried[0.5]
    assert most["given"] > 0
    good = [ratio for ratio, row in tried.items() if row["kept"] >= most["kept"] and row["kl"] <= most["kl"] + 0.02]
    assert found["ratio"] == min(good) < 0.5
    assert "ratio by length, never rising: 1k " in text
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--ratio", "auto", "--no-verify"], 2, "--ratio auto measures on the model: leave --no-verify out"),
        (["--ratio", "much"], 2, "--ratio 'much' is neither a share such as 0.1 nor auto"),
        (["--ratio", "auto"], 1, "cannot load toy"),
        (["--lost-tolerance", "2"], 2, "--lost-tolerance"),
    ],
)
def test_ratios_that_cannot_be_found(select, options, code, line):
    found, out, error, target = select(*options)
    assert (found, out) == (code, "")
    assert error.count("\n") == 1
    assert line in error
    assert not target.exists()


def test_ratios_need_prompts_of_1k(run_kascade, real_capture, tmp_path):
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "p.yaml", "--ratio", "auto", "--anchors", "0,2,7",
        "--verify-prompts", "1", "--device", "cpu",
    )  # fmt: skip
    assert code == 2
    assert error.splitlines()[-1].endswith("held-out prompts have 384: pass --verify-length 1k or more")


def test_the_best_are_measured_on_more_prompts_in_the_end(run_kascade, real_capture, tmp_path, monkeypatch):
    from dataclasses import replace

    from kascade_cli.evaluation import session, verification

    few = replace(session.ON_CPU, prompts=1, again=2, length=384, rounds=1, promising=2, moved=2)
    monkeypatch.setattr(session, "ON_CPU", few)
    monkeypatch.setattr(verification, "FINALISTS", 2)
    target = tmp_path / "profile.yaml"
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", target, "--verify", "--anchors", "3", "--min-keys", "32",
        "--device", "cpu", "--bootstrap", "0",
    )  # fmt: skip
    assert code == 0, error
    selection = Profile.load(target).selection
    measured = {tuple(entry["anchors"]): entry for entry in selection["verify"]["candidates"]}
    assert sorted(entry["prompts"] for entry in measured.values())[-3:] == [1, 3, 3]
    assert selection["verify"]["prompts"] == 3
    assert measured[tuple(selection["anchors"])]["prompts"] == 3
