"""`kascade show` and `kascade export`."""

import json
import os

import numpy as np
import pytest
import yaml

from kascade_cli.analysis.selection import ranges
from kascade_cli.commands.export import index_topk_pattern
from kascade_cli.commands.show import compact_map
from kascade_cli.schema import Budget, ModelCard, Profile
from tests.toy_captures import random_prompt, write_capture

CARD = {"name": "toy", "fingerprint": "sha256:" + "a" * 64, "query_heads": 4, "kv_heads": 2, "head_dim": 8}


def make_profile(layers=6, profiled=None, anchors=(0, 2), maps=None):
    profiled = list(range(layers)) if profiled is None else profiled
    reuse = [layer for layer in profiled if layer not in anchors]
    maps = maps or {layer: {"decode": [0, 1], "prefill": [1, 1]} for layer in reuse}
    return Profile.build(
        model=ModelCard(layers=layers, **CARD), anchors=anchors, profiled_layers=profiled, head_maps=maps,
        budget=Budget(ratio=0.1, min_keys=64), selection={"method": "dp", "anchors": list(anchors), "why": "a reason"},
        provenance={"tool": "kascade 0", "dev_set": {"name": "toy-set", "sha256": "b" * 64}},
    )  # fmt: skip


@pytest.fixture
def profile_file(tmp_path):
    def save(**options):
        path = tmp_path / "profile.yaml"
        make_profile(**options).save(path, overwrite=True)
        return path

    return save


@pytest.fixture
def capture_file(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [
        random_prompt(rng, layers=3, heads=2, n_tokens=n, tiles=[(32, 32), (70, 1), (64, 20)]) for n in (97, 130)
    ]
    path = write_capture(tmp_path / "capture.h5", prompts, profiled_layers=[0, 2, 4], layers=5)
    return path, prompts


def test_show_profile(run_kascade, profile_file):
    code, text, _ = run_kascade("show", profile_file())
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()[:1].isdigit()}
    assert rows["0"] == ["dense"]
    assert rows["1"] == ["reuse", "0", "=", "1", "1"]
    assert rows["2"] == ["anchor"]
    assert rows["5"] == ["reuse", "2", "=", "1", "1"]
    for fact in ("a reason", "toy-set", "at least 64", "0 2 (2 of 6)"):
        assert fact in text


def test_show_profile_json_is_the_profile(run_kascade, profile_file):
    path = profile_file()
    code, text, _ = run_kascade("show", path, "--json")
    assert code == 0
    assert Profile.model_validate(json.loads(text)) == Profile.load(path)


def test_show_capture(run_kascade, capture_file):
    path, prompts = capture_file
    code, text, _ = run_kascade("show", path)
    assert code == 0
    for fact in (
        "0 2 4 profiled, of 5",
        "227 in all, 97 to 130 per prompt",
        "4 prefill tiles",
        "2 decode rows",
        "complete",
    ):
        assert fact in text
    importance = np.mean([prompt["importance"] for prompt in prompts], axis=0)
    mass = np.mean([prompt["top_mass"] for prompt in prompts], axis=0).mean(axis=1)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()[:1].isdigit()}
    for position, layer in enumerate((0, 2, 4)):
        assert rows[str(layer)][0] == f"{importance[position]:.4f}"
        assert rows[str(layer)][1] == f"{mass[position, 0]:.3f}"


def test_show_capture_json(run_kascade, capture_file):
    path, prompts = capture_file
    code, text, _ = run_kascade("show", path, "--json")
    document = json.loads(text)
    assert code == 0
    assert document["profiled_layers"] == [0, 2, 4]
    assert [row["tokens"] for row in document["prompts"]] == [97, 130]
    mass = np.mean([prompt["top_mass"] for prompt in prompts], axis=0)
    assert document["layers"][1]["worst_head"]["20%"] == pytest.approx(mass[1, :, 4].min(), abs=1e-4)


def test_show_an_unfinished_capture(run_kascade, tmp_path):
    prompts = [random_prompt(np.random.default_rng(0), layers=2, heads=2, n_tokens=97, tiles=[(70, 1)])]
    path = write_capture(tmp_path / "c.h5", prompts, incomplete=[0])
    code, text, _ = run_kascade("show", path)
    assert code == 0
    assert "--resume" in text
    assert "0 of 1" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.yaml", None, "No such file"),
        ("bad.yaml", "layers: [", "not readable as YAML"),
        ("other.yaml", "a: 1", "other.yaml"),
        ("text.h5", "hello", "not an HDF5 file"),
        ("binary.yaml", b"\xff\xfe\x00", "binary.yaml"),
    ],
)
def test_show_bad_files(run_kascade, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, text, error = run_kascade("show", path)
    assert code == 1
    assert error.count("error: ") == 1
    assert message in error
    assert text == ""


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges([3]) == "3"


def test_compact_map():
    assert compact_map([(2, 0), (2, 1)], 2) == "="
    assert compact_map([(2, 1), (2, 1)], 2) == "1 1"
    assert compact_map([(0, 0), (2, 1)], 2) == "0:0 1"


def test_pattern():
    assert index_topk_pattern(make_profile()) == "FSFSSS"
    assert index_topk_pattern(make_profile(layers=7, profiled=[1, 3, 4, 6], anchors=(1, 4))) == "FFFSFFS"


def test_export_to_stdout(run_kascade, profile_file):
    code, text, error = run_kascade("export", profile_file(), "--format", "index_topk_pattern")
    assert code == 0
    assert text.splitlines()[:2] == ["use_index_cache: true", "index_topk_pattern: FSFSSS"]
    assert "no serving engine runs this for a model with KV heads of its own" in error
    document = yaml.safe_load(text)
    assert document["sparse_attention_config"] == {
        "algorithm": "kascade", "topk_ratio": 0.1, "min_topk": 64, "query_tile": 32, "dense_layers": [0],
    }  # fmt: skip


def test_export_config_has_the_head_maps(run_kascade, profile_file, tmp_path):
    target = tmp_path / "out.json"
    path = profile_file(layers=5, profiled=[0, 2, 4], anchors=(0, 2))
    code, text, _ = run_kascade("export", path, "--format", "sparse_attention_config", "--json", "-o", target)
    assert code == 0
    assert text == ""
    config = json.loads(target.read_text())["sparse_attention_config"]
    assert config["index_topk_pattern"] == "FFFFS"
    assert config["passthrough_layers"] == [1, 3]
    assert config["anchor_layers"] == [0, 2]
    assert config["head_map"] == {"4": {"decode": [0, 1], "prefill": [1, 1]}}
    assert run_kascade("export", path, "-o", target)[0] == 2  # exists
    assert run_kascade("export", path, "-o", target, "--overwrite")[0] == 0


def test_export_refuses_free_assignment(run_kascade, profile_file, tmp_path):
    pairs = {layer: {"decode": [(0, 1), (0, 0)], "prefill": [(0, 0), (2, 0)]} for layer in (3, 4, 5)}
    maps = {1: {"decode": [0, 1], "prefill": [0, 1]}} | pairs
    code, text, error = run_kascade("export", profile_file(maps=maps), "-o", tmp_path / "out.yaml")
    assert code == 1
    assert "layer 3" in error
    assert "--assignment nearest" in error
    assert text == ""
    assert not (tmp_path / "out.yaml").exists()


def test_export_accepts_pairs_that_name_the_nearest_anchor(run_kascade, profile_file):
    maps = {layer: {"decode": [(2, 1), (2, 0)], "prefill": [(2, 0), (2, 0)]} for layer in (3, 4, 5)}
    maps[1] = {"decode": [0, 1], "prefill": [0, 1]}
    code, text, _ = run_kascade("export", profile_file(maps=maps), "--format", "sparse_attention_config")
    assert code == 0
    assert yaml.safe_load(text)["sparse_attention_config"]["head_map"]["3"]["decode"] == [1, 0]


@pytest.mark.parametrize("file", ["capture", "profile"])
def test_names_in_files_are_shown_as_text(run_kascade, tmp_path, profile_file, file):
    hostile = "[/b]:smile:[red]x[/x]\x1b[31m\x1b]0;t\x07\n\u202ey"
    if file == "capture":
        prompts = [random_prompt(np.random.default_rng(0), layers=2, heads=2, n_tokens=97, tiles=[(70, 1)])]
        path = write_capture(
            tmp_path / "c.h5", prompts, model_name=hostile, dev_set_name=hostile, dtype=hostile, device=hostile,
            versions=json.dumps({hostile: hostile}), tool_version=hostile,
        )  # fmt: skip
    else:
        path = tmp_path / "p.yaml"
        made = make_profile()
        made = made.model_copy(
            update={
                "model": made.model.model_copy(update={"name": hostile}),
                "selection": {"why": hostile, hostile: {hostile: [hostile]}, "rows": [{"[/]": 1}], "list": [hostile]},
                "provenance": {"[/]": {"[/]": hostile}, "tool": hostile},
            }
        )
        made.save(path)
    code, text, error = run_kascade("show", path)
    assert (code, error) == (0, "")
    assert "[/b]:smile:[red]x[/x]" in "".join(text.split())
    assert not any(mark in text for mark in ("\x1b", "\x07", "\u202e"))
    code, text, error = run_kascade("show", path, "--json")
    assert (code, error) == (0, "")
    document = json.loads(text)
    assert (document["meta"]["model_name"] if file == "capture" else document["model"]["name"]) == hostile
    assert "\x1b" not in text


def test_show_refuses_pipes_and_folders_at_once(run_kascade, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "pipe.h5")
    for path, reason in (
        (tmp_path / "pipe.yaml", "not a regular file"),
        (tmp_path / "pipe.h5", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "a folder"),
    ):
        code, text, error = run_kascade("show", path)
        assert (code, text) == (1, "")
        assert error == f"error: cannot read {path}: it is {reason}\n"


def test_show_hostile_profiles_at_once(run_kascade, tmp_path):
    """An alias bomb of a kilobyte, nesting without end, a file that is too large."""
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    for text, reason in (
        ("schema: kascade/v1\n" + bomb, "aliases"),
        ("a: " + "[" * 10**5, "nested more than 20 deep"),
        ("# " + "x" * (3 << 20), "more than 2097152 bytes"),
        ("schema: !!int x", "is no !!int"),
        ("? [a]\n: 1", "a key is no text"),
    ):
        (tmp_path / "p.yaml").write_text(text)
        code, out, error = run_kascade("show", tmp_path / "p.yaml")
        assert (code, out) == (1, "")
        assert error.count("\n") == 1
        assert reason in error


def test_show_a_capture_counts_its_parts(run_kascade, capture_file):
    """What `show` and `profile` say of a capture comes from one function."""
    path, prompts = capture_file
    (path.parent / "capture.h5.parts").mkdir()
    (path.parent / "capture.h5.parts" / "000000.h5").write_bytes(b"x" * 100)
    _, text, _ = run_kascade("show", path, "--json")
    document = json.loads(text)
    assert document["bytes"] == path.stat().st_size + 100
    assert document["tokens"] == 97 + 130
    assert document["tiles"] == {"prefill": 4, "decode": 2}
    assert len(document["prompts"]) == len(prompts)


TABLE = {1024: 0.3, 4096: 0.15}


@pytest.fixture
def v2_file(tmp_path):
    made = Profile.build(
        model=ModelCard(layers=4, **CARD | {"fingerprint": None}), anchors=[0, 2], profiled_layers=range(4),
        head_maps=None, budget=Budget(ratios=TABLE), selection={"source": "a paper"},
    )  # fmt: skip
    made.save(tmp_path / "v2.yaml")
    return tmp_path / "v2.yaml"


def test_show_says_what_a_v2_profile_leaves_out(run_kascade, v2_file):
    code, text, _ = run_kascade("show", v2_file)
    assert code == 0
    for fact in (
        "kascade/v2",
        "toy (any weights of this shape)",
        "30%, from 4096 keys 15% of the visible keys, at least 128",
        "head maps  not measured: pooled",
    ):
        assert fact in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()[:1].isdigit()}
    assert rows["1"] == ["reuse", "0", "pooled", "pooled"]
    code, text, _ = run_kascade("show", v2_file, "--json")
    assert Profile.model_validate(json.loads(text)) == Profile.load(v2_file)


def test_export_of_a_v2_profile(run_kascade, v2_file):
    code, text, _ = run_kascade("export", v2_file)
    assert code == 0
    document = yaml.safe_load(text)
    assert document["index_topk_pattern"] == "FSFS"
    assert document["sparse_attention_config"]["topk_ratio"] == 0.3
    assert document["sparse_attention_config"]["topk_ratios"] == TABLE
    code, text, _ = run_kascade("export", v2_file, "--format", "sparse_attention_config", "--json")
    config = json.loads(text)["sparse_attention_config"]
    assert (code, config["head_map"], config["model_fingerprint"]) == (0, None, None)
    assert config["topk_ratios"] == {"1024": 0.3, "4096": 0.15}
