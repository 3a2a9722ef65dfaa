"""Help pages: grouped, with examples, in plain text, quick, whose lines parse."""

import importlib
import inspect
import re
import subprocess
import sys
from typing import Annotated

import pytest
import typer

from kascade_cli import app, help
from kascade_cli.help import Command, command, examples

# Commands whose options stand in groups.
GROUPED = ["profile", "select-anchors", "show", "export", "doctor"]


def page(name, function, capsys):
    with pytest.raises(SystemExit) as stop:
        command(name, function)(["--help"], prog_name=f"kascade {name}")
    assert stop.value.code == 0
    return capsys.readouterr().out


def load(name):
    module, attribute = app.COMMANDS[name][0].split(":")
    return getattr(__import__(module, fromlist=[attribute]), attribute)


@examples("kascade toy in.txt --dtype float32", "kascade toy in.txt -n 3   # three of them")
def toy(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file.")],
    number: Annotated[int, typer.Option("-n", min=1, max=7, help="How many.", rich_help_panel=help.OUTPUT)] = 3,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="A type.", rich_help_panel=help.MODEL)] = "auto",
    other: Annotated[bool, typer.Option("--other", help="Without a heading.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="S.", rich_help_panel=help.OUTPUT)] = 0,
    very: Annotated[bool, typer.Option("--a-very-long-option/--no-such-long-option", help="Long.")] = False,
) -> None:
    """Does a thing."""


def test_options_stand_under_their_headings_and_examples_at_the_end(capsys):
    text = page("toy", toy, capsys)
    places = [text.index(part) for part in ("Usage:", "Does a thing.", "Arguments:", "Output:", "Model:", "Other:")]
    assert places == sorted(places)
    output = text[text.index("Output:") : text.index("Model:")]
    assert "-n " in output
    assert "--seed" in output
    assert "1<=x<=7" in output
    assert "9223372036854775807" not in text  # a bound against typing mistakes tells the reader nothing
    assert "[default: 0]" in output
    assert "--dtype NAME" in text[text.index("Model:") : text.index("Other:")]
    assert "--other" in text[text.index("Other:") :]
    assert text.endswith(
        "Examples:\n  kascade toy in.txt --dtype float32\n  kascade toy in.txt -n 3   # three of them\n"
    )
    # One column of explanations for all groups.
    column = {line.index(word) for line in text.splitlines() for word in ("A file.", "How many.", "A type.")
              if word in line}  # fmt: skip
    assert len(column) == 1
    assert all(len(line) <= 80 for line in text[: text.index("Examples:")].splitlines())
    assert "\x1b" not in text


def test_a_command_without_headings_has_options_and_no_examples(capsys):
    def bare(flag: Annotated[bool, typer.Option("--flag", help="F.")] = False) -> None:
        """Bare."""

    text = page("bare", bare, capsys)
    assert "Options:" in text
    assert "Other:" not in text
    assert "Examples:" not in text
    assert "Arguments:" not in text


def test_subcommands_of_a_typer_app_have_the_same_help(capsys):
    group = typer.Typer(add_completion=False, rich_markup_mode=None)
    group.command("toy", cls=Command)(toy)
    group.command("bare")(lambda: None)
    with pytest.raises(SystemExit):
        command("group", group)(["toy", "--help"], prog_name="kascade group")
    assert "Model:\n  --dtype NAME" in capsys.readouterr().out


@pytest.mark.parametrize("name", GROUPED)
def test_every_option_has_a_heading_and_every_example_parses(name, capsys):
    function = load(name)
    text = page(name, function, capsys)
    rest = re.findall(r"^  (-\S+)", text[text.rindex("Other:") :] if "Other:" in text else "", re.M)
    assert set(rest) <= {"-h,"}
    built = command(name, function)
    assert function.examples
    for line in function.examples:
        words = line.split("#")[0].split()
        assert words[:2] == ["kascade", name]
        built.make_context(name, words[2:], resilient_parsing=False)
    assert 1 <= len(function.examples) <= 3


def test_help_of_these_commands_is_light():
    code = (
        "import sys\n"
        "from kascade_cli import app, help\n"
        f"for name in {GROUPED!r}:\n"
        "    module, attribute = app.COMMANDS[name][0].split(':')\n"
        "    help.command(name, getattr(__import__(module, fromlist=[attribute]), attribute))\n"
        "heavy = {'torch', 'transformers', 'h5py', 'scipy', 'numpy', 'matplotlib', 'yaml', 'pydantic'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_option_names_do_not_hang_on_typers_reading_of_metavars():
    """typer 0.27 takes a metavar that is the option's name in capitals for the name; named ones it leaves alone."""
    seen = 0
    for target, _ in app.COMMANDS.values():
        module, name = target.split(":")
        function = getattr(importlib.import_module(module), name)
        signature = inspect.signature(function) if inspect.isfunction(function) else None
        for parameter in signature.parameters.values() if signature else ():
            for extra in getattr(parameter.annotation, "__metadata__", ()):
                if type(extra).__name__ == "OptionInfo" and extra.metavar == parameter.name.upper():
                    seen += 1
                    named = [extra.default, *extra.param_decls]  # the first name lands in `default`
                    assert f"--{parameter.name}" in named, (name, parameter.name)
    assert seen
