import os
import stat

import pytest

from kascade_cli import console
from kascade_cli.errors import KascadeError, UsageError


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("32k", 32768), ("1K", 1024), ("2m", 2 * 1024**2), (7, 7)]
)
def test_sizes(text, value):
    assert console.parse_size(text) == value
    assert console.parse_size(console.format_size(value)) == value


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5k", "ten", "1 k", "0k"])
def test_bad_sizes(text):
    with pytest.raises(UsageError, match="not a size"):
        console.parse_size(text)


def test_lists():
    assert console.parse_sizes("1k,2k") == [1024, 2048]
    with pytest.raises(UsageError, match="^--batch: '0' is not a size: use a whole number, 1 or more"):
        console.parse_sizes("4,0", "--batch")
    assert console.parse_floats("0.05,0.1") == [0.05, 0.1]
    assert console.parse_ints("0,2,8") == [0, 2, 8]
    for parse in (console.parse_floats, console.parse_ints):
        with pytest.raises(UsageError, match="not a list"):
            parse("1,,2")


def test_bytes_for_people():
    assert [console.format_bytes(n) for n in (0, 999, 1500, 2_500_000, 3e13)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "30.0 TB",
    ]


def test_output_checks(tmp_path):
    with pytest.raises(UsageError, match="create it first"):
        console.check_output(tmp_path / "no" / "file", False)
    with pytest.raises(UsageError, match="is a folder"):
        console.check_output(tmp_path, True)
    (tmp_path / "a").write_text("old")
    with pytest.raises(UsageError, match="--overwrite"):
        console.check_output(tmp_path / "a", False)
    assert console.check_output(tmp_path / "a", True) == tmp_path / "a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused():
    # /proc takes no files from anyone, root included
    with pytest.raises(UsageError, match="cannot write into the folder /proc: ") as error:
        console.check_output("/proc/profile.yaml", False)
    assert "\n" not in str(error.value)
    with pytest.raises(KascadeError, match="cannot write /proc/profile.yaml: "):
        console.atomic_write("/proc/profile.yaml", "text")


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "file"
    console.atomic_write(target, "one")
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~current_umask()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KascadeError, match="cannot write .*file: disk full"):
        console.atomic_write(target, "two")
    assert target.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
