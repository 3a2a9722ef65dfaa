"""`kascade profile`: capture the pooled attention of a dev set into an HDF5 file."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import err, format_bytes, out, parse_size, print_json, progress
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.files import check_output

DEFAULT_LENGTH = 8192


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or demo / demo-small.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HDF5 file to write.")] = Path(
        "capture.h5"
    ),
    dev_set: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="Built-in task, hub id (org/name[[:config]:split]), .jsonl, .parquet, folder of .txt. "
            "Default: what a built-in model was trained on; hops for others.",
        ),
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field of a record that holds the text or the chat.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Wrap text in the model's chat template, or never use it. Default: for chats only.",
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="How many prompts to capture.")] = 16,
    max_length: Annotated[
        str | None,
        typer.Option(metavar="N", help="Longest prompt in tokens, such as 32k. Default: 8k, or what the model takes."),
    ] = None,
    tiles_per_prompt: Annotated[
        str,
        typer.Option(metavar="N", help="Query tiles per prompt: half prefill tiles, half decode rows; or 'all'."),
    ] = "32",
    tile: Annotated[int, typer.Option(metavar="N", help="Queries per prefill tile.")] = 32,
    decode_tokens: Annotated[
        int, typer.Option(metavar="N", help="Also generate this many tokens, and record each as a decode row.")
    ] = 0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Chooses the prompts and the tiles.")] = 0,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the model on the hub.")
    ] = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished capture.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Capture what a model attends to over a dev set: the input of `kascade select-anchors`.

    A killed run loses the prompt it was at: repeat the command with --resume.
    """
    count = _tile_count(tiles_per_prompt)
    length = parse_size(max_length, "--max-length") if max_length is not None else None
    _check_target(output, resume, overwrite)

    from kascade_cli.capture.run import CaptureOptions, plan_capture, run_capture
    from kascade_cli.demo import DEMO_TASKS
    from kascade_cli.devset import check_source, load_devset
    from kascade_cli.models import check_revision, describe, load_model

    dev_set = DEMO_TASKS.get(model, "hops") if dev_set is None else dev_set
    check_source(dev_set, text_field, chat_template)
    check_revision(model, revision)
    options: dict[str, Any] = {
        "num_prompts": num_prompts,
        "tiles_per_prompt": count,
        "tile": tile,
        "decode_tokens": decode_tokens,
        "seed": seed,
        "text_field": text_field,
        "chat_template": chat_template,
    }
    CaptureOptions(max_length=1, **options)  # refuse bad values before a model is loaded
    if resume and output.exists():
        _check_resumed(output, options | ({"max_length": length} if length else {}), dev_set, dtype, device)
    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    info = describe(loaded, model)
    if length is None:
        length = min(DEFAULT_LENGTH, (info.max_positions or DEFAULT_LENGTH) - decode_tokens)
        if length < 1:
            raise UsageError(
                f"--decode-tokens {decode_tokens} leaves no room: {model} takes {info.max_positions} tokens"
            )
    chosen = CaptureOptions(max_length=length, **options)
    devset = load_devset(
        dev_set,
        tokenizer,
        num_prompts=num_prompts,
        max_length=length,
        seed=seed,
        text_field=text_field,
        chat_template=chat_template,
    )
    for note in devset.notes():
        err.print(f"{dev_set}: {note}", markup=False, soft_wrap=True)
    if len(devset.prompts) < num_prompts:
        err.print(
            f"{dev_set}: {len(devset.prompts)} prompts, fewer than the {num_prompts} asked for",
            markup=False,
            soft_wrap=True,
        )
    plan = plan_capture(info, devset, chosen)
    _announce(output, plan, devset, info, resume)

    started = time.perf_counter()
    with progress("capturing", total=devset.tokens) as bar:
        try:
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
            )
        except KeyboardInterrupt:
            if output.exists():
                err.print(
                    f"stopped; the finished prompts are in {output}: go on with --resume", markup=False, soft_wrap=True
                )
            raise
    seconds = time.perf_counter() - started
    if not result.joined:
        err.print(
            f"no room to join the parts: {output} reads from {output}.parts, keep them together; "
            "make room and run again with --resume to make one file",
            markup=False,
            soft_wrap=True,
        )
    document = _summary(output) | {"captured_now": result.captured, "seconds": round(seconds, 3)}
    print_json(document) if as_json else _render(document)


def _tile_count(text: str) -> int | None:
    if text.strip().lower() == "all":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--tiles-per-prompt is a number or 'all', not '{text}'") from error


def _check_target(output: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UsageError("--resume goes on with a capture and --overwrite replaces it: pass one of them")
    check_output(output, overwrite=True)  # a folder, or in a folder that does not exist
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
    err.print(
        f"{len(devset.prompts)} prompts of '{devset.name}', {devset.tokens} tokens, {tiles} tiles, "
        f"{len(info.profiled_layers)} of {info.layers} layers: {output} will take about "
        f"{format_bytes(plan.expected_bytes)} ({format_bytes(plan.raw_bytes)} before compression)",
        markup=False,
        soft_wrap=True,
    )
    free = disk_free(output)
    needed = plan.expected_bytes - (stored_bytes(output) if resume else 0)
    if needed > free:
        raise KascadeError(
            f"{output} needs about {format_bytes(needed)} more, and the disk has {format_bytes(free)} left: "
            "make room, or lower --num-prompts or --tiles-per-prompt"
        )


def _summary(output: Path) -> dict[str, Any]:
    """What a capture holds, as one JSON document: totals, and the mean over prompts per layer."""
    import numpy as np

    from kascade_cli.capture.store import open_capture, stored_bytes

    with open_capture(output) as capture:
        prompts = list(capture)
        tiles = np.concatenate([prompt.tiles for prompt in prompts])
        importance = np.mean([prompt.importance for prompt in prompts], axis=0)
        top = np.mean([prompt.top_mass for prompt in prompts], axis=0)  # [Lp, H, K]
        keys = capture.meta["top_mass_keys"]
        layers = [
            {
                "layer": layer,
                "importance": round(float(importance[position]), 6),
                "top_mass": {key: round(float(top[position, :, k].mean()), 4) for k, key in enumerate(keys)},
                "worst_head": {key: round(float(top[position, :, k].min()), 4) for k, key in enumerate(keys)},
            }
            for position, layer in enumerate(capture.profiled_layers)
        ]
        meta = capture.meta
    return {
        "output": str(output),
        "model": {name: meta[f"model_{name}"] for name in ("name", "fingerprint")} | {"layers": meta["layers"]},
        "dev_set": {"name": meta["dev_set_name"], "sha256": meta["dev_set_sha256"]},
        "prompts": len(prompts),
        "tokens": sum(prompt.n_tokens for prompt in prompts),
        "tiles": {"prefill": int((tiles[:, 1] > 1).sum()), "decode": int((tiles[:, 1] == 1).sum())},
        "bytes": stored_bytes(output),
        "layers": layers,
    }


def _render(document: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=None, caption_justify="left")
    for name in ("layer", "importance", "top 64 keys", "top 5 %", "top 10 %", "worst head, 10 %"):
        table.add_column(name, justify="right")
    for row in document["layers"]:
        mass = row["top_mass"]
        values = (mass["64"], mass["5%"], mass["10%"], row["worst_head"]["10%"])
        table.add_row(str(row["layer"]), f"{row['importance']:.4f}", *(f"{value:.3f}" for value in values))
    out.print(table)
    legend = "importance: 1 - cos(x, x + attention); the rest: share of attention on the largest keys, decode rows"
    out.print(legend, soft_wrap=True)
    tiles, kept = document["tiles"], document["prompts"] - document["captured_now"]
    earlier = f" ({kept} of them earlier)" if kept else ""
    out.print(
        f"{document['output']}: {document['prompts']} prompts{earlier}, {document['tokens']} tokens, "
        f"{tiles['prefill']} prefill tiles, {tiles['decode']} decode rows, {format_bytes(document['bytes'])}, "
        f"{document['seconds']:.1f} s",
        markup=False,
        soft_wrap=True,
    )
