"""`kascade bench` as a user meets it: outputs and mistakes, on a CPU."""

import csv
import json

import pytest

from kascade_cli.analysis import cost
from kascade_cli.app import main
from kascade_cli.schema import Budget, ModelCard, Profile

QUICK = ["--seconds", "0.01", "--device", "cpu"]


@pytest.fixture
def kascade(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture
def profile(tmp_path):
    card = ModelCard(name="tiny", fingerprint="sha256:" + "0" * 64, layers=4, query_heads=4, kv_heads=2, head_dim=16)
    maps = {layer: {"decode": [0, 1], "prefill": [1, 0]} for layer in (1, 3)}
    made = Profile.build(
        model=card, anchors=[0, 2], profiled_layers=range(4), head_maps=maps, budget=Budget(ratio=0.25, min_keys=8)
    )
    made.save(tmp_path / "p.yaml")
    return tmp_path / "p.yaml"


def test_model_writes_json_csv_and_picture(kascade, tmp_path, profile):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("r.json", "r.csv", "r.png")]
    options = ["-o", paths[0], "--csv", paths[1], "--plot", paths[2]]
    code, out, err = kascade("bench", "model", "--profile", profile, "--context", "64,128", *QUICK, *options)
    assert code == 0
    assert "CPU figures" in out
    assert "CPU figures" in err
    result = json.loads(paths[0].read_text())
    models = [row for row in result["rows"] if row["kind"] == "model"]
    assert [(row["phase"], row["context"]) for row in models] == [
        ("decode", 64), ("decode", 128), ("prefill", 64), ("prefill", 128)
    ]  # fmt: skip
    assert {(row["layers"], row["anchors"], row["ratio"], row["kv_heads"]) for row in models} == {(4, 2, 0.25, 2)}
    assert len(list(csv.DictReader(paths[1].open()))) == len(result["rows"])
    assert paths[2].stat().st_size > 1000
    assert cost.load(paths[0]).at("decode", 64).context == 64


def test_ops_json_is_one_document(kascade):
    code, out, err = kascade(
        "bench", "ops", "--shape", "4,2,16", "--phase", "decode", "--context", "64", *QUICK, "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert result["schema"] == "kascade-bench/v1"
    assert {row["batch"] for row in result["rows"]} == {1}
    assert "decode_sparse" in [row["name"] for row in result["rows"]]


def test_layers_and_anchors_change_the_whole_model_only(kascade):
    shape = ["--shape", "4,2,16", "--phase", "decode", "--context", "64", "--baseline", "sdpa"]
    code, out, _ = kascade("bench", "model", *shape, "--layers", 10, "--anchors", 3, *QUICK, "--json")
    assert code == 0
    row = json.loads(out)["rows"][-1]
    expected = row["layer0_ms"] + 2 * row["anchor_ms"] + 7 * row["reuse_ms"] + row["pass_ms"]
    assert row["total_ms"] == pytest.approx(expected, rel=1e-4)
    assert row["speedup"] == pytest.approx(10 * row["dense_ms"] / expected, rel=1e-2)


def test_refresh_adds_the_steps_between(kascade):
    shape = ["--shape", "4,2,16", "--phase", "decode", "--context", "64", "--baseline", "sdpa"]
    code, out, _ = kascade("bench", "model", *shape, "--strategy", "kascade-refresh", "--refresh", 3, *QUICK, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert {"layer0_between", "reuse_between", "pass_between"} <= {row["name"] for row in rows}
    assert rows[-1]["total_ms"] == pytest.approx(
        (rows[-1]["refresh_step_ms"] + 2 * rows[-1]["between_step_ms"]) / 3, rel=1e-3
    )


def test_the_strategy_is_in_rows_settings_and_title(kascade):
    options = ["--shape", "4,2,16", "--phase", "prefill", "--context", "64", "--baseline", "sdpa", *QUICK]
    code, out, _ = kascade("bench", "model", *options, "--strategy", "kascade-reused-norm")
    assert code == 0
    assert "prefill, kascade-reused-norm, speedup over sdpa" in out
    for chosen in ("kascade", "kascade-reused-norm"):
        code, out, _ = kascade("bench", "model", *options, "--strategy", chosen, "--json")
        result = json.loads(out)
        assert (code, result["settings"]["strategy"]) == (0, chosen)
        assert {row["strategy"] for row in result["rows"]} == {chosen}
    code, _, err = kascade("bench", "model", *options, "--strategy", "oracle")
    assert code == 2
    assert "strategy 'oracle' is not measured" in err


def test_e2e_runs_the_demo_model(kascade):
    code, out, _ = kascade(
        "bench", "e2e", "--shape", "demo", "--phase", "decode", "--context", "128", "--batch", 2, *QUICK, "--json"
    )
    assert code == 0
    dense, sparse = json.loads(out)["rows"]
    assert (dense["name"], sparse["name"], sparse["batch"]) == ("dense", "sparse", 2)
    assert dense["cache"] == "random"
    assert sparse["speedup"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--phase", "train"], "phase 'train' is not known"),
        (["ops", "--context", "many"], "--context: 'many' is not a size"),
        (["ops", "--batch", "0"], "--batch: '0' is not a size: use a whole number, 1 or more"),
        (["model", "--context", "1k,0"], "--context: '0' is not a size: use a whole number, 1 or more"),
        (["ops", "--context", "1"], "--context 1 is no prefill"),
        (["ops", "--batch", ""], "--batch: '' is not a size"),
        (["ops", "--shape", "6,4,64"], "multiple"),
        (["ops", "--shape", "gpt-5"], "shape 'gpt-5' is not known"),
        (["model", "--shape", "4,2,16", "--model", "demo"], "give one of --shape, --model and --profile"),
        (["model", "--ratio", "0"], "ratio 0.0 is outside (0, 1]"),
        (["model", "--min-keys", "0"], "min-keys 0 must be 1 or more"),
        (["model", "--dtype", "int8"], "dtype 'int8' is not known"),
        (["model", "--dtype", "auto"], "dtype auto means nothing"),
        (["model", "--shape", "4,2,16", "--layers", "2", "--anchors", "3"], "3 anchors do not fit 2 layers"),
        (["model", "--baseline", "magic"], "baseline 'magic' is not known"),
        (["model", "--strategy", "magic"], "strategy 'magic' is not measured"),
        (["model", "--refresh", "4"], "--refresh is for strategy kascade-refresh, not kascade"),
        (["model", "--strategy", "kascade-refresh", "--refresh", "0"], "'--refresh'"),
        (["e2e", "--refresh", "4"], "--refresh is for strategy kascade-refresh, not kascade"),
        (["model", "-o", "/nonexistent/r.json"], "does not exist"),
        (["model", "-o", "r.json", "--csv", "r.json"], "two outputs name the same file r.json"),
        (["model", "--shape", "4,2,16", "--model", ""], "give one of --shape, --model and --profile"),
        (["model", "--model", ""], "the model's name is empty"),
        (["model", "--shape", ""], "shape '' is not known"),
        (["e2e", "--shape", "4,2,16"], "says nothing of the rest of the model"),
        (["e2e", "--shape", "demo", "--layers", "2"], "--layers is for random weights"),
        (["e2e", "--shape", "demo", "--context", "1k,1m"], "--context 1048576 is more than demo has positions"),
        (["e2e", "--shape", "qwen3-8b", "--context", "2m"], "qwen3-8b has positions: the most is 1048576"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(kascade, arguments, message):
    code, out, err = kascade("bench", *arguments, "--device", "cpu")
    assert code == 2
    assert not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_e2e_stays_within_the_models_positions(kascade, tmp_path, monkeypatch):
    import shutil

    from kascade_cli import models
    from kascade_cli.demo import DEMO_MODELS

    folder = tmp_path / "short"
    shutil.copytree(DEMO_MODELS["demo-small"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    command = ["bench", "e2e", "--model", folder, "--phase", "decode", *QUICK]
    # what was not asked for is cut to what the model has
    code, out, err = kascade(*command, "--json")
    assert code == 0, err
    assert {row["context"] for row in json.loads(out)["rows"]} == {96}
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, _, err = kascade(*command, "--context", "64,97")
    assert code == 2
    assert err.splitlines()[-1] == f"error: --context 97 is more than {folder} has positions: the most is 96"


def test_tilelang_by_name_is_an_error_without_a_gpu(kascade):
    code, _, err = kascade("bench", "ops", "--backend", "tilelang", "--device", "cpu")
    assert code == 1
    assert "need a CUDA GPU" in err


def test_results_are_not_overwritten(kascade, tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")
    code, _, err = kascade("bench", "ops", "-o", path, *QUICK)
    assert code == 2
    assert "--overwrite" in err
    assert path.read_text() == "{}"


def test_a_profile_with_a_table_is_measured_at_the_ratio_of_each_length(kascade, tmp_path, profile):
    made = Profile.load(profile)
    made = made.model_copy(update={"budget": Budget(ratios={64: 0.5, 128: 0.25}, min_keys=8)})
    made.save(tmp_path / "table.yaml")
    options = ("bench", "model", "--profile", tmp_path / "table.yaml", "--context", "64,128", "--json", *QUICK)
    code, out, _ = kascade(*options)
    assert code == 0
    document = json.loads(out)
    assert {row["context"]: row["ratio"] for row in document["rows"]} == {64: 0.5, 128: 0.25}
    assert document["settings"]["budget"]["ratios"] == {"64": 0.5, "128": 0.25}
    code, out, _ = kascade(*options, "--ratio", "0.1")
    document = json.loads(out)
    assert {row["ratio"] for row in document["rows"]} == {0.1}
    assert document["settings"]["budget"] == {"ratio": 0.1, "min_keys": 8, "tile": 32}
