"""Help pages in plain text, the same for every command: options under headings, examples at the end.

    @examples("kascade show profile.yaml", "kascade show capture.h5 --json")
    def show(dtype: Annotated[str, typer.Option(rich_help_panel=MODEL, help=...)] = "auto"): ...

    command("show", show)                       # one command; what app.py calls
    @group.command(cls=Command)                 # a subcommand of a Typer app

Options without a heading come last, under "Other". Imports nothing but Typer.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

# Headings that several commands have, in one wording. A command's own stand beside its options.
OUTPUT = "Output"
MODEL = "Model"
PROMPTS = "Prompts"
BUDGET = "Budget"
RUNNING = "Running it"
_REST = "Other"
# A bound that only stops typing mistakes tells the reader nothing.
_LIMIT = re.compile(r"; (?:\d+<=)?x<=\d{4,}(?=\])|\s*\[(?:\d+<=)?x<=\d{4,}\]$")
_WIDEST = 30  # characters of the left column; a longer option has its text on the next line

_HUGE = re.compile(r"(\d<=x)<=\d{7,}")

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}

Function = TypeVar("Function", bound=Callable[..., Any])


def examples(*lines: str) -> Callable[[Function], Function]:
    """Command lines to show at the end of the function's help, as they would be typed."""

    def mark(function: Function) -> Function:
        function.examples = lines  # type: ignore[attr-defined]
        return function

    return mark


class Command(TyperCommand):
    """A command whose options stand under their `rich_help_panel`, in the order in which headings first appear."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        rest = []
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            record = (record[0], _LIMIT.sub("", record[1]))
            heading = getattr(parameter, "rich_help_panel", None)
            if parameter.param_type_name == "argument":
                groups["Arguments"].append(record)
            elif heading:
                groups.setdefault(heading, []).append(record)
            else:
                rest.append(record)
        groups = {heading: [_filled(record) for record in rows] for heading, rows in groups.items()}
        rest = [_filled(record) for record in rest]
        groups[_REST if len(groups) > 1 else "Options"] = rest
        # All groups share one column.
        widest = min(_WIDEST, max((len(name) for rows in groups.values() for name, _ in rows), default=0))
        for heading, rows in groups.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(widest), text) for name, text in rows], col_max=_WIDEST)

    def format_epilog(self, ctx: typer.Context, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        if lines := getattr(self.callback, "examples", ()):
            with formatter.section("Examples"):
                for line in lines:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _filled(record: tuple[str, str]) -> tuple[str, str]:
    """A help text as it is shown: `{strategies}` is filled in (plugins have been imported by then), and ranges lose an
    upper end that is there only to catch typing mistakes."""
    name, text = record
    text = _HUGE.sub(r"\1", text)
    if "{strategies}" in text:
        from kascade_cli.strategy_list import strategy_names

        text = text.replace("{strategies}", strategy_names())
    return name, text


def command(name: str, function: Any) -> Any:
    """The command `name` of a function, or of a Typer app with subcommands."""
    app = function
    if not isinstance(function, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name, cls=Command, context_settings=CONTEXT_SETTINGS)(function)
    built = typer.main.get_command(app)
    built.name = name
    return built
