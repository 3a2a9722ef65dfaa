"""`kascade evaluate` as a user meets it: table, JSON, figure, targets, mistakes."""

import json
import sys

import pytest

from kascade_cli.evaluation.cases import built_in_cases

SMALL = ["evaluate", "demo-small", "--device", "cpu", "--dtype", "float32"]
FAST = ["--max-length", "256", "--num-prompts", "2", "--questions", "2"]


def test_json(run_kascade, profile, small):
    options = ["--profile", profile, "--ratio", "0.1,0.2", "--json", "--strategies", "kascade,dense,streaming-llm"]
    code, out, err = run_kascade(*SMALL, *FAST, *options)
    assert code == 0
    document = json.loads(out)
    rows = document["rows"]
    assert [(row["strategy"], row["ratio"]) for row in rows] == [
        ("dense", None),
        ("kascade", 0.1),
        ("streaming-llm", 0.1),
        ("kascade", 0.2),
        ("streaming-llm", 0.2),
    ]
    assert document["tasks"] == ["single-hop", "two-hop"]  # what demo-small was trained on
    assert document["command"].startswith("kascade evaluate")
    assert document["gpu"] is None
    assert {"date", "commit", "versions"} < set(document)
    assert rows[0]["density"]["all"] == 1
    assert rows[1]["density"]["all"] < rows[3]["density"]["all"] < 0.5
    assert rows[1]["anchors"] == [0, 1, 2, 7]
    # Dense against plain generation, question by question.
    model, tokenizer = small
    import torch

    right = []
    for case in built_in_cases(
        ["single-hop", "two-hop"], "pairs", tokenizer, length=256, num_prompts=2, questions=2, seed=0
    ):
        for question in case.questions:
            ids = torch.tensor([case.context + question.ids])
            written = model.generate(ids, max_new_tokens=question.new_tokens, do_sample=False)[0, ids.shape[1] :]
            right.append(tokenizer.decode(written).split() == question.answers[0].split())
    assert rows[0]["mean"]["score"] == pytest.approx(100 * sum(right) / len(right))
    assert rows[1]["mean"]["vs_dense"]["score"] == pytest.approx(rows[1]["mean"]["score"] - rows[0]["mean"]["score"])


def test_refresh(run_kascade, profile):
    """With 1 the rows of kascade; a longer cycle reads a few keys more."""
    names = "kascade,kascade-refresh,kascade-refresh:refresh=1,kascade-refresh:refresh=3"
    options = ["--profile", profile, "--ratio", "0.1", "--strategies", names, "--json"]
    code, out, _ = run_kascade(*SMALL, *FAST, *options)
    assert code == 0
    kascade, *rows = json.loads(out)["rows"]
    assert "options" not in kascade
    assert [row["options"]["refresh"] for row in rows] == [8, 1, 3]
    assert [row["strategy"] for row in rows] == names.split(",")[1:]
    found = {row["options"]["refresh"]: row for row in rows}
    assert (found[1]["scores"], found[1]["density"]) == (kascade["scores"], kascade["density"])
    assert found[3]["density"]["decode"] > kascade["density"]["decode"]
    assert found[3]["density"]["prefill"] == kascade["density"]["prefill"]


def test_table_anchors_and_targets(run_kascade, profile, tmp_path):
    figure = tmp_path / "e.png"
    options = ["--profile", profile, "--anchors", "random:2", "--anchors", "0,1", "--plot", figure]
    code, out, err = run_kascade(
        *SMALL, *FAST, *options, "--require", "kascade >= 150", "--require", "dense >= kascade - 100"
    )
    assert code == 3
    assert "kascade[0,1]" in out
    assert "single hop" in out
    assert "random, ratio 0.1 at 256: 2 sets of 4 anchors (no head maps)" in out
    assert err.splitlines()[-1].startswith("error: missed: kascade >= 150 (at 256 tokens, ratio 0.1: ")
    assert "met: dense >= kascade - 100" in err
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["e.png"]
    code, _, err = run_kascade(*SMALL, *FAST, *options)
    assert code == 2
    assert "exists; pass --overwrite" in err


def test_curves_over_ratios_and_lengths(run_kascade, profile, tmp_path):
    figure = tmp_path / "e.png"
    options = [
        "--profile",
        profile,
        "--ratio",
        "0.1,0.3",
        "--max-length",
        "128,256",
        "--num-prompts",
        "1",
        "--questions",
        "1",
    ]
    code, out, err = run_kascade(*SMALL, *options, "--plot", figure)
    assert code == 0
    assert "128 tokens, 1 prompts" in out
    assert "256 tokens, 1 prompts" in out
    assert figure.stat().st_size > 10_000


def test_a_file_of_one_s_own(run_kascade, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [("@ k1 v2 v3 @ k4 v5 v6 ? k1", "v2 v3"), ("@ k1 v2 v3 @ k4 v5 v6 ? k4", "w1"), ("w1 " * 70, "v1")]
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows))
    code, out, err = run_kascade(*SMALL, "--task", path, "--strategies", "dense", "--max-length", "64", "--json")
    assert code == 0
    score = json.loads(out)["rows"][0]["scores"]["mine"]
    assert (score["questions"], score["prompts"], score["score"]) == (2, 2, 50)
    assert "1 prompts longer than 64 left out" in err
    code, out, err = run_kascade(*SMALL, "--task", path, "--strategies", "dense", "--json")
    assert code == 0
    assert json.loads(out)["rows"][0]["scores"]["mine"]["questions"] == 3  # without a bound nothing is left out
    assert "left out" not in err
    code, out, err = run_kascade(*SMALL, "--task", path, "--strategies", "oracle", "--max-length", "64")
    assert code == 0
    assert "note: oracle read every key at 64 tokens and ratio 0.1" in err


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        ([], 2, "strategy kascade needs a profile"),
        (["--strategies", "dense,magic"], 2, "strategy 'magic' is not known"),
        (["--strategies", "dense,dense"], 2, "names a strategy twice"),
        (["--strategies", "dense", "--task", "nope"], 2, "no task is called 'nope'"),
        (["--strategies", "dense", "--task", "nowhere.jsonl"], 1, "cannot read nowhere.jsonl"),
        (["--strategies", "oracle", "--ratio", "0"], 2, "ratio 0 is outside"),
        (["--strategies", "oracle", "--ratio", "0.1,0.2,0.1"], 2, "--ratio names 0.1 twice"),
        (["--strategies", "dense", "--max-length", "1k,1024"], 2, "--max-length names 1024 twice"),
        (["--strategies", "dense", "--backend", "nope"], 2, "backend 'nope' is not known"),
        (["--strategies", "oracle", "--ratio", "x"], 2, "'x' is not a list of numbers"),
        (["--strategies", "oracle", "--ratio", ""], 2, "'' is not a list of numbers"),
        (["--strategies", "dense", "--max-length", "0"], 2, "--max-length: '0' is not a size"),
        (["--strategies", "dense", "--max-length", "8k"], 1, "and demo-small has 4096: lower --max-length"),
        (["--strategies", "dense", "--max-length", "8"], 1, "too short"),
        (["--strategies", "dense", "--num-prompts", "0"], 2, "--num-prompts"),
        (["--strategies", "dense", "--anchors", "random:2"], 2, "pass --profile"),
        (["--strategies", "dense", "--capture", "c.h5"], 2, "pass --anchors too"),
        (
            ["--strategies", "dense,oracle:refresh=4"],
            2,
            "strategy oracle has no option 'refresh': it has pool",
        ),
        (["--strategies", "kascade-refresh"], 2, "strategy kascade-refresh needs a profile"),
        (["--strategies", "kascade-refresh:refresh=0"], 2, "kascade-refresh: refresh 0 must be 1 or more"),
        (["--strategies", "dense", "--chat"], 2, "--chat is for prompts of a file"),
        (["--strategies", "dense", "--require", "kascade >= 1"], 2, "is not understood"),
        (
            ["--strategies", "dense", "--require", "silent-two-hop: dense >= 1"],
            2,
            "no task 'silent-two-hop' is evaluated",
        ),
        (["--strategies", "dense", "--plot", "/nowhere/e.png"], 2, "folder /nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(run_kascade, arguments, code, problem):
    got, out, err = run_kascade(*SMALL, *arguments)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert problem in err


@pytest.mark.parametrize(
    ("anchors", "problem"),
    [
        ("random:0", "use random:10"),
        ("1,2", "first full-attention layer, 0"),
        ("0,9", "layer 9 is not"),
        ("random:99", "only 34"),
    ],
)
def test_wrong_anchors(run_kascade, profile, anchors, problem):
    code, out, err = run_kascade(*SMALL, "--profile", profile, "--anchors", anchors)
    assert (code, out) == (2, "")
    assert problem in err


def test_without_matplotlib(run_kascade, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run_kascade(*SMALL, *FAST, "--strategies", "dense", "--plot", tmp_path / "e.png")
    assert code == 1
    assert "pip install 'kascade-cli[plot]'" in err


def test_a_figure_without_matplotlib_is_refused_before_the_model_is_loaded(run_kascade, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("kascade_cli.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, err = run_kascade(*SMALL, "--strategies", "dense", "--plot", tmp_path / "e.png")
    assert (code, out) == (1, "")
    assert err == "error: matplotlib is not installed: pip install 'kascade-cli[plot]'\n"


def test_files_are_looked_for_before_the_model_is_loaded(run_kascade, tmp_path, monkeypatch):
    from kascade_cli.schema import Budget, ModelCard, Profile

    card = ModelCard(name="m", fingerprint="sha256:" + "0" * 64, layers=1, query_heads=2, kv_heads=1, head_dim=8)
    made = Profile.build(model=card, anchors=[0], profiled_layers=[0], head_maps={}, budget=Budget())
    made.save(tmp_path / "p.yaml")
    (tmp_path / "c.h5").write_bytes(b"")
    monkeypatch.setattr("kascade_cli.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for arguments, problem in (
        (["--task", "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file"),
        (["--anchors", "0", "--capture", tmp_path / "no.h5"], "no.h5: no such file"),
        (["--anchors", "0", "--capture", tmp_path / "c.h5"], "c.h5: not an HDF5 file"),
    ):
        code, out, err = run_kascade(*SMALL, "--profile", tmp_path / "p.yaml", *arguments)
        assert (code, out) == (1, "")
        assert problem in err


def test_a_budget_by_length_and_head_maps_not_measured(run_kascade, profile, tmp_path):
    from kascade_cli.schema import Budget, Profile

    made = Profile.load(profile)
    path = tmp_path / "v2.yaml"
    Profile.build(
        model=made.model, anchors=made.anchors, profiled_layers=made.attention_layers, head_maps=None,
        budget=Budget(ratios={64: 0.4, 256: 0.1}, min_keys=4),
    ).save(path)  # fmt: skip
    options = ["--profile", path, "--max-length", "128,256", "--num-prompts", "1", "--questions", "1"]
    options += ["--strategies", "dense,kascade,kascade-no-remap"]
    code, out, err = run_kascade(*SMALL, *options)
    assert code == 0
    assert "0.4*" in out
    assert "0.1*" in out
    assert "* at the longest prompt: the profile's budget is a table" in out
    assert "note: head maps not measured: kascade ran pooled, one key set for all heads\n" in err
    code, out, _ = run_kascade(*SMALL, *options, "--json")
    rows = {(row["length"], row["strategy"]): row for row in json.loads(out)["rows"]}
    assert "ratios" not in rows[128, "dense"]
    assert (rows[128, "kascade"]["ratio"], rows[256, "kascade"]["ratio"]) == (0.4, 0.1)
    assert rows[128, "kascade"]["ratios"] == {"64": 0.4, "256": 0.1}
    assert rows[128, "kascade"]["head_maps"] == "not measured: pooled"
    assert "head_maps" not in rows[128, "kascade-no-remap"]
    decode = {length: rows[length, "kascade"]["density"]["decode"] for length in (128, 256)}
    assert decode[128] > 0.4 > decode[256]  # the dense layer reads all keys
    code, out, _ = run_kascade(*SMALL, *options, "--ratio", "0.2", "--json")
    assert all("ratios" not in row and row["ratio"] in (None, 0.2) for row in json.loads(out)["rows"])
    text = ["generate", "demo-small", "--task", "single-hop", "--max-length", "128", "--profile", path]
    code, out, err = run_kascade(*text)
    assert code == 0
    assert "note: head maps not measured: kascade ran pooled, one key set for all heads\n" in err
