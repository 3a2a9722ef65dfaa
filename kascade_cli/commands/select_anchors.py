"""`kascade select-anchors`: from a capture to a profile. Parses, calls kascade_cli.analysis, renders."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from kascade_cli import processes
from kascade_cli.commands import options as shared
from kascade_cli.commands import selection_steps as steps
from kascade_cli.console import Steps, note, out, parse_size, print_json, progress
from kascade_cli.errors import UsageError
from kascade_cli.files import check_name, check_output
from kascade_cli.help import BUDGET, OUTPUT, examples

_CHOICE = "How many anchors (one rule, or the default)"
_SEARCH = "What makes anchors good"
_VERIFY = "Measure on the model"
_SPEED = "Predicted speed-up"


@shared.shared_out
@examples(
    "kascade select-anchors capture.h5 -o profile.yaml",
    "kascade select-anchors capture.h5 --anchors 5 --plots figures",
    "kascade select-anchors capture.h5 --anchors 0,2,8,13,14   # these layers",
)
def select_anchors(
    capture: Annotated[Path, typer.Argument(metavar="CAPTURE", help="The HDF5 file that `kascade profile` wrote.")],
    anchors: Annotated[
        str | None,
        typer.Option(
            metavar="M|LAYERS",
            help="This many anchors, the dense first layer included; or which layers, such as 0,2,8,13,14.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    min_recovered: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The fewest anchors that keep this share of the attention at the budget, such as 0.95.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES",
            help="The most anchors that are predicted to be this much faster than dense.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    max_anchors: Annotated[
        int | None,
        typer.Option(
            metavar="M",
            help="The largest number of anchors to look at. Default: a quarter of the layers.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Measure sets on held-out prompts, or choose by the similarity. Default: if the model is here.",
            show_default=False,
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Best sets of every size and weighting to measure.",
            rich_help_panel=_VERIFY,
        ),
    ] = 1,
    verify_prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=shared.MOST_PROMPTS,
            help="Held-out prompts to verify on. Default: 24 on a GPU, 24 more for the best sets; 8 on a CPU.",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    verify_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Length of held-out prompts, such as 2k. Default: 16k, 8k and 4k on a GPU, 2k on a CPU; never "
            "more than the capture's longest.",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    verify_dev_set: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="Where held-out prompts come from, as for `kascade profile`. Default: as there.",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    kl_tolerance: Annotated[
        float,
        typer.Option(
            metavar="NATS", min=0, help="Without a rule: KL above the best that is as good.", rich_help_panel=_VERIFY
        ),
    ] = 0.02,
    lost_tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Answers lost, above what the best set (or ratio) loses, that are as good. Default: 0.01 for sets, "
            "0.03 for ratios.",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The model to verify with. Default: the capture's.",
            rich_help_panel=_VERIFY,
        ),
    ] = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    backend: shared.Backend = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    phase: Annotated[
        Literal["decode", "prefill", "both"],
        typer.Option(help="Choose anchors for this phase, or the mean of both.", rich_help_panel=_SEARCH),
    ] = "both",
    weights: Annotated[
        Literal["importance", "uniform"],
        typer.Option(help="Weight of a layer in the objective.", rich_help_panel=_SEARCH),
    ] = "importance",
    assignment: Annotated[
        Literal["nearest", "free"],
        typer.Option(
            help="Reuse heads read the nearest anchor before them, or whichever anchor serves them best.",
            rich_help_panel=_SEARCH,
        ),
    ] = "nearest",
    heads: Annotated[
        Literal["auto", "maps", "pooled"],
        typer.Option(
            help="What a head of a reuse layer reads: the keys of one anchor head (maps), or those that all of them "
            "choose together (pooled). auto: what does better on held-out prompts; maps where nothing is measured.",
            rich_help_panel=_SEARCH,
        ),
    ] = "auto",
    tensor_parallel: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Head maps that stay within the KV heads of each of N ranks, for serving on N GPUs.",
            rich_help_panel=_SEARCH,
        ),
    ] = 1,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=2**31 - 1, help="Keys that similarity compares.", rich_help_panel=_SEARCH
        ),
    ] = 64,
    over_tiles: Annotated[
        Literal["min", "mean"],
        typer.Option(help="A prompt's similarity is its worst tile's, or the mean.", rich_help_panel=_SEARCH),
    ] = "min",
    bootstrap: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=100_000,
            help="Resamples for the stability figures; 0 leaves them out.",
            rich_help_panel=_SEARCH,
        ),
    ] = 200,
    ratio: Annotated[
        str,
        typer.Option(
            metavar="SHARE|auto",
            help="Share of the visible keys to read; auto: the smallest that keeps the answers, for each length.",
            rich_help_panel=BUDGET,
        ),
    ] = "0.10",
    min_keys: Annotated[
        int, typer.Option(metavar="N", help="Read at least this many keys.", rich_help_panel=BUDGET)
    ] = 128,
    cost: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON of `kascade bench`. Default: the paper's H100 figures.", rich_help_panel=_SPEED
        ),
    ] = None,
    context: Annotated[
        str,
        typer.Option(metavar="N", help="Context length that speed-ups are predicted for.", rich_help_panel=_SPEED),
    ] = "128k",
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The YAML profile to write.", rich_help_panel=OUTPUT),
    ] = Path("profile.yaml"),
    overwrite: shared.Overwrite = False,
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also draw the figures as PNG here.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: shared.AsJson = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=1024, help="Processes that read the capture.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Choose anchor layers and head maps from a capture, and write the profile that attention runs.

    An anchor is a layer that chooses keys; the other layers read, head by head, what an anchor chose. Under torchrun
    or accelerate launch the processes share the runs over held-out prompts.
    """
    check_name(capture, "CAPTURE")
    team = processes.team()
    follows = team is not None and not team.leader
    if not follows:  # else the leader's, which may have written it
        check_output(output, overwrite, [capture, model, verify_dev_set, cost])
    if device_map == "tp":
        raise UsageError("--device-map tp is for profile and evaluate; sets are measured on whole models: use auto")
    length = parse_size(context, "--context")
    held_out_length = parse_size(verify_length, "--verify-length") if verify_length is not None else None

    from kascade_cli.analysis import cost as costs
    from kascade_cli.analysis import decision as deciding
    from kascade_cli.analysis import record, similarity
    from kascade_cli.analysis.rank_maps import check_ranks
    from kascade_cli.capture.store import open_capture
    from kascade_cli.commands import selection_report as report
    from kascade_cli.evaluation.journal import journal_path
    from kascade_cli.evaluation.session import Verification
    from kascade_cli.evaluation.verification import verify as measure_candidates

    settings = deciding.Settings(
        phase=phase,
        weights=weights,
        assignment=assignment,
        anchors=steps.anchors(anchors),
        min_recovered=min_recovered,
        target_speedup=target_speedup,
        max_anchors=max_anchors,
        kl_tolerance=kl_tolerance,
        lost_tolerance=lost_tolerance,
        tensor_parallel=tensor_parallel,
        heads=heads,
    )
    verification = Verification(
        model=model,
        dev_set=verify_dev_set,
        prompts=verify_prompts,
        max_length=held_out_length,
        dtype=dtype,
        device=device,
        device_map=device_map,
        backend=backend,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    share, auto = steps.parse_ratio(ratio, verify)
    wanted = steps.check_verification(verify, verification, settings, candidates) or auto
    if follows:
        steps.follow(team, verification)
        return
    if plots is not None:
        steps.check_plots(plots, overwrite)
    deciding.capture_budget({"tile": 1}, share, min_keys)  # refused before the capture is read, which takes longer
    table = costs.load(cost) if cost else costs.published()
    with open_capture(capture) as file:
        settings.limit(file.profiled_layers)
        budget = deciding.capture_budget(file.meta, share, min_keys)
        record.model_card(file.meta)
        check_ranks(tensor_parallel, file.meta["kv_heads"], file.meta["model_name"])
        if verify is not False:
            verification.check_capture(file.meta)
            if wanted:
                verification.check_model(file.meta)
        if not file.complete:
            note(f"{capture}: {len(file)} of {file.meta['num_prompts']} prompts are captured; using these")

    with progress("reading the capture") as bar:
        measured = similarity.measure(
            capture,
            top_k=top_k,
            reduce=over_tiles,
            workers=workers,
            advance=lambda done, total: bar.update(bar.first, completed=done, total=total),
        )
    search = deciding.Search(
        measured, settings, budget=budget, cost=table, context=length, workers=workers,
        advance=steps.reading_again(),
    )  # fmt: skip
    for line in search.problem.notes:
        note(line)
    measured_sets, verified = [], {}
    session = None if verify is False else steps.open_session(search, verification, wanted)
    if auto:
        steps.check_ratios(session)
    if session is not None:
        journal, proposed = session.journal(journal_path(output), note), search.candidates(candidates)
        with steps.kept(journal), Steps("verifying") as shown:
            measured_sets, verified = measure_candidates(
                search, proposed, session=session, journal=journal, report=shown.update
            )
    decision = search.decide(measured_sets, verified)
    if auto:
        with steps.kept(journal):
            budget = steps.find_ratios(session, search, decision, journal)
    for line in decision.notes:
        note(line)
    search.bootstrap(decision, bootstrap)
    origin = record.provenance_document(capture, measured, table, length)
    profile = search.profile(decision, budget, provenance=origin)

    drawn = steps.draw(plots, search, decision) if plots else []
    document = report.result_document(output, search, decision, budget, drawn)
    shown = [] if as_json else report.renderables(document)
    profile.save(output, overwrite=overwrite)
    if session is not None:
        journal.remove()
    if as_json:
        print_json(document)
    for part in shown:
        out.print(part, soft_wrap=isinstance(part, Text))
