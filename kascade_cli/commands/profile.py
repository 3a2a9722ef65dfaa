"""`kascade profile`: capture the pooled attention of a dev set into an HDF5 file."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli import processes
from kascade_cli.commands import options as shared
from kascade_cli.console import (
    MAX_SIZE,
    cell,
    format_bytes,
    format_size,
    note,
    out,
    parse_size,
    print_json,
    progress,
    say,
)
from kascade_cli.errors import KascadeError, UsageError, plain
from kascade_cli.files import check_name, check_output
from kascade_cli.help import OUTPUT, PROMPTS, examples

LARGEST_TILE = 4096  # queries; the kernels' is 32
_MEASURED = "What is measured"


@shared.shared_out
@examples(
    "kascade profile demo -o capture.h5 --num-prompts 16 --max-length 2k",
    "kascade profile org/model --dev-set prompts.jsonl --max-length 32k --dtype bfloat16",
    "kascade profile org/model --dev-set prompts.jsonl --max-length 32k --resume",
)
def profile(
    model: shared.Model,
    dev_set: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="Built-in task, hub id (org/name[[:config]:split]), .jsonl, .parquet, folder of .txt. "
            "Default: mix, look-ups and other questions in long prose and code; what a built-in model was trained on.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=shared.MOST_PROMPTS, help="How many prompts to capture.", rich_help_panel=PROMPTS
        ),
    ] = 16,
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Longest prompt in tokens, such as 32k. Default: what the machine can afford, 16k at most.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Field of a record that holds the text or the chat.", rich_help_panel=PROMPTS
        ),
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Wrap text in the model's chat template, or never use it. Default: for chats and tasks like mix.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    haystack: shared.Haystack = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=shared.LARGEST_SEED,
            help="Chooses the prompts and the tiles.",
            rich_help_panel=PROMPTS,
        ),
    ] = 0,
    tiles_per_prompt: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Query tiles per prompt: half prefill tiles, half decode rows; or 'all'.",
            rich_help_panel=_MEASURED,
        ),
    ] = "32",
    tile: Annotated[
        int,
        typer.Option(metavar="N", max=LARGEST_TILE, help="Queries per prefill tile.", rich_help_panel=_MEASURED),
    ] = 32,
    decode_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            max=MAX_SIZE,
            help="Also generate this many tokens, and record each as a decode row.",
            rich_help_panel=_MEASURED,
        ),
    ] = 0,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The HDF5 file to write.", rich_help_panel=OUTPUT)
    ] = Path("capture.h5"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished capture.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: shared.Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Capture what a model attends to over a dev set: the input of `kascade select-anchors`.

    A killed run loses the prompt it was at: repeat the command with --resume. Under torchrun or accelerate launch
    the processes share the prompts.
    """
    count = _tile_count(tiles_per_prompt)
    length = parse_size(max_length, "--max-length") if max_length is not None else None
    check_name(model, "MODEL")
    check_name(dev_set or "", "--dev-set")
    team = processes.team()
    follows = team is not None and not team.leader
    split = device_map == "tp"
    if not follows:  # else the leader's, which may have begun
        _check_target(output, resume, overwrite, [model, dev_set, haystack])

    from kascade_cli.analysis.summary import captured
    from kascade_cli.capture.run import CaptureOptions, follow_capture, plan_capture, run_capture
    from kascade_cli.demo import DEMO_TASKS
    from kascade_cli.devset import check_source, default_devset, load_devset
    from kascade_cli.models import check_revision, describe

    going_on = shared.decide("going on", lambda: resume and output.exists())
    if going_on:
        dev_set, length = shared.decide("as before", lambda: _as_before(output, dev_set, length))
    dev_set = DEMO_TASKS.get(model) if dev_set is None else dev_set
    if dev_set is not None:
        check_source(dev_set, text_field, chat_template)
    shared.check_haystack(haystack)
    check_revision(model, revision)
    options: dict[str, Any] = {
        "num_prompts": num_prompts,
        "tiles_per_prompt": count,
        "tile": tile,
        "decode_tokens": decode_tokens,
        "seed": seed,
        "text_field": text_field,
        "chat_template": chat_template,
        "haystack": haystack,
    }
    CaptureOptions(max_length=1, **options)  # refuse bad values before a model is loaded
    if going_on and not follows:
        _check_resumed(output, options | ({"max_length": length} if length else {}), dev_set, dtype, device)
    with _interruptible(output, begun=resume):
        loading = shared.Loading(dtype, device, device_map, revision, trust_remote_code)
        loaded, tokenizer = loading.load(model, note)
        info = describe(loaded, model)
        dev_set = dev_set or default_devset(tokenizer)
        length = shared.decide("length", lambda: _length(loaded, info, length, num_prompts, decode_tokens))
        chosen = CaptureOptions(max_length=length, **options)
        devset = load_devset(
            dev_set,
            tokenizer,
            num_prompts=num_prompts,
            max_length=length,
            seed=seed,
            text_field=text_field,
            chat_template=chat_template,
            positions=info.max_positions,
            haystack=haystack,
        )
        for line in devset.notes():
            note(f"{dev_set}: {line}")
        if len(devset.prompts) < num_prompts:
            note(f"{dev_set}: {len(devset.prompts)} prompts, fewer than the {num_prompts} asked for")
        plan = plan_capture(info, devset, chosen)
        if follows:
            follow_capture(loaded, info, devset, output, chosen, team=team, plan=plan, split=split)
            return
        _announce(output, plan, devset, info, resume)
        if not split:
            shared.few(len(devset.prompts))

    started = time.perf_counter()
    with progress("capturing", total=devset.tokens) as bar, _interruptible(output, begun=True):
        result = run_capture(
            loaded,
            info,
            devset,
            output,
            chosen,
            plan=plan,
            resume=resume,
            overwrite=overwrite,
            on_progress=lambda done, _: bar.update(bar.first, completed=done),
            team=team,
            split=split,
        )
    seconds = time.perf_counter() - started
    if not result.joined:
        note(
            f"no room to join the parts: {output} reads from {output}.parts, keep them together; "
            "make room and run again with --resume to make one file"
        )
    document = captured(output) | {"captured_now": result.captured, "seconds": round(seconds, 3)}
    print_json(document) if as_json else _render(document)


def _tile_count(text: str) -> int | None:
    if text.strip().lower() == "all":
        return None
    try:
        count = int(text)
    except ValueError as error:
        raise UsageError(f"--tiles-per-prompt is a number or 'all', not '{plain(text, 40)}'") from error
    if count > MAX_SIZE:
        raise UsageError(f"--tiles-per-prompt {plain(text, 40)} is too many: pass 'all' for every tile")
    return count


def _length(loaded: Any, info: Any, length: int | None, num_prompts: int, decode_tokens: int) -> int:
    """The longest prompt, bounded by what the model takes before any prompt is made. Raises UsageError."""
    model, limit = info.name, info.max_positions
    room = limit - decode_tokens if limit else None
    if room is not None and room < 1:
        raise UsageError(f"--decode-tokens {decode_tokens} leaves no room: {model} takes {limit} tokens")
    if length is None:
        from kascade_cli.capture.afford import affordable_length

        length = affordable_length(loaded, num_prompts, room)
        note(f"prompts of up to {format_size(length)} tokens, what this machine can afford (--max-length changes it)")
        return length
    if room is not None and length > room:
        generated = f", and {decode_tokens} of them are to be generated" if decode_tokens else ""
        raise UsageError(f"{model} takes {limit} tokens{generated}: pass --max-length {room} or less")
    return length


def _as_before(output: Path, dev_set: str | None, length: int | None) -> tuple[str, int]:
    """What an unfinished capture was made from, where the command does not say."""
    from kascade_cli.capture.store import open_capture

    with open_capture(output) as capture:
        return dev_set or capture.meta["dev_set_name"], length or capture.meta["max_length"]


@contextlib.contextmanager
def _interruptible(output: Path, *, begun: bool) -> Iterator[None]:
    """After Ctrl-C, or another process' end, says what is kept and how to go on.

    begun: an output that is there is this capture's.
    """
    try:
        yield
    except KeyboardInterrupt:
        if begun and output.exists():
            note(f"stopped; the finished prompts are in {output}: go on with --resume")
        elif begun:
            note("stopped before the first prompt was finished: nothing was written")
        raise
    except processes.Ended as error:  # before this process took part; afterwards the capture says it
        from kascade_cli.capture.parts import parts_folder

        kept = len(list(parts_folder(output).glob("*.h5")))
        if not kept:
            raise
        told = f"{kept} prompts are finished and kept: run again with --resume"
        raise KascadeError(f"{output}: {error}; {told}") from error


def _check_target(output: Path, resume: bool, overwrite: bool, inputs: Sequence[str | None]) -> None:
    if resume and overwrite:
        raise UsageError("--resume goes on with a capture and --overwrite replaces it: pass one of them")
    check_output(output, True, inputs)  # a folder, or in a folder that does not exist
    if output.is_symlink() and not output.exists():
        check_output(output, overwrite)
    if not (resume or overwrite) and output.exists():
        from kascade_cli.capture.store import describe_existing

        raise UsageError(describe_existing(output))


def _check_resumed(output: Path, options: dict[str, Any], dev_set: str, dtype: str, device: str) -> None:
    """Refuses to resume under other options, as far as they are known before the model is loaded.

    The store compares everything, the model and the dev set's tokens included, when it opens the file.
    """
    from kascade_cli.capture.store import check_options, open_capture
    from kascade_cli.models import resolve_device, resolve_dtype
    from kascade_cli.tasks import TASKS

    known = options | {"device": resolve_device(device).type}
    if dtype != "auto":
        known["dtype"] = str(resolve_dtype(dtype)).removeprefix("torch.")
    with open_capture(output) as capture:
        check_options(capture, known)
        before = capture.meta["dev_set_name"]
    # Texts may have moved; a built-in task has one name.
    if before != dev_set and (before in TASKS or dev_set in TASKS):
        raise UsageError(
            f"cannot resume {output}: --dev-set was {before}, now {dev_set}; repeat the old one, or pass --overwrite"
        )


def _announce(output: Path, plan: Any, devset: Any, info: Any, resume: bool) -> None:
    from kascade_cli.capture.store import disk_free, stored_bytes

    tiles = sum(len(tiles) for tiles in plan.tiles)
    note(
        f"{len(devset.prompts)} prompts of '{devset.name}', {devset.tokens} tokens, {tiles} tiles, "
        f"{len(info.profiled_layers)} of {info.layers} layers: {output} will take about "
        f"{format_bytes(plan.expected_bytes)} ({format_bytes(plan.raw_bytes)} before compression)"
    )
    free = disk_free(output)
    needed = plan.expected_bytes - (stored_bytes(output) if resume else 0)
    if needed > free:
        raise KascadeError(
            f"{output} needs about {format_bytes(needed)} more, and the disk has {format_bytes(free)} left: "
            "make room, or lower --num-prompts or --tiles-per-prompt"
        )


def _render(document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=None, caption_justify="left")
    for name in ("layer", "importance", "top 64 keys", "top 5 %", "top 10 %", "worst head, 10 %"):
        table.add_column(name, justify="right")
    for row in document["layers"]:
        mass = row["top_mass"]
        values = (mass["64"], mass["5%"], mass["10%"], row["worst_head"]["10%"])
        table.add_row(cell(row["layer"]), f"{row['importance']:.4f}", *(f"{value:.3f}" for value in values))
    out.print(table)
    say("importance: 1 - cos(x, x + attention); the rest: share of attention on the largest keys, decode rows")
    tiles, kept = document["tiles"], document["prompts"] - document["captured_now"]
    earlier = f" ({kept} of them earlier)" if kept else ""
    say(
        f"{document['output']}: {document['prompts']} prompts{earlier}, {document['tokens']} tokens, "
        f"{tiles['prefill']} prefill tiles, {tiles['decode']} decode rows, {format_bytes(document['bytes'])}, "
        f"{document['seconds']:.1f} s"
    )
