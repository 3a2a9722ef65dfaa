"""Writing: whole or not at all, nothing left behind, nothing replaced unasked."""

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import types

import pytest

from kascade_cli import files
from kascade_cli.errors import KascadeError, UsageError


@pytest.fixture(params=["no name", "temporary name", "no links"])
def way(request, monkeypatch):
    """The ways of writing: files without a name (Linux), a temporary name, and that on a disk without hard links."""
    if request.param != "no name":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if request.param == "no links":

        def refuse(*_, **__):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_output_checks(tmp_path):
    with pytest.raises(UsageError, match="create it first"):
        files.check_output(tmp_path / "no" / "file", False)
    with pytest.raises(UsageError, match="is a folder"):
        files.check_output(tmp_path, True)
    (tmp_path / "a").write_text("old")
    with pytest.raises(UsageError, match="a exists; pass --overwrite"):
        files.check_output(tmp_path / "a", False)
    assert files.check_output(tmp_path / "a", True) == tmp_path / "a"
    assert names(tmp_path) == ["a"]


def test_a_link_to_nothing_counts_as_an_existing_output(tmp_path, way):
    link, target = tmp_path / "out.yaml", tmp_path / "elsewhere.yaml"
    link.symlink_to(target)
    with pytest.raises(UsageError, match="is a link to a file that is not there; pass --overwrite"):
        files.check_output(link, False)
    with pytest.raises(UsageError, match="is a link to a file that is not there"):
        files.atomic_write(link, "text", overwrite=False)
    assert link.is_symlink()
    files.atomic_write(link, "text", overwrite=True)  # the link is replaced, nothing written where it led
    assert not link.is_symlink()
    assert names(tmp_path) == ["out.yaml"]
    folder = tmp_path / "plots"
    folder.symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="a link to nothing; name a folder"):
        files.check_output_folder(folder)


@pytest.mark.parametrize("name", ["x" * 300, "ä" * 200, "a/" * 2100 + "b", "nul\x00name", "half\ud800name"])
def test_names_that_no_file_can_have(tmp_path, name):
    for check in (lambda: files.check_output(tmp_path / name, False), lambda: files.check_output_folder(name)):
        with pytest.raises(UsageError) as error:
            check()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400
        str(error.value).encode()
    files.check_name(tmp_path / ("x" * 255))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused():
    # /proc takes no files from anyone, root included
    with pytest.raises(UsageError, match="cannot write into the folder /proc: ") as error:
        files.check_output("/proc/profile.yaml", False)
    assert "\n" not in str(error.value)
    with pytest.raises(KascadeError, match="cannot write /proc/profile.yaml: "):
        files.atomic_write("/proc/profile.yaml", "text")


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, way):
    target = tmp_path / "file"
    files.atomic_write(target, "one")
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~current_umask()
    real, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        raise OSError("disk broken")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KascadeError, match="cannot write .*file: disk broken"):
        files.atomic_write(target, "two")
    assert calls
    monkeypatch.setattr(os, "fsync", real)
    assert target.read_text() == "one"
    assert names(tmp_path) == ["file"]
    files.atomic_write(target, b"three")
    assert target.read_bytes() == b"three"
    assert names(tmp_path) == ["file"]


def test_a_name_of_255_bytes_can_be_written_and_replaced(tmp_path, way):
    target = tmp_path / ("n" * 255)
    for text in ("one", "two"):
        files.atomic_write(target, text)
        assert target.read_text() == text
    assert names(tmp_path) == [target.name]


def test_half_characters_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(KascadeError, match="half a character"):
        files.atomic_write(tmp_path / "f", "a\ud800b")
    assert names(tmp_path) == []


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("number", "free", "said"),
    [
        (errno.ENOSPC, 7, "the disk is full"),
        (errno.ENOSPC, 0, "the disk has no free inodes"),
        (errno.EDQUOT, 0, "the disk quota is used up"),
        (errno.EACCES, 0, os.strerror(errno.EACCES)),
    ],
)
def test_why_a_disk_takes_no_more(tmp_path, monkeypatch, number, free, said):
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_files=100, f_favail=free))
    assert said in files.disk_reason(OSError(number, os.strerror(number)), tmp_path)
    # btrfs and the like count no inodes: 0 of 0 is not "none left"
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_files=0, f_favail=0))
    assert files.disk_reason(OSError(errno.ENOSPC, "x"), tmp_path) == "the disk is full"


def _write(path, text, barrier, answers):
    barrier.wait()
    try:
        files.atomic_write(path, text, overwrite=False)
        answers.put(text)
    except UsageError as error:
        answers.put(str(error))


def test_of_two_writers_at_once_one_is_refused(tmp_path, way):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        path = tmp_path / f"{attempt}.yaml"
        barrier, answers = context.Barrier(3), context.Queue()
        writers = [context.Process(target=_write, args=(path, f"text {n}", barrier, answers)) for n in range(3)]
        for writer in writers:
            writer.start()
        said = [answers.get(timeout=30) for _ in writers]
        for writer in writers:
            writer.join()
        won = [text for text in said if text.startswith("text")]
        assert len(won) == 1
        assert path.read_text() == won[0]
        assert all("exists; pass --overwrite" in text for text in said if text not in won)


def _stop_in_the_middle(folder, *, nameless):
    code = (
        "import os, sys, time\n"
        "from kascade_cli import files\n"
        f"{'' if nameless else 'del os.O_TMPFILE'}\n"
        "def stay(_):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "os.fsync = stay\n"
        f"files.atomic_write({str(folder / 's.yaml')!r}, 'text')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_writer_leaves_no_file(tmp_path):
    if not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no files without a name")
    _stop_in_the_middle(tmp_path, nameless=True)
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_and_nothing_else(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    _stop_in_the_middle(tmp_path, nameless=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".s.yaml.")
    others = [tmp_path / ".s.yaml.mine", tmp_path / ".t.yaml.0123456789ab.kascade", tmp_path / "s.yaml.kascade"]
    living = tmp_path / ".s.yaml.00112233aabb.kascade"
    for path in (*others, living):
        path.write_text("x")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with living.open("r+") as file:  # as another process that is still writing
        fcntl.flock(file, fcntl.LOCK_EX)
        files.atomic_write(tmp_path / "s.yaml", "text")
    assert names(tmp_path) == sorted([*(path.name for path in others), living.name, "s.yaml"])


def test_a_file_swept_away_too_early_is_made_again(tmp_path, monkeypatch):
    """Another process may take the new file for a dead one's before it is locked."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    real, swept = files._lock, []

    def lock(handle, *, wait):
        if wait and not swept:
            swept.extend(path for path in tmp_path.iterdir())
            swept[0].unlink()
        return real(handle, wait=wait)

    monkeypatch.setattr(files, "_lock", lock)
    files.atomic_write(tmp_path / "f", "text")
    assert swept
    assert (tmp_path / "f").read_text() == "text"
    assert names(tmp_path) == ["f"]
