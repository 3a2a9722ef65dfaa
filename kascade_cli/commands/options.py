"""Options that several commands have, with one wording, under one heading of the help (kascade_cli.help)."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kascade_cli import processes
from kascade_cli.console import note, silence
from kascade_cli.errors import UsageError
from kascade_cli.help import BUDGET, MODEL, OUTPUT, PROMPTS

# What fits an int64 of a capture's attributes; counts beyond are typing mistakes, refused before anything is built.
LARGEST_SEED = 2**63 - 1
MOST_PROMPTS = 1_000_000

Function = TypeVar("Function", bound=Callable[..., Any])


def check_device(device: str) -> str:
    """`meta` is a device to torch, and holds no data. Raises UsageError."""
    if device.split(":")[0].strip().lower() == "meta":
        raise UsageError("device 'meta' holds no data: use --device cpu, cuda or auto")
    return device


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: the options that every command with a MODEL has."""

    dtype: str
    device: str
    device_map: str | None
    revision: str | None
    trust_remote_code: bool

    def load(self, model: str, notify: Callable[[str], None]) -> tuple[Any, Any]:
        """(model, tokenizer) as `models.load_model` gives them.

        Raises UsageError where several processes run a command that does not share its work.
        """
        from kascade_cli.models import load_model

        processes.check_alone()
        return load_model(model, **asdict(self), notify=notify)


def decide(what: str, make: Callable[[], Any]) -> Any:
    """What `make` gives: in several processes what it gives in the leader, which tells the others."""
    team = processes.team()
    return make() if team is None else team.from_leader(what, make)


def shared_out(command: Function) -> Function:
    """A command whose work several processes share: all but the leader are silent, and end when it does."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        with processes.together() as team, contextlib.ExitStack() as stack:
            if team and not team.leader:
                stack.enter_context(silence())
            return command(*arguments, **options)

    return run


def few(parts: int, what: str = "prompts") -> None:
    """A line where there are fewer parts of the work than processes."""
    team = processes.team()
    if team and parts < team.size:
        note(f"{parts} {what} for {team.size} processes: {team.size - parts} of them have nothing to do")


def check_haystack(haystack: str | None) -> None:
    """Raises UsageError for a path that is not there, before a model is loaded."""
    if haystack is not None and not Path(haystack).exists():
        raise UsageError(f"--haystack {haystack}: no such file or folder")


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or demo / demo-small.")]
Haystack = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="File or folder of texts that tasks like mix hide things in. Default: what every Python brings.",
        rich_help_panel=PROMPTS,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Profile of this model. Not needed for dense, oracle, streaming-llm ...",
        rich_help_panel="How attention runs",
    ),
]
MinKeys = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=2**31 - 1,
        metavar="N",
        help="Read at least this many keys. Default: the profile's.",
        rich_help_panel=BUDGET,
    ),
]
Backend = Annotated[str, typer.Option(metavar="NAME", help="auto, torch or tilelang.", rich_help_panel=MODEL)]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 ...", rich_help_panel=MODEL, callback=check_device),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="auto: spread the layers over all GPUs, then main memory; tp: split the heads over processes, in profile "
        "and evaluate (both need accelerate).",
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REV", help="Branch, tag or commit of the model on the hub.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own code.", rich_help_panel=MODEL)
]
AllowOtherWeights = Annotated[
    bool,
    typer.Option(
        "--allow-other-weights", help="Accept a profile of a model of the same shape.", rich_help_panel=MODEL
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT)]
