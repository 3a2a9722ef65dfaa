"""What results say about where they come from."""

import datetime
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from kascade_cli import __version__, provenance


def test_versions_name_what_is_installed_and_nothing_else():
    found = provenance.versions(("numpy", "no-such-package"))
    assert found == {"python": ".".join(map(str, sys.version_info[:3])), "numpy": np.__version__}
    assert provenance.version("no-such-package") is None
    assert provenance.tool() == f"kascade {__version__}"


def test_the_date_is_in_utc():
    assert abs(datetime.datetime.fromisoformat(provenance.now()) - datetime.datetime.now(datetime.UTC)).seconds < 5
    assert provenance.now().endswith("+00:00")


def test_the_hash_is_of_all_files_in_order(tmp_path):
    for name, data in (("a", b"x" * (5 << 20)), ("b", b""), ("c", b"end")):
        (tmp_path / name).write_bytes(data)
    wanted = hashlib.sha256(b"x" * (5 << 20) + b"end").hexdigest()
    assert provenance.file_sha256(*(tmp_path / name for name in "abc")) == wanted
    with pytest.raises(FileNotFoundError):
        provenance.file_sha256(tmp_path / "missing")


def test_the_commit_is_that_of_the_source_tree(monkeypatch, tmp_path):
    monkeypatch.delenv("KASCADE_COMMIT", raising=False)
    source = tmp_path / "repo" / "kascade_cli"
    source.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(source / "provenance.py"))
    assert provenance.commit() is None
    git = ["git", "-C", str(source.parent), "-c", "user.name=x", "-c", "user.email=x@y"]
    (source / "a.py").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert provenance.commit() == head[:12]
    (source / "a.py").write_text("2")
    assert provenance.commit() == head[:12] + "+"
    monkeypatch.setenv("KASCADE_COMMIT", "given")
    assert provenance.commit() == "given"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("demo", "demo"),
        ("org/model", "org/model"),
        ("org/set:config:split", "org/set:config:split"),
        ("../models/x", "../models/x"),
        ("./x", "./x"),
        ("/srv/models/x", "x"),
        ("/srv/models/x/", "x"),
        ("/srv/sets/dev.jsonl", "dev.jsonl"),
        ("/anywhere/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abc", "Qwen/Qwen3-8B"),
        ("/anywhere/.cache/huggingface/hub/datasets--org--set--x/snapshots/0123abc", "org/set--x"),
        ("/anywhere/hub/models--Qwen--Q-GGUF/snapshots/0123abc/q-q4_k_m.gguf", "Qwen/Q-GGUF/q-q4_k_m"),
        ("/srv/models/q-q4_k_m.gguf", "q-q4_k_m"),
        ("/srv/models/smol/model.gguf", "smol"),
        ("/srv/models/smol/Model.GGUF", "Model"),
        ("/model.gguf", "model"),
        ("models/x.gguf", "models/x.gguf"),
        ("{here}/models/x.gguf", "models/x.gguf"),
        ("{here}/models/x", "models/x"),
        ("{here}", "work"),
        ("/", "/"),
    ],
)
def test_names_that_mean_something_on_another_machine(tmp_path, monkeypatch, name, shown):
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    assert provenance.portable_name(name.format(here=here)) == shown
