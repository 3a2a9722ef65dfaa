"""`kascade import`: head maps of the public implementation become profiles that run; anything else is one line."""

import json
import os
import struct

import numpy as np
import pytest
import torch

from kascade_cli import attach
from kascade_cli.models import describe
from kascade_cli.schema import Profile
from tests.integrations.transformers.naive import Naive
from tests.integrations.transformers.test_attach import ids_of, run

NUMBERS = ["--query-heads", "8", "--head-dim", "4"]


def public_map(anchors, layers, heads, seed=0):
    """A map as the public code makes one, from a similarity [layer, layer, reading head, anchor head].

    Of every layer the most similar head of the nearest anchor; an anchor is most similar to itself.
    """
    rng = np.random.default_rng(seed)
    similarity = rng.random((layers, layers, heads, heads))
    similarity[range(layers), range(layers)] = np.eye(heads)
    nearest = [max(anchor for anchor in anchors if anchor <= layer) for layer in range(layers)]
    return similarity[nearest, range(layers)].argmax(-1).astype(np.int32)


@pytest.fixture
def map_file(tmp_path):
    def save(name="Some-Model-8B_layers_0_2_5.npy", found=None):
        found = public_map([0, 2, 5], 7, 4) if found is None else found
        np.save(tmp_path / name, found)
        return tmp_path / name

    return save


def test_a_map_becomes_a_profile(run_kascade, map_file, tmp_path):
    target = tmp_path / "p.yaml"
    code, out, err = run_kascade("import", map_file(), *NUMBERS, "-o", target)
    assert (code, out) == (0, "")
    assert err == f"wrote {target}: anchors 0 2 5 of 7 layers, for any weights of this geometry\n"
    profile, found = Profile.load(target), public_map([0, 2, 5], 7, 4)
    assert profile.schema_ == "kascade/v2"
    assert [layer.role for layer in profile.layers] == [
        "dense", "reuse", "anchor", "reuse", "reuse", "anchor", "reuse",
    ]  # fmt: skip
    for layer, anchor in ((1, 0), (3, 2), (4, 2), (6, 5)):
        want = [(anchor, head) for head in found[layer].tolist()]
        assert profile.head_map(layer, "decode") == profile.head_map(layer, "prefill") == want
    card = profile.model
    assert (card.name, card.fingerprint) == ("Some-Model-8B", None)
    assert (card.layers, card.query_heads, card.kv_heads, card.head_dim) == (7, 8, 4, 4)
    assert profile.provenance["map"]["name"] == "Some-Model-8B_layers_0_2_5.npy"
    code, out, _ = run_kascade("show", target)
    assert code == 0
    assert "not measured" not in out


def test_it_runs_as_its_map_says(run_kascade, map_file, tmp_path, make_tiny_model):
    model = make_tiny_model("llama", layers=7, heads=8, kv_heads=4)
    run_kascade("import", map_file(), *NUMBERS, "-o", tmp_path / "p.yaml")
    found = public_map([0, 2, 5], 7, 4)
    by_hand = Profile.build(
        model=describe(model).card, anchors=[0, 2, 5], profiled_layers=range(7),
        head_maps={n: {"decode": found[n].tolist(), "prefill": found[n].tolist()} for n in (1, 3, 4, 6)},
    )  # fmt: skip
    ids, segments = ids_of(150), [(0, 140), (140, 141), (141, 150)]
    want = Naive(model, by_hand, "kascade", segments, 0.1, 8).logits(ids)
    with attach(model, Profile.load(tmp_path / "p.yaml"), min_keys=8):
        torch.testing.assert_close(run(model, ids, segments), want)


def test_the_geometry_of_a_model(run_kascade, map_file, tmp_path, small):
    info = describe(small[0], "demo-small")
    path = map_file("demo_layers_0_2.npy", public_map([0, 2], info.layers, info.kv_heads))
    loose, bound = tmp_path / "loose.yaml", tmp_path / "bound.yaml"
    code, _, err = run_kascade("import", path, "--model", "demo-small", "-o", loose)
    assert (code, err) == (0, f"wrote {loose}: anchors 0 2 of 8 layers, for any weights of this geometry\n")
    assert Profile.load(loose).model == info.card.model_copy(update={"fingerprint": None})
    code, _, err = run_kascade("import", path, "--model", "demo-small", "--bind", "-o", bound)
    assert code == 0
    assert err.endswith("for the weights of demo-small\n")
    assert Profile.load(bound).model == info.card
    text = ["generate", "demo-small", "--prompt", "@ k1 v2 v3 ? k1", "--max-new-tokens", "3", "--json"]
    for profile in (loose, bound):
        code, out, _ = run_kascade(*text, "--profile", profile)
        assert code == 0
        assert json.loads(out)["runs"][0]["report"]["roles"]["anchor"] == [2]
    code, _, err = run_kascade("generate", "demo", "--prompt", "@ k1 v2", "--profile", loose)
    assert code == 1
    assert "the profile is for demo-small with 8 layers" in err.splitlines()[-1]


def test_only_full_attention_layers_get_a_role(run_kascade, tmp_path, make_tiny_model, map_file):
    """Of a model with sliding windows, from its config alone: no weights are saved."""
    model = make_tiny_model("gemma3", layers=6)
    model.config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "model" / "config.json").read_text()) | {"architectures": ["GemmaForCausalLM"]}
        )
    )
    path = map_file("g_layers_1_5.npy", np.zeros((6, 2), np.int32))
    code, _, err = run_kascade("import", path, "--model", tmp_path / "model", "-o", tmp_path / "p.yaml")
    assert code == 0, err
    profile = Profile.load(tmp_path / "p.yaml")
    assert profile.attention_layers == describe(model).profiled_layers == [1, 3, 5]
    assert profile.model.head_dim == 8
    attach(model, profile).detach()
    code, _, err = run_kascade(
        "import", path, "--model", tmp_path / "model", "--anchors", "1,2", "-o", tmp_path / "q.yaml"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "layer 2 is not a full-attention layer" in err


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", "u1", "<u8", "i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_kind_of_whole_number(run_kascade, map_file, tmp_path, dtype, order):
    found = public_map([0, 2, 5], 7, 4)
    path = map_file(found=np.asarray(found, dtype, order=order))
    assert run_kascade("import", path, *NUMBERS, "-o", tmp_path / "p.yaml")[0] == 0
    profile = Profile.load(tmp_path / "p.yaml")
    assert [head for _, head in profile.head_map(4, "decode")] == found[4].tolist()


def test_other_anchors_than_the_name_says(run_kascade, map_file, tmp_path):
    code, _, err = run_kascade("import", map_file(), "--anchors", "0,3", *NUMBERS, "-o", tmp_path / "p.yaml")
    assert code == 0
    assert Profile.load(tmp_path / "p.yaml").anchors == [0, 3]
    note, _ = err.splitlines()
    assert note.startswith("note: rows 3 of the map, which are anchors', do not name their own heads")


def header(shape="(7, 4)", descr="'<i4'", more="", version=(1, 0)):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {more}}}".ljust(117) + "\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text.encode()


GOOD = bytes(7 * 4 * 4)
FILES = {
    "truncated": (header() + GOOD[:-1], "111 bytes of numbers, and shape (7, 4) takes 112: truncated or damaged"),
    "too long": (header() + GOOD + b"x", "113 bytes of numbers"),
    "header cut": (header()[:40], "not a .npy file that can be read, or a truncated one"),
    "empty": (b"", "not a .npy file"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a .npy file"),
    "zip": (b"PK\x03\x04" + bytes(99), "not a .npy file"),
    "version": (header(version=(9, 9)), "not a .npy file"),
    "code": (header(more="'x': __import__('os'),") + GOOD, "not a .npy file"),
    "deep": (header(shape="(" * 60) + GOOD, "not a .npy file"),
    "objects": (header(descr="'|O'") + GOOD, "it holds Python objects, which are not read"),
    "gigantic": (header(shape="(1000000000000, 4)") + GOOD, "layers of 4 KV heads are no model's"),
    "negative size": (header(shape="(-7, -4)") + GOOD, "an array of shape (-7, -4)"),
    "floats": (header(descr="'<f4'") + GOOD, "it holds float32, not whole numbers (int32)"),
    "truth": (header(descr="'|b1'") + GOOD[:28], "it holds bool, not whole numbers"),
    "record": (header(descr="[('a', '<i4')]") + GOOD, "not whole numbers"),
    "text numbers": (header(descr="'<U1'") + GOOD, "not whole numbers"),
    "one axis": (header(shape="(28,)") + GOOD, "an array of shape (28,), and a head map is [layers, KV heads]"),
    "three axes": (header(shape="(7, 2, 2)") + GOOD, "an array of shape (7, 2, 2)"),
    "nothing": (header(shape="(0, 4)"), "an array of shape (0, 4)"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_map(run_kascade, tmp_path, name):
    data, message = FILES[name]
    path = tmp_path / "M_layers_0_2_5.npy"
    path.write_bytes(data)
    code, out, err = run_kascade("import", path, *NUMBERS, "-o", tmp_path / "p.yaml")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert str(path) in err
    assert not (tmp_path / "p.yaml").exists()


def test_pickles_are_not_run(run_kascade, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "M_layers_0.npy"
    np.save(path, np.array([[Bomb()]], dtype=object), allow_pickle=True)
    code, _, err = run_kascade("import", path, *NUMBERS, "-o", tmp_path / "p.yaml")
    assert (code, err.count("\n")) == (1, 1)
    assert "Python objects" in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(4, "layer 3, KV head 1 reads head 4, which is out of range 0..3"), (-1, "reads head -1, which is out of range")],
)
def test_heads_out_of_range(run_kascade, map_file, tmp_path, value, message):
    found = public_map([0, 2, 5], 7, 4)
    found[3, 1] = value
    code, _, err = run_kascade("import", map_file(found=found), *NUMBERS, "-o", tmp_path / "p.yaml")
    assert (code, err.count("\n")) == (1, 1)
    assert message in err


@pytest.mark.parametrize(
    ("name", "options", "code", "message"),
    [
        ("map.npy", NUMBERS, 2, "map.npy: no anchors in the file's name (MODEL_layers_0_2_8.npy): pass --anchors"),
        ("M_layers_.npy", NUMBERS, 2, "no anchors in the file's name"),
        ("M_layers_0_2_7.npy", NUMBERS, 2, "layer 7 is not one of the map's 7 layers (0..6)"),
        ("M_layers_0_5_2.npy", NUMBERS, 2, "anchors 0 5 2: they must rise, each once"),
        ("M_layers_0_2_2.npy", NUMBERS, 2, "they must rise"),
        ("M_layers_2_5.npy", NUMBERS, 2, "the first full-attention layer, 0, must be one"),
        ("M_layers_0_2.npy", [], 2, "pass --model, or --query-heads and --head-dim"),
        ("M_layers_0_2.npy", NUMBERS[:2], 2, "pass --model, or --query-heads and --head-dim"),
        ("M_layers_0_2.npy", [*NUMBERS, "--model", "demo"], 2, "--model and --query-heads exclude each other"),
        ("M_layers_0_2.npy", [*NUMBERS, "--bind"], 2, "--bind is for --model"),
        ("M_layers_0_2.npy", [*NUMBERS, "--revision", "x"], 2, "--revision is for --model"),
        ("M_layers_0_2.npy", ["--query-heads", "6", "--head-dim", "4"], 2, "--query-heads 6 is not a multiple of"),
        ("M_layers_0_2.npy", ["--query-heads", "0", "--head-dim", "4"], 2, "--query-heads"),
        ("M_layers_0_2.npy", ["--model", "demo-small"], 1, "7 layers and 4 KV heads, and demo-small has 8 and"),
        ("M_layers_0_2.npy", ["--model", "/nowhere"], 1, "/nowhere"),
        ("M_layers_0_2.npy", [*NUMBERS, "--anchors", "0,x"], 2, "--anchors: '0,x' is not a list of whole numbers"),
        ("M_layers_0_2.npy", [*NUMBERS, "--anchors", "-1,0"], 2, "--anchors -1,0: layers count from 0"),
        ("M_layers_0_2.npy", [*NUMBERS, "--anchors", "0,9"], 2, "layer 9 is not one of the map's 7 layers"),
    ],
)
def test_mistakes_are_one_line(run_kascade, map_file, tmp_path, name, options, code, message):
    got, out, err = run_kascade("import", map_file(name), *options, "-o", tmp_path / "p.yaml")
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "p.yaml").exists()


def test_files_that_are_no_files_and_outputs_that_exist(run_kascade, map_file, tmp_path):
    os.mkfifo(tmp_path / "M_layers_0.npy")
    (tmp_path / "large.npy").write_bytes(bytes(5 << 20))
    for path, message in (
        (tmp_path / "M_layers_0.npy", "not a regular file"),
        (tmp_path, "directory"),
        (tmp_path / "missing.npy", "No such file"),
        (tmp_path / "large.npy", "more than 4194304 bytes"),
    ):
        code, _, err = run_kascade("import", path, *NUMBERS, "-o", tmp_path / "p.yaml")
        assert (code, err.count("\n")) == (1, 1)
        assert message in err
    (tmp_path / "p.yaml").write_text("mine")
    code, _, err = run_kascade("import", map_file(), *NUMBERS, "-o", tmp_path / "p.yaml")
    assert code == 2
    assert "pass --overwrite" in err
    assert (tmp_path / "p.yaml").read_text() == "mine"
    assert run_kascade("import", map_file(), *NUMBERS, "-o", tmp_path / "p.yaml", "--overwrite")[0] == 0
    assert Profile.load(tmp_path / "p.yaml").anchors == [0, 2, 5]


def test_a_hostile_name_is_shown_as_text(run_kascade, map_file, tmp_path):
    path = map_file("\x1b[31m[red]\n_layers_0_2.npy")
    code, _, err = run_kascade("import", path, *NUMBERS, "-o", tmp_path / "p.yaml")
    assert (code, "\x1b" in err) == (0, False)
    code, out, _ = run_kascade("show", tmp_path / "p.yaml")
    assert (code, "\x1b" in out) == (0, False)


def test_damaged_files_are_maps_or_one_line(tmp_path, map_file):
    """400 seeded damages: bits, lengths, and other words in the header, which numpy evaluates as Python."""
    from kascade_cli.analysis.public_maps import read_map
    from kascade_cli.errors import KascadeError

    rng, path = np.random.default_rng(0), map_file()
    good, words = path.read_bytes(), np.frombuffer(b"(){}[],:'0123456789 <|iufbOSUVM\n\\x-", np.uint8)
    refused = valid = 0
    for case in range(400):
        data, place = bytearray(good), int(rng.integers(10, 118))
        if case % 4 == 0:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        elif case % 4 == 1:
            data = data[: int(rng.integers(len(data)))]
        elif case % 4 == 2:
            data[place : place + int(rng.integers(1, 20))] = bytes(rng.choice(words, int(rng.integers(20))))
        else:
            data[place:place] = rng.bytes(int(rng.integers(1, 30)))
        path.write_bytes(data)
        try:
            found = read_map(path)
        except KascadeError as error:
            refused += str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        else:
            valid += 1
            assert found.ndim == 2
            assert ((found >= 0) & (found < found.shape[1])).all()
    assert refused + valid == 400
    assert refused > 250
