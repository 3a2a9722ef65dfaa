"""The command line: one row per command; a command's module is imported when it runs."""

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kascade_cli.errors import KascadeError, plain
from kascade_cli.version import __version__

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
    "import": (
        "kascade_cli.commands.import_maps:import_maps",
        "Read head maps of the public implementation (.npy) into a profile.",
    ),
    "show": ("kascade_cli.commands.show:show", "Print a capture or a profile for people."),
    "generate": (
        "kascade_cli.commands.generate:generate",
        "Generate text with sparse attention, or compare it with dense.",
    ),
    "evaluate": ("kascade_cli.commands.evaluate:evaluate", "Score strategies on long-context tasks."),
    "lm-eval": (
        "kascade_cli.commands.lm_eval:app",
        "Run lm-evaluation-harness with a model under a strategy.",
    ),
    "bench": ("kascade_cli.commands.bench:bench", "Measure the attention kernels: ops, model, e2e."),
    "sweep": ("kascade_cli.commands.sweep:sweep", "Measure figures 2, 5 and 6 of the paper: oracle, pooling, remap."),
    "report": ("kascade_cli.commands.report:report", "Write one HTML page of captures, profiles and measurements."),
    "export": (
        "kascade_cli.commands.export:export",
        "Write a profile in the vocabulary of a serving engine.",
    ),
    "doctor": ("kascade_cli.commands.doctor:doctor", "Say what this machine can run and what is missing."),
}


_INTERRUPTED = 130


class _Debug:
    """Whether `--debug` was given, before or after the command's name."""

    on = False


def _set_debug(value: bool) -> None:
    _Debug.on = _Debug.on or value


def _import_plugins(names: list[str] | None) -> None:
    """Imports modules (or .py files) that bring strategies of their own."""
    if names:
        from kascade_cli.plugins import import_plugin

        for name in names:
            import_plugin(name)


_HELP = {
    "debug": "Show a traceback when a command fails.",
    "plugin": "Import a module or .py file with strategies of your own. Repeatable.",
}


def _add_shared_options(built: Any) -> None:
    """`--debug` and `--plugin` on every command, so that they may follow its name."""
    for command in getattr(built, "commands", {}).values():
        _add_shared_options(command)
    if getattr(built, "commands", None) is not None:
        return
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command()
    def shared(
        plugin: Annotated[
            list[str] | None,
            typer.Option(
                metavar="MODULE", help=_HELP["plugin"], callback=_import_plugins, is_eager=True, expose_value=False
            ),
        ] = None,
        debug: Annotated[
            bool,
            typer.Option("--debug", help=_HELP["debug"], callback=_set_debug, is_eager=True, expose_value=False),
        ] = False,
    ) -> None:
        """Never runs: its options are what is wanted."""

    built.params.extend(typer.main.get_command(app).params)


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
        from kascade_cli.help import command

        module, attribute = target.split(":")
        built = command(name, getattr(importlib.import_module(module), attribute))
        _add_shared_options(built)
        return built

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        ctx.listing = True
        super().format_help(ctx, formatter)


_SUMMARY = "Kascade sparse attention for any Hugging Face causal LM: capture, choose anchors, run, measure."
app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help=_SUMMARY,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"kascade {__version__}")
        raise typer.Exit


@app.callback(help=_SUMMARY)
def root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
    plugin: list[str] = typer.Option(
        None, "--plugin", metavar="MODULE", callback=_import_plugins, is_eager=True, help=_HELP["plugin"]
    ),
    debug: bool = typer.Option(False, "--debug", callback=_set_debug, is_eager=True, help=_HELP["debug"]),
) -> None:
    """What every command shares."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits. KascadeError becomes one line on stderr and its exit code."""
    _Debug.on = False
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        if any("\ud800" <= letter <= "\udfff" for argument in arguments for letter in argument):
            from kascade_cli.console import check_arguments

            check_arguments(arguments)
        result: Any = app(arguments, standalone_mode=False)
        if result == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(result if isinstance(result, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except KascadeError as error:
        if _Debug.on:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
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
                print(message if message.startswith("Usage:") else f"error: {plain(message)}", file=sys.stderr)
            sys.exit(error.exit_code)
        if _Debug.on:
            raise
        line = plain(error).strip() or "no message"
        print(f"error: {type(error).__name__}: {line[:500]} (--debug shows the traceback)", file=sys.stderr)
        sys.exit(1)
