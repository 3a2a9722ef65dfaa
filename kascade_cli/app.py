"""The command line: one row per command; a command's module is imported when it runs."""

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from kascade_cli import __version__
from kascade_cli.errors import KascadeError

# name -> (module:function, one line of help). Listed in the order of use.
COMMANDS: dict[str, tuple[str, str]] = {
    "profile": (
        "kascade_cli.commands.profile:profile",
        "Capture pooled attention of a dev set into an HDF5 file.",
    ),
    "select-anchors": (
        "kascade_cli.commands.select_anchors:select_anchors",
        "Choose anchor layers and head maps from a capture; write a YAML profile.",
    ),
    "show": ("kascade_cli.commands.show:show", "Print a capture or a profile for people."),
    "generate": (
        "kascade_cli.commands.generate:generate",
        "Generate text with sparse attention, or compare it with dense.",
    ),
    "evaluate": ("kascade_cli.commands.evaluate:evaluate", "Score strategies on long-context tasks."),
    "bench": ("kascade_cli.commands.bench:bench", "Measure the attention kernels: ops, model, e2e."),
    "export": (
        "kascade_cli.commands.export:export",
        "Write a profile in the vocabulary of a serving engine.",
    ),
    "doctor": ("kascade_cli.commands.doctor:doctor", "Say what this machine can run and what is missing."),
}


_INTERRUPTED = 130


class _LazyGroup(TyperGroup):
    """Shows every command in the help without importing it; imports one when it is called."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, name: str) -> Any:
        if name not in COMMANDS:
            return None
        target, summary = COMMANDS[name]
        if ctx.resilient_parsing or getattr(ctx, "listing", False):
            return TyperCommand(name, help=summary, short_help=summary)
        module, attribute = target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        # A command with subcommands brings its own Typer app.
        plain = typer.Typer(add_completion=False, rich_markup_mode=None)
        single = command if isinstance(command, typer.Typer) else plain
        if command is not single:
            single.command(name, context_settings={"help_option_names": ["-h", "--help"]})(command)
        built = typer.main.get_command(single)
        built.name = name
        return built

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        ctx.listing = True
        super().format_help(ctx, formatter)


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Kascade sparse attention for any Hugging Face causal LM: capture, choose anchors, run, measure.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"kascade {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show a traceback when a command fails."),
) -> None:
    """Kascade sparse attention for any Hugging Face causal LM: capture, choose anchors, run, measure."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits. KascadeError becomes one line on stderr and its exit code."""
    arguments: list[str] = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # --debug works before or after the command's name.
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        result: Any = app(arguments, standalone_mode=False)
        if result == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(result if isinstance(result, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except KascadeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); point stdout at nothing so that exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # Typer's own usage errors; newer versions carry their own copy of click, so they are known by shape.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if message := error.format_message():
                # A group called without a command brings its whole help.
                print(message if message.startswith("Usage:") else f"error: {message}", file=sys.stderr)
            sys.exit(error.exit_code)
        if debug:
            raise
        line = " ".join(str(error).split()) or "no message"
        print(f"error: {type(error).__name__}: {line[:500]} (--debug shows the traceback)", file=sys.stderr)
        sys.exit(1)
