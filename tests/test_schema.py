"""The profile: round trip byte for byte, and one line with the place for everything that can be wrong in the file."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.schema import MAX_BYTES, Budget, ModelCard, Profile

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


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """Two processes at once: both find the name free when they look."""
    monkeypatch.setattr("kascade_cli.schema.profile.check_output", lambda path, overwrite: path)
    example().save(tmp_path / "p.yaml")
    with pytest.raises(UsageError, match="p.yaml exists; pass --overwrite"):
        example(selection={"mine": "too"}).save(tmp_path / "p.yaml")
    assert Profile.load(tmp_path / "p.yaml") == example()


def test_reading_and_writing_profiles_knows_no_terminal(tmp_path):
    example().save(tmp_path / "p.yaml")
    code = (
        "import sys\nfrom kascade_cli import Profile\n"
        f"Profile.load({str(tmp_path / 'p.yaml')!r}).save({str(tmp_path / 'q.yaml')!r})\n"
        "sys.exit(', '.join({'rich', 'typer', 'torch', 'h5py', 'numpy'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


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
        ("kascade/v2", "kascade/v3", "line 1: schema: Input should be 'kascade/v1' or 'kascade/v2'"),
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


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (BOMB, "aliases (`*name`) are not read"),
        ("loop: &l [*l]", "aliases (`*name`) are not read"),
        ("deep: " + "[" * 100_000, "nested more than 20 deep"),
        ("deep: " + "{a: " * 50_000, "nested more than 20 deep"),
        ("deep:\n" + "".join(" " * n + "-\n" for n in range(1, 900)), "nested more than 20 deep"),
        ("? [a, b]\n: 1", "a key is no text"),
        ("? {a: b}\n: 1", "a key is no text"),
        ("1: one", "key 1 is no text: put it into quotes"),
        ("null: one", "key null is no text"),
        ("<<: {a: 1}", "key << is no text"),
        ("n: !!int text", "'text' is no !!int"),
        ("n: !!float text", "'text' is no !!float"),
        ("n: !!bool text", "'text' is no !!bool"),
        ("n: !!int [1]", "this is no !!int"),
        ("n: !!map [1]", "this is no !!map"),
        ("n: !!seq {a: 1}", "this is no !!seq"),
        ("n: !!str {a: 1}", "this is no !!str"),
        ("n: !!binary aGFsbG8=", "tag !!binary is not known"),
        ("n: !!python/object/apply:os.getcwd []", "tag !!python/object/apply:os.getcwd is not known"),
        ("n: !mine 1", "tag !mine is not known"),
        ("n: " + "9" * 5000, "a number of 5000 characters"),
        ("n: 0x" + "f" * 5000, "a number of 5002 characters"),
        ("n: .nan", ".nan is no number that can stand here"),
        ("n: -.inf", "-.inf is no number that can stand here"),
        ("n: 1e9999", None),  # text to YAML 1.1; as a number it would be infinite
        ("n: 1.0e+9999", "1.0e+9999 is no number that can stand here"),
        ('n: "a\\ud800b"', "half a character"),
        ('"a\\ud800b": 1', "half a character"),
        ('n: "\\UFFFFFFFF"', "not readable as YAML"),
        ("n: a\x1b[31m", "special characters are not allowed"),
        ("n: {a: 1, a: 2}", "key 'a' is given twice"),
        ("n: [", "not readable as YAML"),
        ("n: 1\n---\nm: 2", "not readable as YAML"),
    ],
)
def test_hostile_yaml_is_one_line_at_once(extra, message):
    """In the free part of a profile too, where no field is checked."""
    text = example().dumps().replace("provenance:\n", "provenance:\n" + "".join(f"  {x}\n" for x in extra.split("\n")))
    started = time.perf_counter()
    if message is None:
        Profile.loads(text)
        return
    with pytest.raises(KascadeError) as error:
        Profile.loads(text, "p.yaml")
    assert time.perf_counter() - started < 5
    assert message in str(error.value)
    assert str(error.value).startswith("p.yaml: ")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400
    str(error.value).encode()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("decode: [0, 1]", "decode: [false, true]", "layers.1.heads"),
        ("decode: [0, 1]", "decode: ['0', '1']", "layers.1.heads"),
        ("decode: [0, 1]", "decode: [0.0, 1.0]", "layers.1.heads"),
        ("decode: [0, 1]", "decode: [0, 99999999999999999999]", "layers.1.heads"),
        ("decode: [0, 1]", f"decode: [{', '.join(['0'] * 5000)}]", "layers.1.heads"),
        ("min_keys: 128", "min_keys: 100000000000000000000", "budget.min_keys"),
        ("min_keys: 128", "min_keys: '128'", "budget.min_keys"),
        ("tile: 32", "tile: 0", "budget.tile"),
        ("ratio: 0.1", "ratio: true", "budget.ratio"),
        ("layers: 5", "layers: true", "model.layers"),
        ("name: x", "name: [x]", "model.name"),
        ("name: x", "name: " + "x" * 5000, "model.name"),
        ("role: dense", 'role: "dense\\e[31m\\n"', "layers.0.role"),
        ("budget:", '"bud\\e[31mget\\n":', "line 10: budget : unknown key"),
        ("sha256:", "v3-sha256:", "model.fingerprint"),
    ],
)
def test_values_of_another_kind_are_not_converted(old, new, message):
    text = example().dumps()
    assert old in text
    with pytest.raises(KascadeError) as error:
        Profile.loads(text.replace(old, new, 1), "p.yaml")
    assert message in str(error.value)
    assert "line " in str(error.value)
    assert str(error.value).isprintable()


def test_both_forms_of_fingerprints():
    for form in ("sha256:", "v2-sha256:"):
        card = CARD.model_copy(update={"fingerprint": form + "b" * 64})
        assert Profile.loads(example(model=card).dumps()).model.fingerprint == card.fingerprint


def test_what_cannot_be_read_is_not_written(tmp_path):
    for number, content in enumerate([{1: "x"}, {"name": "a\ud800"}, {"what": object()}, {"x": "y" * MAX_BYTES}]):
        path = tmp_path / f"{number}.yaml"
        with pytest.raises(KascadeError) as error:
            example(selection=content).save(path)
        assert len(str(error.value).splitlines()) == 1
    card = CARD.model_copy(update={"kv_heads": 3})  # pydantic checks no copy
    with pytest.raises(KascadeError):
        example().model_copy(update={"model": card}).save(tmp_path / "p.yaml")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_are_written_as_null():
    text = example(selection={"kl": math.inf, "rows": [math.nan]}).checked_dumps()
    assert Profile.loads(text).selection == {"kl": None, "rows": [None]}


def test_build_refuses_what_is_no_profile_in_one_line():
    with pytest.raises(KascadeError, match="^no profile can be made: layers.1.heads.decode.1: head 9 is out of range"):
        example(head_maps=MAPS | {1: {"decode": [0, 9], "prefill": [0, 1]}})


def test_files_that_are_too_large_or_no_files(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text(example().dumps() + "#" * MAX_BYTES)
    with pytest.raises(KascadeError, match=f"more than {MAX_BYTES} bytes"):
        Profile.load(path)
    os.mkfifo(tmp_path / "pipe.yaml")
    for strange in (tmp_path / "pipe.yaml", tmp_path, "/dev/zero"):
        with pytest.raises(KascadeError, match="cannot read profile .*(not a regular file|[Ff]older|directory)"):
            Profile.load(strange)
    with pytest.raises(UsageError, match="too long"):
        Profile.load("x" * 300)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("profiles/*.yaml")), ids=lambda path: path.name)
def test_profiles_of_the_repository_read_as_any_yaml_reader_reads_them(path):
    profile = Profile.load(path)
    assert profile.dumps() == path.read_text()
    assert profile.model_dump(by_alias=True, exclude_none=True, mode="json") == yaml.safe_load(path.read_text())


def test_a_long_list_is_refused_before_it_is_read_through():
    text = f"schema: kascade/v1\nmodel: [{'0, ' * 400_000}0]\n"
    with pytest.raises(KascadeError, match="line 2: not readable as YAML: more than 50,000 values"):
        Profile.loads(text)
