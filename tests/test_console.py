import io
import json

import pytest
from rich.table import Table

from kascade_cli import console
from kascade_cli.errors import KascadeError, TargetMissed, UsageError, plain

# Names that a file may bear: rich markup, an emoji code, terminal sequences, a line break, half a character.
HOSTILE = "a[/b]:smile:[red]\x1b[31mR\x1b]0;title\x07\x9b2J\r\nz\x00\u202e\ud800"
SHOWN = "a[/b]:smile:[red]R z?"


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("32k", 32768), ("1K", 1024), ("2m", 2 * 1024**2), (7, 7), ("16m", 16 << 20)]
)
def test_sizes(text, value):
    assert console.parse_size(text) == value
    assert console.parse_size(console.format_size(value)) == value


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5k", "ten", "1 k", "0k", "٣", "²"])
def test_bad_sizes(text):
    with pytest.raises(UsageError, match="not a size"):
        console.parse_size(text)


@pytest.mark.parametrize("text", ["17m", "999m", "16777217", "9" * 5000, "9" * 5000 + "k"])
def test_sizes_that_nothing_could_be_built_of(text):
    with pytest.raises(UsageError, match="^--max-length: 9?.* is too much: the most is 16m") as error:
        console.parse_size(text, "--max-length")
    assert len(str(error.value)) < 120


def test_lists():
    assert console.parse_sizes("1k,2k") == [1024, 2048]
    with pytest.raises(UsageError, match="^--batch: '0' is not a size: use a whole number, 1 or more"):
        console.parse_sizes("4,0", "--batch")
    assert console.parse_floats("0.05,0.1") == [0.05, 0.1]
    assert console.parse_ints("0,2,8") == [0, 2, 8]
    for parse in (console.parse_floats, console.parse_ints):
        for text in ("1,,2", "nan", "1e999", "9" * 5000):
            with pytest.raises(UsageError, match="not a list") as error:
                parse(text)
            assert len(str(error.value)) < 200


def test_bytes_for_people():
    assert [console.format_bytes(n) for n in (0, 999, 1500, 2_500_000, 3e13)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "30.0 TB",
    ]


def test_text_from_outside_is_one_plain_line():
    assert plain(HOSTILE) == SHOWN
    assert plain("é ü 日本 👩‍👩‍👧 \\[x]") == "é ü 日本 👩‍👩‍👧 \\[x]"
    assert plain("a\tb\n\nc\u2028d") == "a b c d"
    assert plain("\x1b") == plain("\x1b[") == plain("\x1bP unfinished") == ""
    assert plain("x" * 50, 10) == "x" * 7 + "..."


@pytest.mark.parametrize("kind", [KascadeError, UsageError, TargetMissed])
def test_messages_of_errors_are_plain_by_construction(kind):
    assert str(kind(f"{HOSTILE}: wrong")) == f"{SHOWN}: wrong"
    assert len(str(kind("x" * 10**6))) == 2000
    assert kind("x").exit_code == {KascadeError: 1, UsageError: 2, TargetMissed: 3}[kind]


def printed(monkeypatch, name, *renderables):
    """What the console `out` or `err` writes."""
    text = io.StringIO()
    monkeypatch.setattr(getattr(console, name), "_file", text)
    getattr(console, name).print(*renderables)
    return text.getvalue()


@pytest.mark.parametrize("name", ["out", "err"])
def test_consoles_read_no_markup_and_pass_no_control_characters(monkeypatch, name):
    assert printed(monkeypatch, name, HOSTILE) == "a[/b]:smile:[red]R\nz?\n"
    table = Table(title=HOSTILE, caption=HOSTILE, box=None)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    words = printed(monkeypatch, name, table).split()
    assert words.count("a[/b]:smile:[red]R") == 4
    assert words.count("z?") == 4


def test_lines_and_cells_hold_whatever_a_file_holds(monkeypatch, capsys):
    console.say(HOSTILE)
    console.note("x" * 500)
    said = capsys.readouterr()
    assert said == (SHOWN + "\n", "x" * 500 + "\n")
    table = console.plain_table([HOSTILE], title=HOSTILE)
    table.add_row(console.cell(HOSTILE))
    assert printed(monkeypatch, "out", table).count(SHOWN) == 3


def test_a_progress_bar_names_files_as_text(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console, "err", console._PlainConsole(file=text, force_terminal=True, width=200))
    with console.progress(f"reading {HOSTILE}", total=2) as bar:
        bar.update(bar.first, description=f"now {HOSTILE}", completed=1)
        bar.refresh()
    assert f"now {SHOWN}" in text.getvalue()
    assert "title" not in text.getvalue()


def test_json_has_no_number_that_json_lacks_and_no_half_character(capsys):
    console.print_json({"a": [float("nan"), 1.5, {"b": float("-inf")}], "c": HOSTILE, "é": (1,)})
    text = capsys.readouterr().out
    text.encode()
    assert "\x1b" not in text
    assert "é" in text
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5, {"b": None}], "c": HOSTILE, "é": [1]}


def test_arguments_that_are_no_text():
    console.check_arguments(["show", "é.yaml", ""])
    with pytest.raises(UsageError, match=r"argument 'a\?.yaml' is not valid UTF-8") as error:
        console.check_arguments(["show", "a\udcff.yaml"])
    str(error.value).encode()


def test_steps_without_a_terminal_are_a_line_now_and_then(monkeypatch):
    text, now = io.StringIO(), [0.0]
    monkeypatch.setattr(console, "err", console._PlainConsole(file=text, width=60))
    with console.Steps("verifying", clock=lambda: now[0]) as steps:
        for done in range(1, 101):
            now[0] += 1.0
            steps.update(done, 100, f"{HOSTILE} KL 0.1")
    lines = text.getvalue().splitlines()
    assert len(lines) == 10  # one for each tenth
    assert lines[2] == f"verifying: 30 of 100 runs, {SHOWN} KL 0.1, about 70 s left"
    text.truncate(0)
    with console.Steps("verifying", clock=lambda: now[0]) as steps:
        for done in range(1, 11):
            now[0] += 20.0
            steps.update(done, 1000)
    lines = text.getvalue().lstrip("\0").splitlines()
    assert len(lines) == 5  # every 30 seconds, at the step after
    assert lines[0] == "verifying: 2 of 1000 runs, about 333 min left"
    text.truncate(0)
    with console.Steps("verifying", clock=lambda: now[0]) as steps:
        for done in range(1, 101):
            now[0] += 0.01
            steps.update(done, 100)
    assert not text.getvalue().lstrip("\0")  # over before anyone could wonder


def test_steps_on_a_terminal_are_a_bar(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console, "err", console._PlainConsole(file=text, force_terminal=True, width=200))
    with console.Steps("verifying") as steps:
        steps.update(12, 48, f"3 anchors {HOSTILE}")
        steps._bar.refresh()
    assert f"verifying: 3 anchors {SHOWN}" in text.getvalue()
    assert "12/48" in text.getvalue()
    assert "of 48 runs" not in text.getvalue()
