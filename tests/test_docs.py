"""The pages of docs/ name what the command line has."""

import re
from pathlib import Path

import pytest
import typer

from kascade_cli.app import COMMANDS, app

DOCS = Path(__file__).parent.parent / "docs"


def options(name):
    """Every long option of a command and its subcommands."""
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), name)
    found = {}
    for part in [command, *getattr(command, "commands", {}).values()]:
        for parameter in part.params:
            for text in (*parameter.opts, *parameter.secondary_opts):
                if text.startswith("--"):
                    found.setdefault(text, part.name)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_named_in_the_commands_page(name):
    page = (DOCS / f"{name}.md").read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", page))
    shared = {"--debug", "--plugin"}  # every command's: the help of `kascade` and docs/strategies.md
    missing = {option: command for option, command in options(name).items() if option not in named | shared}
    assert not missing
