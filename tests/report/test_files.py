"""Which files are taken for what, and what is refused, in one line."""

import json
import os

import pytest

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.report.files import check_one_model, load
from kascade_cli.report.page import load_all
from tests.report.conftest import FINGERPRINT, NAME, make_profile
from tests.toy_captures import write_capture


def test_the_kind_is_found_by_looking_into_the_file(files, tmp_path):
    wanted = {"capture": "capture", "profile": "profile", "evaluation": "evaluation", "bench": "bench"}
    wanted |= dict.fromkeys(("oracle", "pooling", "remap"), "sweep")
    for name, path in files.items():
        moved = tmp_path / f"{name}.txt"  # the name says nothing
        os.link(path, moved)
        found = load(moved)
        assert found.kind == wanted[name], name
        assert (found.model, found.fingerprint) == ((None, None) if name == "bench" else (NAME, FINGERPRINT))
        assert found.command
    assert [source.kind for source in load_all([files["capture"], files["capture"]])] == ["capture"]


BROKEN = {
    "nothing.json": (b"", "is nothing that a report can show"),
    "text.md": (b"# A page\n", "is nothing that a report can show"),
    "binary": (b"\x00\xff\xfe schema: kascade/", "is nothing that a report can show"),
    "list.json": (b"[1, 2]", "is nothing that a report can show"),
    "other.json": (b'{"schema": "kascade-other/v1", "rows": []}', "is nothing that a report can show"),
    "cut.json": (b'{"schema": "kascade-bench/v1", "rows": [{"ki', "not JSON, or damaged"),
    "deep.json": (b'{"a":' * 100_000, "not JSON, or damaged"),
    "nan.json": (b'{"schema": "kascade-bench/v1", "rows": [{"a": NaN}]}', "NaN is no number"),
    "empty.json": (b'{"schema": "kascade-bench/v1", "rows": []}', "this bench has no rows"),
    "rows.json": (b'{"schema": "kascade-sweep/v1", "rows": [3]}', "a row is not a mapping"),
    "sweep.json": (
        b'{"schema": "kascade-sweep/v1", "rows": [{}]}',
        "damaged or from another version: it lacks 'model'",
    ),
    "cut.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "cut.h5"),
    "cut.yaml": (b"schema: kascade/v1\nalgorithm: kascade\n", "cut.yaml"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_none_of_them_or_damaged(name, tmp_path):
    data, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(KascadeError) as stop:
        load(path)
    assert reason in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_missing_file_a_folder_and_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("none", "No such file"), ("", "it is a folder"), ("pipe", "it is not a regular file")):
        with pytest.raises(KascadeError, match=reason):
            load(tmp_path / name)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


def test_files_of_two_models_are_refused_and_both_named(files, prompts, tmp_path):
    other = "sha256:" + "b" * 64
    change(files["evaluation"], fingerprint=other, model="else")
    with pytest.raises(UsageError) as stop:
        load_all([files["bench"], files["capture"], files["profile"], files["evaluation"]])
    assert f"{files['capture']} is of toy <script>alert(1)</script> (sha256:aaaaaaaaaaaa)" in str(stop.value)
    assert f"{files['evaluation']} of else (sha256:bbbbbbbbbbbb)" in str(stop.value)
    # The same name with other weights is another model; a bench is of none.
    change(files["evaluation"], model=NAME)
    with pytest.raises(UsageError, match="one page shows one model"):
        load_all([files["profile"], files["evaluation"]])
    load_all([files["bench"], files["evaluation"]])
    # Of another rule (older files), the name decides, and the shape where it is known.
    for fingerprint, name, fits in ((f"v2-{other}", NAME, True), (f"v2-{other}", "else", False)):
        change(files["evaluation"], fingerprint=fingerprint, model=name)
        sources = [load(files["profile"]), load(files["evaluation"])]
        if fits:
            check_one_model(sources)
        else:
            with pytest.raises(UsageError):
                check_one_model(sources)
    wide = write_capture(tmp_path / "wide.h5", prompts, layers=9, model_name=NAME)
    with pytest.raises(UsageError, match=r"wide\.h5"):
        load_all([files["profile"], wide])


def test_a_capture_without_a_finished_prompt(tmp_path, prompts):
    path = write_capture(tmp_path / "c.h5", prompts, incomplete=(0, 1))
    with pytest.raises(KascadeError, match=r"no complete prompt; finish the capture"):
        load(path)


def test_commands_hold_no_paths_of_a_machine(files, prompts, tmp_path):
    model, texts, profile = (str(tmp_path / name) for name in ("mine", "dev.jsonl", "p.yaml"))
    path = write_capture(tmp_path / "c.h5", prompts, model_name=model, dev_set_name=texts)
    change(files["evaluation"], model=model, profile=profile)
    for source in load_all([path, files["evaluation"]]):
        assert source.model == "mine"
        assert str(tmp_path) not in source.command
        assert "mine" in source.command


def test_a_profile_that_names_no_file(tmp_path):
    path = tmp_path / "p.yaml"
    make_profile().model_copy(update={"provenance": {}}).save(path)
    assert load(path).command == ""
