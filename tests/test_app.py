"""The command line as a whole: light to start, one line for every error, the right exit codes."""

import subprocess
import sys

import pytest

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
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as stop:
        app.main([])
    assert stop.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(type(error)):
        app.main(["--debug"])


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
