"""The profile: round trip byte for byte, and one line with the place for everything that can be wrong in the file."""

import math

import pytest

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import Budget, ModelCard, Profile

CARD = ModelCard(name="x", fingerprint="sha256:" + "a" * 64, layers=5, query_heads=8, kv_heads=2, head_dim=64)
MAPS = {
    1: {"decode": [0, 1], "prefill": [1, 1]},
    4: {"decode": [(0, 0), (2, 1)], "prefill": [1, 0]},
}


def example(**changes):
    options = {
        "model": CARD,
        "anchors": [0, 2],
        "profiled_layers": [0, 1, 2, 4],
        "head_maps": MAPS,
        "selection": {"objective": 0.1 + 0.2, "rows": [{"anchors": [0, 2], "kl": None}], "note": "é: #1"},
        "provenance": {"created": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}},
    }
    return Profile.build(**(options | changes))


def test_round_trip_byte_for_byte(tmp_path):
    profile = example()
    profile.save(tmp_path / "p.yaml")
    text = (tmp_path / "p.yaml").read_text()
    again = Profile.load(tmp_path / "p.yaml")
    assert again.dumps() == text
    assert again == profile
    assert again.provenance["created"] == "2026-01-02T03:04:05+00:00"  # a date stays text
    with pytest.raises(UsageError, match="--overwrite"):
        profile.save(tmp_path / "p.yaml")
    profile.save(tmp_path / "p.yaml", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["p.yaml"]


def test_layers_and_head_maps():
    profile = example()
    assert profile.anchors == [0, 2]
    assert profile.attention_layers == [0, 1, 2, 4]
    assert [layer.role for layer in profile.layers] == ["dense", "reuse", "anchor", "passthrough", "reuse"]
    assert profile.head_map(1, "decode") == [(0, 0), (0, 1)]
    assert profile.head_map(4, "decode") == [(0, 0), (2, 1)]
    assert profile.head_map(4, "prefill") == [(2, 1), (2, 0)]


def test_one_list_serves_both_phases():
    text = example().dumps().replace("heads: {decode: [0, 1], prefill: [1, 1]}", "heads: [1, 0]")
    profile = Profile.loads(text)
    assert profile.head_map(1, "decode") == profile.head_map(1, "prefill") == [(0, 1), (0, 0)]
    assert Profile.loads(profile.dumps()) == profile


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("anchor: 0", "anchor: 4", "line 13: layers.1.anchor: layer 4 is not an anchor before layer 1"),
        ("decode: [0, 1]", "decode: [0, 2]", "line 13: layers.1.heads.decode.1: head 2 is out of range 0..1"),
        ("decode: [0, 1]", "decode: [0]", "line 13: layers.1.heads.decode: 1 heads, but the model has 2 KV heads"),
        ("[2, 1]", "[3, 1]", "line 16: layers.4.heads.decode.1: layer 3 is not an anchor before layer 4"),
        ("budget:", "budgett:", "line 10: budgett: unknown key"),
        ("tile: 32", "tile: 32, block: 1", "line 10: budget.block: unknown key"),
        ("ratio: 0.1", "ratio: 0", "line 10: budget.ratio: Input should be greater than 0"),
        ("role: anchor", "role: ankor", "line 14: layers.2.role: Input should be 'dense', 'anchor'"),
        ("role: dense", "role: anchor", "layers.0: the first full-attention layer must have role dense"),
        ("role: anchor", "role: dense", "layers.2: only the first full-attention layer may be dense"),
        ("- {role: passthrough}\n", "", "4 entries, but the model has 5 layers"),
        ("{role: anchor}", "{role: anchor, anchor: 0}", "`anchor` and `heads` belong to reuse layers"),
        ("kascade/v1", "kascade/v2", "line 1: schema: Input should be 'kascade/v1'"),
        ("kv_heads: 2", "kv_heads: 3", "query_heads 8 is not a multiple of kv_heads 3"),
        ("budget: {", "budget: }", "line 10: not readable as YAML"),
        ("  name: x", "  name: x\n  name: y", "line 5: not readable as YAML: key 'name' is given twice"),
    ],
)
def test_what_is_wrong_and_where(old, new, message):
    text = example().dumps()
    assert old in text
    with pytest.raises(KascadeError) as error:
        Profile.loads(text.replace(old, new, 1), "p.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("p.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "just words", "\x00"])
def test_not_a_profile(text):
    with pytest.raises(KascadeError, match="not a kascade profile|not readable as YAML"):
        Profile.loads(text)


def test_another_of_our_files_is_not_a_profile():
    with pytest.raises(KascadeError, match="^b.json: not a kascade profile"):
        Profile.loads('{"schema": "kascade-bench/v1", "device": "cpu", "rows": []}', "b.json")


def test_unreadable_files(tmp_path):
    with pytest.raises(KascadeError, match="No such file"):
        Profile.load(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(KascadeError, match="not a text file"):
        Profile.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 1.0])
def test_budget_against_the_formula(ratio):
    budget = Budget(ratio=ratio, min_keys=16)
    for visible in [0, 1, 15, 16, 17, 30, 160, 161, 1000, 524288]:
        exact = math.ceil(round(ratio * visible * 1000) / 1000)  # without the float noise of 0.1 * 30
        assert budget.count(visible) == min(visible, max(16, exact))
