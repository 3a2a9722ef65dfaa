"""The capture file: round trip, what readers see at every stage, full disks, foreign and damaged files."""

import contextlib
import json
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

from kascade_cli.capture import store as store_module
from kascade_cli.capture.parts import only_writer
from kascade_cli.capture.store import open_capture, open_store, parts_folder, prompt_id, token_sha256
from kascade_cli.errors import KascadeError, UsageError
from tests.toy_captures import set_attribute

PROMPTS = [list(range(60 + 10 * i)) for i in range(3)]
SHA256 = [token_sha256(tokens) for tokens in PROMPTS]
LAYERS = [1, 3]


def make_meta(**changes):
    return {
        "schema_version": 2, "tool_version": "0", "model_name": "m", "model_fingerprint": "sha256:" + "a" * 64,
        "layers": 4, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "tile": 32, "seed": 0, "dtype": "float32",
        "device": "cpu", "dev_set_name": "words", "dev_set_sha256": "b" * 64, "num_prompts": len(PROMPTS),
        "max_length": 100, "options": {"seed": 0, "tile": 32}, "versions": {"python": "3"}, "top_mass_keys": ["64"],
    } | changes  # fmt: skip


def content(index):
    """Tiles, mass [2, 2, 2, n], importance, top_mass of prompt `index`: noise, so that nothing compresses away."""
    rng = np.random.default_rng(index)
    n = len(PROMPTS[index])
    tiles = np.array([[32, min(32, n - 32)], [n - 1, 1]], np.int32)
    mass = rng.random((2, 2, 2, n))
    for tile, end in enumerate(tiles.sum(axis=1)):
        mass[:, tile, :, end:] = 0
    mass /= mass.sum(axis=-1, keepdims=True)
    return tiles, mass.astype(np.float16), rng.random(2), rng.random((2, 4, 1))


def write(store, index):
    tiles, mass, importance, top = content(index)
    writer = store.begin(index, PROMPTS[index], tiles, len(PROMPTS[index]))
    for layer in range(2):
        for tile in range(2):
            writer.write_mass(layer, tile, mass[layer, tile : tile + 1])
    writer.finish(importance, top)


def check(capture, indices):
    assert capture.prompts == [prompt_id(index) for index in indices]
    for index, prompt in zip(indices, capture, strict=True):
        tiles, mass, importance, top = content(index)
        assert (prompt.n_tokens, prompt.n_prompt_tokens) == (len(PROMPTS[index]), len(PROMPTS[index]))
        assert prompt.token_ids_sha256 == SHA256[index]
        assert prompt.mass.chunks == (1, 1, 2, prompt.n_tokens)
        np.testing.assert_array_equal(prompt.tiles, tiles)
        np.testing.assert_array_equal(prompt.importance, importance.astype(np.float32))
        np.testing.assert_array_equal(prompt.top_mass, top.astype(np.float32))
        for t in range(2):
            assert prompt.read_tile(t).dtype == np.float16
            np.testing.assert_array_equal(prompt.read_tile(t), mass[:, t])


@contextlib.contextmanager
def file_size_limit(size):
    """Real failing writes: beyond `size` bytes of a file the system answers EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_capture(path, **changes):
    with open_store(path, make_meta(**changes), LAYERS, SHA256) as store:
        for index in store.remaining:
            write(store, index)
        store.join()


def test_round_trip_and_what_a_reader_sees_on_the_way(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        with open_capture(path) as capture:
            check(capture, [])
        for index in range(3):
            assert store.remaining == list(range(index, 3))
            write(store, index)
            with open_capture(path) as capture:
                check(capture, range(index + 1))
                assert capture.complete == (index == 2)
                assert capture.has_parts
        store.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.h5"]
    with open_capture(path) as capture:
        check(capture, range(3))
        assert capture.complete
        assert not capture.has_parts
        assert capture.profiled_layers == LAYERS
        assert capture.meta == make_meta()
    with h5py.File(path) as file:
        for name in ("profiled_layers", *(f"prompts/000000/{n}" for n in ("mass", "tiles", "importance", "top_mass"))):
            assert (file[name].compression, file[name].shuffle, file[name].fletcher32) == ("gzip", True, True)
        np.testing.assert_array_equal(file["prompts/000002/mass"][:], content(2)[1])  # as any HDF5 library reads it
        assert file["prompts/000000"].attrs["complete"]
        assert json.loads(file.attrs["options"]) == {"seed": 0, "tile": 32}


def test_reading_imports_no_torch():
    code = "import sys, kascade_cli.capture.store; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rows_of_tokens_that_were_never_generated_are_dropped(tmp_path):
    path = tmp_path / "c.h5"
    mass = np.random.default_rng(0).random((4, 2, 62))
    mass[0, :, 60:] = mass[1, :, 61:] = 0
    mass = (mass / mass.sum(axis=-1, keepdims=True)).astype(np.float16)
    tiles = np.array([[59, 1], [60, 1], [61, 1], [62, 1]], np.int32)
    with open_store(path, make_meta(num_prompts=1), [0], SHA256[:1]) as store:
        writer = store.begin(0, PROMPTS[0], tiles, 63)
        for tile in range(2):
            writer.write_mass(0, tile, mass[tile : tile + 1, :, : 60 + tile])
        writer.finish(np.ones(1), np.ones((1, 4, 1)), n_tokens=61)
        store.join()
    with open_capture(path) as capture:
        (prompt,) = capture
        assert (prompt.n_prompt_tokens, prompt.n_tokens) == (60, 61)
        assert prompt.mass.chunks == (1, 1, 2, 61)
        assert prompt.tiles.tolist() == [[59, 1], [60, 1]]
        for tile in range(2):
            np.testing.assert_array_equal(prompt.read_tile(tile)[0, :, : 60 + tile], mass[tile, :, : 60 + tile])
        assert not prompt.read_tile(0)[..., 60:].any()


def test_an_existing_output_is_refused_with_what_it_is(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
    with (
        pytest.raises(UsageError, match=r"unfinished capture \(1 of 3 prompts\); pass --resume"),
        open_store(path, make_meta(), LAYERS, SHA256),
    ):
        pass
    with open_store(path, make_meta(), LAYERS, SHA256, resume=True) as store:
        assert store.remaining == [1, 2]
        write(store, 1)
        write(store, 2)
        store.join()
    with pytest.raises(UsageError, match="complete capture"), open_store(path, make_meta(), LAYERS, SHA256):
        pass
    with open_store(path, make_meta(), LAYERS, SHA256, resume=True) as store:
        assert store.remaining == []
    (tmp_path / "other").write_text("notes")
    with (
        pytest.raises(UsageError, match="not a capture; pass --overwrite"),
        open_store(tmp_path / "other", make_meta(), LAYERS, SHA256),
    ):
        pass


def test_overwrite_forgets_the_old_parts(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
    with open_store(path, make_meta(), LAYERS, SHA256, overwrite=True) as store:
        assert store.remaining == [0, 1, 2]
        with open_capture(path) as capture:
            assert capture.prompts == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_fingerprint": "sha256:" + "c" * 64, "model_name": "n"}, r"the model was m \(.*, now n \("),
        ({"options": {"seed": 1, "tile": 32}}, "--seed was 0, now 1"),
        ({"options": {"seed": 0, "tile": 32, "max_length": 9}}, "--max-length was not given, now 9"),
        ({"dev_set_sha256": "d" * 64, "dev_set_name": "x.jsonl"}, r"the dev set was \(words, .*now \(x.jsonl"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_resuming_something_else_names_the_difference(tmp_path, changes, line, finished):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        for index in range(3 if finished else 1):
            write(store, index)
        if finished:
            store.join()
    before = path.read_bytes()
    with pytest.raises(UsageError, match=line), open_store(path, make_meta(**changes), LAYERS, SHA256, resume=True):
        pass
    assert path.read_bytes() == before


def test_parts_of_another_capture_are_not_taken_over(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
    path.unlink()
    with open_store(path, make_meta(options={"seed": 1}), LAYERS, SHA256, resume=True) as store:
        assert store.remaining == [0, 1, 2]


def test_a_damaged_part_is_captured_again(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
        write(store, 1)
    part = parts_folder(path) / "000000.h5"
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with open_capture(path) as capture:
        check(capture, [1])
    with open_store(path, make_meta(), LAYERS, SHA256, resume=True) as store:
        assert store.remaining == [0, 2]
        write(store, 0)
        write(store, 2)
        store.join()
    with open_capture(path) as capture:
        check(capture, range(3))


def test_a_full_disk_loses_no_finished_prompt(tmp_path):
    """Writing fails while a prompt is stored, again and again; the process lives, and resumes with room."""
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
        for limit in range(0, 3000, 300):
            with file_size_limit(limit), pytest.raises(OSError, match="too large"):
                write(store, 1)
            assert store.done == [0]
            assert sorted(file.name for file in store.parts.iterdir()) == ["000000.h5", "lock"]
            with open_capture(path) as capture:
                check(capture, [0])
        write(store, 1)
        write(store, 2)
        size = sum(store.part(index).stat().st_size for index in range(3))
        with file_size_limit(size), pytest.raises(OSError, match="too large"):
            store.join()
        with open_capture(path) as capture:
            check(capture, range(3))
    with open_store(path, make_meta(), LAYERS, SHA256, resume=True) as store:
        assert store.remaining == []
        store.join()
    with open_capture(path) as capture:
        check(capture, range(3))
        assert not capture.has_parts


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        with (
            pytest.raises(KascadeError, match="another process"),
            open_store(path, make_meta(), LAYERS, SHA256, resume=True),
        ):
            pass
        write(store, 0)
    with only_writer(parts_folder(path), "c.h5"):
        pass


def foreign_files(folder):
    make_capture(folder / "good.h5")
    data = (folder / "good.h5").read_bytes()
    (folder / "truncated.h5").write_bytes(data[:-1000])
    (folder / "text.h5").write_text("not HDF5 at all")
    (folder / "empty.h5").write_bytes(b"")
    with h5py.File(folder / "foreign.h5", "w") as file:
        file["x"] = np.arange(3)
    for name, change in (
        ("newer.h5", lambda f: f.attrs.__setitem__("schema_version", 3)),
        ("older.h5", lambda f: f.attrs.__setitem__("schema_version", 1)),
        ("no-model.h5", lambda f: f.attrs.__delitem__("model_name")),
        ("no-layers.h5", lambda f: f.__delitem__("profiled_layers")),
        ("no-prompts.h5", lambda f: f.__delitem__("prompts")),
        ("bad-json.h5", lambda f: set_attribute(f, "options", "{")),
    ):
        (folder / name).write_bytes(data)
        with h5py.File(folder / name, "r+") as file:
            change(file)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("missing.h5", "no such file"),
        (".", "not a file"),
        ("truncated.h5", "truncated"),
        ("text.h5", "not an HDF5 file"),
        ("empty.h5", "not an HDF5 file"),
        ("foreign.h5", "not a capture"),
        ("newer.h5", "capture format 3"),
        ("older.h5", "made by an older version of kascade: capture again"),
        ("no-model.h5", "model_name is missing"),
        ("no-layers.h5", "not a capture"),
        ("no-prompts.h5", "not a capture"),
        ("bad-json.h5", "not a capture"),
    ],
)
def test_foreign_and_damaged_files_get_one_line(tmp_path, name, line):
    foreign_files(tmp_path)
    with pytest.raises(KascadeError, match=line) as caught:
        open_capture(tmp_path / name)
    assert "\n" not in str(caught.value)
    if (tmp_path / name).is_file():
        with (
            pytest.raises(KascadeError, match=line),
            open_store(tmp_path / name, make_meta(), LAYERS, SHA256, resume=True),
        ):
            pass


def test_damaged_data_name_the_prompt(tmp_path):
    path = tmp_path / "c.h5"
    make_capture(path)
    with h5py.File(path) as file:
        offset = file["prompts/000001/mass"].id.get_chunk_info_by_coord((0, 1, 0, 0)).byte_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 16] = b"\xff" * 16
    path.write_bytes(data)
    with open_capture(path) as capture:
        prompt = capture.prompt("000001")
        assert prompt.read_tile(0).any()
        with pytest.raises(KascadeError, match="prompt 000001, layer 1, tile 1: unreadable, the file is damaged"):
            prompt.read_tile(1)


def test_names_that_the_package_offers():
    assert all(hasattr(store_module, name) for name in store_module.__all__)
