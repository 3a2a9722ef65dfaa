"""The command line as a whole: light to start, one line for every error, the right exit codes."""

import json
import re
import subprocess
import sys

import pytest
import typer

from kascade_cli import app
from kascade_cli.errors import KascadeError, TargetMissed, UsageError


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "kascade_cli", *arguments], capture_output=True, text=True, **options)


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from kascade_cli.app import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'tilelang', 'h5py', 'scipy', 'numpy', 'matplotlib', 'yaml', 'pydantic'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in result.stdout
    for name in app.COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help_without_torch(name):
    code = (
        "import sys\n"
        "from kascade_cli.app import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print('torch:', 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in result.stdout
    assert "torch: False" in result.stdout


def test_version_and_unknown_command():
    assert run("--version").stdout.startswith("kascade ")
    wrong = run("nope")
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: No such command 'nope'."


@pytest.mark.parametrize(
    ("error", "code"), [(KascadeError("it broke"), 1), (UsageError("wrong"), 2), (TargetMissed("missed"), 3)]
)
def test_errors_become_one_line(error, code, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("kascade_cli.commands.show.show", fail)
    with pytest.raises(SystemExit) as stop:
        app.main(["show"])
    assert stop.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"
    for arguments in (["--debug", "show"], ["show", "--debug"]):
        with pytest.raises(type(error)):
            app.main(arguments)
    with pytest.raises(SystemExit):  # it is not remembered
        app.main(["show"])


def test_debug_may_be_a_value(monkeypatch, capsys):
    seen = []

    def show(name: str = typer.Option(...)) -> None:
        seen.append(name)

    monkeypatch.setattr("kascade_cli.commands.show.show", show)
    with pytest.raises(SystemExit) as stop:
        app.main(["show", "--name", "--debug"])
    assert (stop.value.code, seen) == (0, ["--debug"])


PLUGIN = """
from kascade_cli.sparse import Strategy


class Everything(Strategy):
    name, summary = "test-everything", "every key"

    def attend(self, layer):
        return layer.dense()
"""


@pytest.mark.parametrize(("name", "place"), [("my_plugin", "before"), ("./my_plugin.py", "after")])
def test_a_plugin_brings_strategies(name, place, tmp_path):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    given = ["--plugin", name]
    arguments = [*given, "evaluate", "--help"] if place == "before" else ["evaluate", *given, "--help"]
    shown = run(*arguments, cwd=tmp_path)
    assert shown.returncode == 0
    assert "test-everything" in re.sub(r"\s+", "", shown.stdout)


def test_a_plugin_s_strategy_evaluates(tmp_path):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    small = ["demo-small", "--strategies", "dense,test-everything", "--max-length", "256", "--num-prompts", "1"]
    done = run("evaluate", "--plugin", "my_plugin", *small, "--questions", "1", "--json", cwd=tmp_path)
    rows = json.loads(done.stdout)["rows"]
    assert [row["strategy"] for row in rows] == ["dense", "test-everything"]
    assert rows[0]["scores"] == {
        kind: {k: v for k, v in score.items() if k != "vs_dense"} for kind, score in rows[1]["scores"].items()
    }


@pytest.mark.parametrize(
    ("name", "text", "code", "reason"),
    [
        ("no_such_module_here", "", 2, "no such module"),
        ("./none.py", "", 2, "no such file"),
        ("broken", "import no_such_module_here", 1, "cannot be imported: No module named"),
        ("broken", "1 / 0", 1, "cannot be imported: ZeroDivisionError"),
        ("broken", PLUGIN.replace("test-everything", "kascade"), 1, "two strategies are called 'kascade'"),
    ],
)
def test_a_plugin_that_cannot_be_used(name, text, code, reason, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    done = run("--plugin", name, "evaluate", "demo-small", "--strategies", "kascade", cwd=tmp_path)
    assert done.returncode == code
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_list_for_the_help_is_the_registry():
    code = (
        "from kascade_cli.strategy_list import strategy_summaries as listed; import sys; found = listed(); "
        "assert 'torch' not in sys.modules; from kascade_cli.sparse import known_strategies; "
        "assert list(found.items()) == [(n, k.summary) for n, k in known_strategies().items()], found; "
        "print(len(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 13


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_a_group_alone_prints_its_help_and_no_error(group):
    done = run(*group)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert "..." not in done.stderr.replace("[ARGS]...", "")  # summaries are whole


def test_ctrl_c_is_one_word_and_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("kascade_cli.commands.show.show", interrupt)
    with pytest.raises(SystemExit) as stop:
        app.main(["show"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_unexpected_errors_are_one_line_too(monkeypatch, capsys):
    def fail(*_, **__):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as stop:
        app.main([])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: a b (--debug shows the traceback)\n"
