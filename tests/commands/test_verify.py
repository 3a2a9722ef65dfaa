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
    found = {key_of(entry): entry for entry in profile.selection["verify"]["candidates"]}
    assert profile.selection["method"] == "verify"
    assert profile.selection["verify"]["dev_set"] == "pairs/held-out"
    assert all(set(entry["kl"]) == {"decode", "prefill"} for entry in found.values())
    best = min(entry["kl_mean"] for entry in found.values())
    chosen = found[tuple(profile.anchors), profile.pooled]
    assert chosen["kl_mean"] <= best + 0.02
    fewer = [entry for (anchors, _), entry in found.items() if len(anchors) < len(profile.anchors)]
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
    scores = {key_of(entry): entry["kl_mean"] for entry in selection["verify"]["candidates"]}
    assert {len(anchors) for anchors, _ in scores} == {3}
    assert len(scores) > 1
    assert (tuple(selection["anchors"]), selection["heads"] == "pooled") == min(scores, key=scores.get)
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
    first, second = selection["verify"]["candidates"]
    assert [key_of(entry) for entry in (first, second)] == [((0, 1, 5), False), ((0, 1, 5), True)]
    assert selection["anchors"] == [0, 1, 5]
    assert first["kl"]["decode"] > 0
    assert first["kl"] != second["kl"]
    assert set(first["objectives"]) == {"importance", "uniform"}
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
    measured = {key_of(entry): entry for entry in selection["verify"]["candidates"]}
    assert sorted(entry["prompts"] for entry in measured.values())[-3:] == [1, 3, 3]
    assert selection["verify"]["prompts"] == 3
    assert measured[tuple(selection["anchors"]), selection["heads"] == "pooled"]["prompts"] == 3


def key_of(entry):
    """The set of a candidate in a profile's record, and whether it was read pooled."""
    return tuple(entry["anchors"]), entry.get("pooled", False)


def select_small(run_kascade, capture, target, *options):
    code, out, error = run_kascade(
        "select-anchors", capture, "-o", target, "--verify-prompts", "2", "--min-keys", "32", "--device", "cpu",
        "--bootstrap", "0", *options,
    )  # fmt: skip
    assert code == 0, error
    return Profile.load(target), out, error


@pytest.fixture
def pooled_wins(monkeypatch):
    """Every run of a pooled profile is the dense model's, as far as the search can tell."""
    from dataclasses import replace

    from kascade_cli.evaluation import forced

    real = forced.DensePrompt.compare

    def compare(self, model, setting, *rest, **more):
        found = real(self, model, setting, *rest, **more)
        return replace(found, kl=dict.fromkeys(found.kl, 0.0), kept=found.given) if setting.profile.pooled else found

    monkeypatch.setattr(forced.DensePrompt, "compare", compare)


def test_one_key_set_for_all_heads_where_it_does_better(run_kascade, real_capture, tmp_path, pooled_wins):
    profile, text, error = select_small(run_kascade, real_capture, tmp_path / "p.yaml", "--anchors", "3")
    assert profile.pooled
    assert not profile.heads_measured
    assert profile.selection["heads"] == "pooled"
    found = [key_of(entry) for entry in profile.selection["verify"]["candidates"]]
    assert (tuple(profile.anchors), True) in found
    assert len(found) == len(set(found))
    # The search goes on beside the set, read as it is.
    assert len([anchors for anchors, pooled in found if pooled]) > 3
    assert "all heads reading one set" in text
    assert "pooled: all heads of a layer read one key set" in error
    mapped, text, _ = select_small(run_kascade, real_capture, tmp_path / "m.yaml", "--anchors", "3", "--heads", "maps")
    assert mapped.heads_measured
    assert not any(entry.get("pooled") for entry in mapped.selection["verify"]["candidates"])
    assert "pooled" not in text


def test_pooled_sets_are_measured_as_the_strategy_runs_them(run_kascade, real_capture, tmp_path):
    """What is recorded of a pooled set is what `kascade-pooled` does with the same anchors and their head maps."""
    from kascade_cli.analysis import recovered
    from kascade_cli.analysis.similarity import measure
    from kascade_cli.evaluation.session import Verification, open_session
    from kascade_cli.sparse import Setting

    options = ["--anchors", "0,2,7"]
    mapped, _, _ = select_small(run_kascade, real_capture, tmp_path / "m.yaml", *options, "--heads", "maps")
    pooled, text, _ = select_small(run_kascade, real_capture, tmp_path / "p.yaml", *options, "--heads", "pooled")
    (recorded,) = pooled.selection["verify"]["candidates"]
    assert pooled.pooled
    assert mapped.heads_measured
    assert recorded["pooled"]
    session = open_session(measure(real_capture).meta, ["decode", "prefill"], Verification(prompts=2, device="cpu"))
    for phase in ("decode", "prefill"):
        found = []
        for prompt in range(2):
            dense = session.dense(session.devset, prompt)
            found.append(dense.compare(session.model, Setting("kascade-pooled", mapped)).kl[phase])
        assert recorded["kl"][phase] == pytest.approx(sum(found) / 2, abs=2e-6)
        assert mapped.selection["verify"]["candidates"][0]["kl"][phase] != pytest.approx(sum(found) / 2, rel=1e-2)
    kept = pooled.selection["recovered_mass"]
    (wanted,) = recovered.measure(real_capture, [recovered.pooled_links((0, 2, 7), 8, 4)], pooled.budget)
    assert kept["prefill"]["mean"] == pytest.approx(wanted["prefill"].mean(), abs=1e-6)
    assert kept["mean"] != pytest.approx(mapped.selection["recovered_mass"]["mean"], abs=1e-3)
    assert f"all heads reading one set (recovers {kept['mean']:.1%}" in text


def test_without_measuring_head_maps_are_what_a_profile_has(run_kascade, real_capture, tmp_path):
    code, _, error = run_kascade("select-anchors", real_capture, "-o", tmp_path / "p.yaml", "--no-verify")
    assert code == 0, error
    assert Profile.load(tmp_path / "p.yaml").heads_measured
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "q.yaml", "--no-verify", "--heads", "pooled"
    )
    assert code == 0, error
    assert Profile.load(tmp_path / "q.yaml").pooled
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "r.yaml", "--heads", "pooled", "--tensor-parallel", "2"
    )
    assert code == 2
    assert error == "error: --heads pooled: one set for the heads of all ranks cannot stay within a rank\n"
    code, _, error = run_kascade(
        "select-anchors", real_capture, "-o", tmp_path / "r.yaml", "--heads", "pooled", "--assignment", "free"
    )
    assert code == 2
    assert error.startswith("error: --assignment free says which anchor each head reads")


@pytest.mark.parametrize("options", [["--tensor-parallel", "2"], ["--assignment", "free"]])
def test_where_head_maps_are_part_of_what_is_asked_for(run_kascade, real_capture, tmp_path, pooled_wins, options):
    profile, _, _ = select_small(run_kascade, real_capture, tmp_path / "p.yaml", "--anchors", "3", *options)
    assert profile.heads_measured
    assert not any(entry.get("pooled") for entry in profile.selection["verify"]["candidates"])


def test_the_set_that_would_be_chosen_is_read_the_other_way(run_kascade, real_capture, tmp_path, pooled_wins):
    """Without a rule too, where a larger set has a lower KL; and nothing is said of head maps that are not there."""
    profile, text, _ = select_small(
        run_kascade, real_capture, tmp_path / "p.yaml", "--max-anchors", "4", "--kl-tolerance", "0.5",
        "--bootstrap", "20",
    )  # fmt: skip
    found = {key_of(entry): entry for entry in profile.selection["verify"]["candidates"]}
    with_maps = [entry for (_, pooled), entry in found.items() if not pooled and entry["prompts"] == 2]
    near = min(entry["kl_mean"] for entry in with_maps) + 0.5
    fewest = min(len(entry["anchors"]) for entry in with_maps if entry["kl_mean"] <= near)
    assert profile.pooled
    assert len(profile.anchors) <= fewest
    assert "head-map entries" not in text
    assert profile.selection["stability"]["head_map_entries_kept"] is None


def test_all_layers_as_anchors_are_read_one_way_only(run_kascade, real_capture, tmp_path):
    options = ["--no-verify", "--anchors", "8", "--heads", "pooled"]
    code, text, error = run_kascade("select-anchors", real_capture, "-o", tmp_path / "p.yaml", *options)
    assert code == 0, error
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.anchors == list(range(8))
    assert profile.selection["heads"] == "maps"
    assert "reading one set" not in text


def test_a_pooled_profile_in_use(run_kascade, real_capture, tmp_path):
    """What the other commands make of it: no head map is missed, and none is made up."""
    path = tmp_path / "p.yaml"
    select_small(run_kascade, real_capture, path, "--anchors", "0,2,7", "--heads", "pooled")
    asked = ["--profile", path, "--task", "pairs", "--max-length", "256", "--num-prompts", "1", "--questions", "2"]
    asked += ["--device", "cpu", "--dtype", "float32"]
    code, text, error = run_kascade(
        "evaluate", "demo-small", *asked, "--strategies", "dense,kascade,kascade-pooled", "--anchors", "0,1,5",
        "--capture", real_capture, "--json",
    )  # fmt: skip
    assert code == 0, error
    document = json.loads(text)
    rows = {row["strategy"]: row for row in document["rows"]}
    assert rows["kascade"]["head_maps"] == "pooled"
    assert rows["kascade"]["scores"] == rows["kascade-pooled"]["scores"]
    assert document["head_maps_of_other_anchors"] == "no"
    assert "not measured" not in error
    code, text, error = run_kascade("show", path)
    assert code == 0
    assert "none: all heads of a layer read one key set" in text
    code, text, error = run_kascade("export", path, "--format", "sparse_attention_config", "--json")
    assert code == 0, error
    assert '"head_map": null' in text
    code, text, error = run_kascade("report", path, "-o", tmp_path / "r.html")
    assert code == 0, error
    assert "have not been measured" not in (tmp_path / "r.html").read_text()
    code, _, error = run_kascade("sweep", "remap", "demo-small", "--profile", path, "-o", tmp_path / "s.json")
    assert code == 2
    assert "has no head maps to compare" in error
