"""What a capture may delete: its own parts, and nothing that belongs to anybody else."""

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest

from kascade_cli.capture import durable, parts
from kascade_cli.capture.durable import disk_reason
from kascade_cli.capture.format import fletcher32
from kascade_cli.capture.run import CaptureOptions
from kascade_cli.capture.store import describe_existing, open_capture, open_store, parts_folder
from kascade_cli.errors import KascadeError, UsageError
from tests.capture.test_store import LAYERS, SHA256, check, make_capture, make_meta, write


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attempt(path, **flags):
    with open_store(path, make_meta(), LAYERS, SHA256, **flags) as store:
        store.discard_if_empty()


@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}, {}])
@pytest.mark.parametrize("kind", ["folder", "notes", "symlink", "file", "marked"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, flags, kind):
    """Nothing in it is touched, whatever its files are called."""
    path, mine = tmp_path / "c.h5", tmp_path / "mine"
    folder = parts_folder(path)
    if kind == "file":
        folder.write_text("a file")
    else:
        mine.mkdir()
        (mine / "000000.h5").write_text("my data")
        (mine / ("notes.txt" if kind in ("notes", "marked") else "index.tmp")).write_text("my notes")
        if kind == "marked":
            (mine / "lock").write_bytes(parts.MARKER)
        if kind == "symlink":
            (mine / "notes.txt").rename(mine / "000001.h5") if (mine / "notes.txt").exists() else None
            folder.symlink_to(mine)
        else:
            mine.rename(folder)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"symbolic link|not a folder that kascade made|in the way") as caught:
        attempt(path, **flags)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}, {}])
@pytest.mark.parametrize("dangling", [True, False])
def test_an_output_that_is_a_symlink_is_refused(tmp_path, flags, dangling):
    target, path = tmp_path / "target.h5", tmp_path / "c.h5"
    if not dangling:
        make_capture(target)
    path.symlink_to(target)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"c.h5 is a symbolic link"):
        attempt(path, **flags)
    assert path.is_symlink()
    assert snapshot(tmp_path) == before


def test_a_symlink_among_the_parts_is_refused_and_not_followed(tmp_path):
    path, other = tmp_path / "c.h5", tmp_path / "other.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
        write(store, 1)
    part = parts_folder(path) / "000000.h5"
    part.rename(other)
    part.symlink_to(other)
    before = other.read_bytes()
    with pytest.raises(UsageError, match="not a folder that kascade made"):
        attempt(path, overwrite=True)
    with pytest.raises(KascadeError, match=r"000000.h5 is not a plain file"):
        open_capture(path)
    assert other.read_bytes() == before


def test_our_own_leftovers_go(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
    (parts_folder(path) / "000001.tmp").write_text("half a prompt")
    attempt(path, overwrite=True)
    assert list(tmp_path.iterdir()) == []
    parts_folder(path).mkdir()  # killed right after it was made
    attempt(path, resume=True)
    (parts_folder(path)).mkdir()
    (parts_folder(path) / "lock").touch()  # or right before it was marked
    attempt(path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_what_appears_in_the_folder_meanwhile_stays(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        for index in range(3):
            write(store, index)
        (store.parts / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match="holds 'notes.txt'"):
            store.join()
    assert (parts_folder(path) / "notes.txt").read_text() == "mine"
    with open_capture(path) as capture:
        check(capture, range(3))
        assert not capture.has_parts


def test_a_rerun_says_that_resume_finishes_the_joining(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        for index in range(3):
            write(store, index)
    with pytest.raises(UsageError, match="all 3 prompts, but was stopped while joining them; pass --resume to finish"):
        attempt(path)
    with open_store(path, make_meta(), LAYERS, SHA256, resume=True) as store:
        store.join()
    assert "is a complete capture" in describe_existing(path)
    parts_folder(path).mkdir()  # killed between the joining and the removal
    assert "pass --resume to finish" in describe_existing(path)
    with open_store(path, make_meta(), LAYERS, SHA256, resume=True) as store:
        assert store.remaining == []
    assert not parts_folder(path).exists()


def test_two_at_once_are_told_so(tmp_path):
    path = tmp_path / "c.h5"
    with open_store(path, make_meta(), LAYERS, SHA256) as store:
        write(store, 0)
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(KascadeError, match="another process is writing .*c.h5"):
                attempt(path, **flags)
        with open_capture(path) as capture:
            check(capture, [0])


def test_one_who_waited_for_the_lock_does_not_write_over_the_other(tmp_path, monkeypatch):
    """Between the look at `path` and the lock another process makes the whole capture."""
    path = tmp_path / "c.h5"
    lock, raced = parts._lock, []

    def slow(file, what):
        if not raced:
            raced.append(True)
            os.unlink(parts_folder(path) / "lock")
            os.rmdir(parts_folder(path))
            make_capture(path)
        lock(file, what)

    monkeypatch.setattr(parts, "_lock", slow)
    with pytest.raises(UsageError, match="is a complete capture"):
        attempt(path)
    with open_capture(path) as capture:
        check(capture, range(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.h5"]


@pytest.mark.parametrize(
    ("number", "inodes", "text"),
    [
        (errno.ENOSPC, 5, "the disk is full"),
        (errno.ENOSPC, 0, "out of inodes"),
        (errno.EDQUOT, 5, "quota"),
        (errno.EFBIG, 5, "larger than this system allows"),
        (errno.EACCES, 5, "cannot write (Permission denied)"),
    ],
)
def test_a_full_disk_is_called_full_only_if_it_is(tmp_path, monkeypatch, number, inodes, text):
    room = SimpleNamespace(f_files=100, f_favail=inodes, f_bavail=10)
    monkeypatch.setattr(durable.os, "statvfs", lambda path: room)
    reason = disk_reason(OSError(number, os.strerror(number)), tmp_path)
    assert text in reason
    assert ("disk is full" in reason) == (text == "the disk is full")


@pytest.mark.parametrize(
    ("name", "value"), [("tile", 10**20), ("seed", 10**23), ("seed", -1), ("max_length", 1 << 40), ("num_prompts", 0)]
)
def test_numbers_that_the_file_cannot_hold_are_refused_first(name, value):
    option = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"{option} must be between"):
        CaptureOptions(**{"num_prompts": 1, "max_length": 9} | {name: value})


@pytest.mark.parametrize("size", [1, 2, 3, 719, 720, 721, 4097, 100_001])
@pytest.mark.parametrize("fill", [None, 0, 255])
def test_fletcher32_is_that_of_hdf5(tmp_path, size, fill):
    import h5py

    data = np.random.default_rng(size).integers(0, 256, size, np.uint8) if fill is None else np.full(size, fill, "u1")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=data, chunks=data.shape, fletcher32=True)
        _, stored = file["x"].id.read_direct_chunk((0,))
    assert stored == data.tobytes() + fletcher32(data.tobytes()).to_bytes(4, "little")
