"""`kascade report` as a user meets it."""

import json
import os
import subprocess
import sys

from tests.report.conftest import files, prompts  # noqa: F401  (fixtures)


def test_a_page_is_written_once(run_kascade, files, tmp_path):  # noqa: F811
    output = tmp_path / "out.html"
    code, out, err = run_kascade("report", *files.values(), "-o", output, "--title", "Mine", "--top-k", 8)
    assert (code, err) == (0, "")
    text = output.read_text()
    assert out.startswith(f"wrote {output}: ")
    assert out.endswith("11 sections from 7 files\n")
    assert "<h1>Mine</h1>" in text
    assert "top 8 keys" in text
    code, _, err = run_kascade("report", files["bench"], "-o", output)
    assert code == 2
    assert err == f"error: {output} exists; pass --overwrite to replace it\n"
    assert output.read_text() == text
    code, _, _ = run_kascade("report", files["bench"], "-o", output, "--overwrite")
    assert code == 0
    assert output.read_text() != text


def test_mistakes_are_one_line_and_leave_no_page(run_kascade, files, tmp_path):  # noqa: F811
    other = json.loads(files["evaluation"].read_text()) | {"model": "else", "fingerprint": "sha256:" + "c" * 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "cut.json").write_text('{"schema": "kascade-bench/v1", "rows": [')
    output = tmp_path / "out.html"
    for given, expected, reason in (
        ([files["capture"], tmp_path / "other.json"], 2, "one page shows one model"),
        ([files["capture"], tmp_path / "none.h5"], 1, "cannot read"),
        ([tmp_path / "cut.json"], 1, "not JSON, or damaged"),
        ([tmp_path], 1, "it is a folder"),
        ([], 2, "Missing argument 'FILE...'"),
    ):
        code, out, err = run_kascade("report", *given, "-o", output)
        assert (code, out, err.count("\n")) == (expected, "", 1), err
        assert reason in err
        assert not output.exists()
    code, _, err = run_kascade("report", files["bench"], "-o", files["bench"], "--overwrite")
    assert code == 2
    assert "would replace a file that it is made from" in err


def test_progress_counts_the_prompts_of_captures(files, monkeypatch):  # noqa: F811
    from kascade_cli.report.page import load_all, measure_captures

    seen = []
    measure_captures(load_all(list(files.values())), top_k=8, advance=lambda *told: seen.append(told))
    assert seen == [("capture.h5", 1, 2), ("capture.h5", 2, 2)]


def test_no_torch(files, tmp_path):  # noqa: F811
    code = (
        "import sys\nfrom kascade_cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, "report", *map(str, files.values()), "-o", str(tmp_path / "out.html")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
