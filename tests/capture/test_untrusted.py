"""Captures that someone damaged or made up: every one is refused in one line that names the place."""

import contextlib
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from kascade_cli.analysis.similarity import measure
from kascade_cli.capture.plausible import row_tolerance
from kascade_cli.capture.store import open_capture
from kascade_cli.errors import KascadeError
from tests.toy_captures import random_prompt, reseal, set_array, set_attribute, write_capture

TILES = [(32, 32), (64, 31), (90, 1), (96, 1)]


def make(path, count=2, **options):
    rng = np.random.default_rng(0)
    prompts = [random_prompt(rng, layers=3, heads=2, n_tokens=97 + i, tiles=TILES) for i in range(count)]
    return write_capture(path, prompts, profiled_layers=[1, 3, 4], layers=6, **options)


def refused(path):
    """The line with which select-anchors' reading refuses `path`."""
    with pytest.raises(KascadeError) as caught:
        measure(path, top_k=5)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


def root(name, value):
    return lambda file: set_attribute(file, name, value)


def array(name, values, **options):
    def change(file):
        where, _, leaf = name.rpartition("/")
        set_array(
            file[where or "/"], leaf, np.asarray(values(file[name][()]) if callable(values) else values), **options
        )

    return change


def entry(name, index, value):
    def put(values):
        values[index] = value
        return values

    return array(name, put)


MASS, TILE, TOP, WEIGHT = (f"prompts/000001/{name}" for name in ("mass", "tiles", "top_mass", "importance"))
FULL = np.float16(1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (root("tile", 0), "attribute tile is 0, not between 2"),
        (root("tile", 10**18), "attribute tile is 10"),
        (root("layers", 2), r"profiled_layers \(1 3 4\) are not layers of a model of 2"),
        (root("layers", 2**62), "attribute layers is 4611686018427387904, not between 1 and 1024"),
        (root("kv_heads", 3), "4 query heads do not share 3 KV heads evenly"),
        (root("num_prompts", 1), "prompts/000001 is none of its 1 prompts"),
        (root("layers", "six"), "attribute layers is not a whole number"),
        (root("model_name", 3), "attribute model_name is not text"),
        (root("model_name", np.arange(3)), "attribute model_name is not a single value"),
        (root("model_name", "m" * 5000), "attribute model_name is longer than 4096 bytes"),
        (root("options", "[1]"), "attribute options is not a table"),
        (root("versions", '{"numpy": [1]}'), "attribute versions is not a table"),
        (root("options", "[" * 20000), "attribute options: damaged"),
        (root("top_mass_keys", '["64", "64"]'), "top_mass_keys is not a list of counts"),
        (array("profiled_layers", np.array([1, 1, 3], np.int32)), "profiled_layers .* each once in order"),
        (array("profiled_layers", np.array([1, 3, 6], np.int32)), "profiled_layers .* are not layers of a model of 6"),
        (
            array("profiled_layers", np.array([-1, 3, 4], np.int32)),
            "profiled_layers .* are not layers of a model of 6",
        ),
        (array("profiled_layers", np.array([1, 3, 4], np.int64)), "profiled_layers is not int32"),
        (array(MASS, lambda m: m.astype(np.float32)), "prompt 000001: mass is not float16"),
        (array(MASS, lambda m: m.view(np.int16)), "prompt 000001: mass is not float16"),
        (array(MASS, lambda m: m.astype(">f2")), "prompt 000001: mass is not float16"),
        (array(MASS, lambda m: m[..., :-1]), "prompt 000001: mass has shape"),
        (array(MASS, lambda m: m[0]), "prompt 000001: mass has shape"),
        (array(MASS, lambda m: m, compression="lzf"), "mass is not stored with shuffle, gzip and Fletcher32"),
        (array(MASS, lambda m: m, chunks=(3, 4, 2, 98)), "mass has chunks"),
        (entry(MASS, (slice(None), 3), 0), "prompt 000001, layer 1, tile 3, head 0: the mass sums to 0, not to 1"),
        (array(MASS, lambda m: m / 2), "prompt 000001, layer 1, tile 0, head 0: the mass sums to 0.5, not to 1"),
        (entry(MASS, (2, 1, 1, 5), FULL), "prompt 000001, layer 4, tile 1, head 1: the mass sums to"),
        (entry(MASS, (1, 0, 1, 64), np.float16(1e-7)), "prompt 000001, layer 3, tile 0: mass on keys after"),
        (entry(MASS, (1, 2, 1, 64), -FULL), "prompt 000001, layer 3, tile 2: NaN, infinity or negative"),
        (entry(MASS, (1, 2, 1, 64), np.inf), "prompt 000001, layer 3, tile 2: NaN, infinity or negative"),
        (entry(TILE, (3, 0), 98), "prompt 000001, tile 3: lies outside its 98 tokens"),
        (entry(TILE, (0, 1), 33), "prompt 000001, tile 0: 33 queries, more than the 32"),
        (entry(TILE, 3, (90, 1)), "prompt 000001: a tile is there twice"),
        (entry(TILE, (0, 0), -(2**31)), "prompt 000001, tile 0: lies outside"),
        (entry(WEIGHT, 1, -0.5), "prompt 000001, layer 3: importance is -0.5, not between 0 and 2"),
        (entry(WEIGHT, 2, 1e38), "prompt 000001, layer 4: importance is 1e[+]38"),
        (entry(WEIGHT, 0, np.nan), "prompt 000001, layer 1: importance is nan"),
        (entry(TOP, (1, 2, 3), 1.5), "prompt 000001, layer 3: top mass is 1.5, not between 0 and 1"),
        (array(TOP, lambda t: t[:, :2]), r"top_mass has shape \(3, 2, 5\), not \(3, 4, 5\)"),
        (lambda f: f["prompts/000001"].attrs.__setitem__("n_tokens", 10**12), "1000000000000 tokens"),
        (lambda f: f["prompts/000001"].attrs.__setitem__("n_tokens", "x"), "n_tokens is not a whole number"),
        (lambda f: f["prompts/000001"].attrs.__delitem__("n_tokens"), "attribute n_tokens is missing"),
        (lambda f: f.move("prompts/000001", "prompts/one"), "prompts/one is none of its 2 prompts"),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(tmp_path, change, line):
    path = make(tmp_path / "c.h5")
    with h5py.File(path, "r+") as file:
        change(file)
        seal(file)
    with pytest.raises(KascadeError, match=line) as caught:
        measure(path, top_k=5)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def seal(file):
    """As one who knows the seals would, where the content allows it: so that the check behind them is reached."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError):
        reseal(file)


def test_an_untouched_capture_is_read(tmp_path):
    assert measure(make(tmp_path / "c.h5"), top_k=5).prompts == 2


@pytest.mark.parametrize("name", ["model_name", "dev_set_sha256", "dtype"])
def test_a_changed_attribute_breaks_the_seal(tmp_path, name):
    path = make(tmp_path / "c.h5")
    with h5py.File(path, "r+") as file:
        set_attribute(file, name, "other")
    assert "its attributes were changed" in refused(path)


def test_a_prompt_twice_or_of_another_capture_is_refused(tmp_path):
    path, other = make(tmp_path / "c.h5"), make(tmp_path / "d.h5", dev_set_sha256="c" * 64)
    with h5py.File(path, "r+") as file:
        del file["prompts/000001"]
        file["prompts/000001"] = file["prompts/000000"]
    assert "prompt 000001: it is of another capture or place" in refused(path)
    with h5py.File(path, "r+") as file, h5py.File(other) as source:
        del file["prompts/000001"]
        source.copy("prompts/000001", file["prompts"])
    assert "prompt 000001: it is of another capture or place" in refused(path)


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """One flip in each of 300 places all over the file: refused, or the same result to the bit."""
    path = make(tmp_path / "c.h5")
    wanted = measure(path, top_k=5)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    lines = []
    for place in rng.choice(len(data), 300, replace=False):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            found = measure(path, top_k=5)
        except KascadeError as error:
            lines.append(str(error))
            continue
        assert found.meta == wanted.meta
        assert found.profiled_layers == wanted.profiled_layers
        for one, two in ((found.sim, wanted.sim), (vars(found), vars(wanted))):
            for name in ("decode", "prefill", "importance", "top_mass"):
                if name in one:
                    np.testing.assert_array_equal(one[name], two[name])
    assert len(lines) > 100
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("name", ["mass", "tiles", "importance", "top_mass"])
def test_every_dataset_has_a_checksum(tmp_path, name):
    path = make(tmp_path / "c.h5")
    with h5py.File(path) as file:
        info = file[f"prompts/000001/{name}"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[info.byte_offset + info.size // 2] ^= 4
    path.write_bytes(data)
    assert "prompt 000001" in refused(path)


def test_links_to_elsewhere_are_refused_and_not_followed(tmp_path):
    """A FIFO would block whoever opens it; the time limit of the process notices."""
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "raw")
    made = []
    for number, link in enumerate(
        [
            h5py.ExternalLink("fifo", "/prompts/000001"),
            h5py.ExternalLink("../fifo", "/"),
            h5py.SoftLink("/prompts/000000"),
        ]
    ):
        path = make(tmp_path / f"link{number}.h5")
        with h5py.File(path, "r+") as file:
            del file["prompts/000001"]
            file["prompts"]["000001"] = link
        made.append((path, "link to somewhere else"))
    for name, text in (("prompts", "prompts is a link"), ("profiled_layers", "profiled_layers is a link")):
        path = make(tmp_path / f"{name}.h5")
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = h5py.ExternalLink("fifo", "/")
        made.append((path, text))
    path = make(tmp_path / "virtual.h5")
    with h5py.File(path, "r+") as file:
        shape = file[MASS].shape
        layout = h5py.VirtualLayout(shape, "f2", maxshape=(None, *shape[1:]))
        source = h5py.VirtualSource(str(tmp_path / "fifo"), "x", shape, "f2", maxshape=(None, *shape[1:]))
        layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
        del file[MASS]
        file.create_virtual_dataset(MASS, layout)
    made.append((path, "mass is not stored in chunks"))
    path = make(tmp_path / "external.h5")
    with h5py.File(path, "r+") as file:
        shape = file[MASS].shape
        del file[MASS]
        file.create_dataset(MASS, shape, "f2", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
    made.append((path, "mass is not stored in chunks"))
    code = (
        "import sys\nfrom kascade_cli.analysis.similarity import measure\n"
        "from kascade_cli.errors import KascadeError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        measure(path)\n    except KascadeError as error:\n        print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *(str(path) for path, _ in made)], capture_output=True, text=True, timeout=60
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert len(lines) == len(made)
    for line, (path, text) in zip(lines, made, strict=True):
        assert line.startswith(str(path))
        assert text in line
    assert measure(make(tmp_path / "good.h5"), top_k=5).prompts == 2


def test_a_gigantic_shape_is_refused_before_anything_of_that_size_is_made(tmp_path):
    path = make(tmp_path / "c.h5")
    with h5py.File(path, "r+") as file:
        del file[MASS]
        shape = (3, 4, 2, 1 << 27)
        file.create_dataset(
            MASS, shape, "f2", chunks=(1, 1, *shape[2:]), compression="gzip", shuffle=True, fletcher32=True
        )
        file["prompts/000001"].attrs["n_tokens"] = shape[-1]
        reseal(file)
    assert "prompt 000001: mass has shape (3, 4, 2, 134217728), but not the data for it" in refused(path)


def test_a_chunk_that_inflates_to_more_than_its_size_is_refused(tmp_path):
    import zlib

    path = make(tmp_path / "c.h5")
    bomb = zlib.compress(bytes(50 << 20), 9)
    with h5py.File(path, "r+") as file:
        stored = file[MASS]
        stored.id.write_direct_chunk((0, 0, 0, 0), bomb + bytes(4))
        stored.id.write_direct_chunk((0, 1, 0, 0), zlib.compress(bytes(2 * 98 * 2 + 2)) + bytes(4))
    assert "layer 1, tile 0: missing data, or data of a wrong size" in refused(path)
    with open_capture(path) as capture, pytest.raises(KascadeError, match="tile 1: unreadable, .*another length"):
        capture.prompt("000001").read_tile(1)


def test_data_that_were_never_written_are_missed(tmp_path):
    path = make(tmp_path / "c.h5")
    with h5py.File(path, "r+") as file:
        shape, old = file[MASS].shape, file[MASS][()]
        del file[MASS]
        new = file.create_dataset(
            MASS, shape, "f2", chunks=(1, 1, *shape[2:]), compression="gzip", shuffle=True, fletcher32=True
        )
        new[:, :3] = old[:, :3]
    assert "layer 1, tile 3: missing data" in refused(path)


@pytest.mark.parametrize("keys", [33, 4000, 120_000])
def test_rows_as_the_probe_stores_them_pass(keys):
    """The tolerance holds what rounding to 7 bits does, flat and peaked; a row that lost 2 % does not pass."""
    torch = pytest.importorskip("torch")
    from kascade_cli.capture.mass import round_mass

    for scale in (0.0, 1.0, 6.0):
        logits = torch.randn(16, keys, generator=torch.Generator().manual_seed(keys)) * scale
        stored = round_mass(torch.softmax(logits, -1)).float().sum(-1)
        assert (stored - 1).abs().max() < row_tolerance(keys)
    assert row_tolerance(keys) < 0.01


def test_names_stay_data(tmp_path):
    """Whatever a name holds is read back as it is; JSON keeps its types."""
    name = "a[/b]\x1b[31m \u202e\u00e9.jsonl"
    path = make(tmp_path / "c.h5", dev_set_name=name, options=json.dumps({"text_field": "\ud800", "n": 3}))
    with open_capture(path) as capture:
        assert capture.meta["dev_set_name"] == name
        assert capture.meta["options"] == {"text_field": "\ud800", "n": 3}
