"""`kascade select-anchors`: from a capture to a profile. Parses, calls kascade_cli.analysis, renders."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import err, out, parse_size, print_json, progress
from kascade_cli.errors import KascadeError, UsageError, require_extra
from kascade_cli.files import check_output, check_output_folder


def select_anchors(
    capture: Annotated[Path, typer.Argument(metavar="CAPTURE", help="The HDF5 file that `kascade profile` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The YAML profile to write.")] = Path("profile.yaml"),
    phase: Annotated[
        Literal["decode", "prefill", "both"], typer.Option(help="Choose anchors for this phase, or the mean of both.")
    ] = "both",
    anchors: Annotated[int | None, typer.Option(help="This many anchors, the dense first layer included.")] = None,
    min_recovered: Annotated[
        float | None, typer.Option(help="The fewest anchors that recover this share of the mass, such as 0.98.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="The most anchors that are predicted to be this much faster than dense.")
    ] = None,
    max_anchors: Annotated[
        int | None, typer.Option(help="The largest number of anchors to look at. Default: half of the layers.")
    ] = None,
    weights: Annotated[
        Literal["importance", "uniform"], typer.Option(help="Weight of a layer in the objective.")
    ] = "importance",
    assignment: Annotated[
        Literal["nearest", "free"],
        typer.Option(help="Reuse heads read the nearest anchor before them, or whichever anchor serves them best."),
    ] = "nearest",
    verify: Annotated[
        int, typer.Option(min=0, help="Measure the N best sets of every size on held-out prompts; needs the model.")
    ] = 0,
    model: Annotated[str | None, typer.Option(help="The model to verify with. Default: the capture's.")] = None,
    verify_dev_set: Annotated[
        str | None, typer.Option(help="Where held-out prompts come from, as for `kascade profile`. Default: as there.")
    ] = None,
    verify_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to verify on.")] = 4,
    verify_length: Annotated[
        str | None, typer.Option(help="Longest held-out prompt, such as 2k. Default: the capture's longest.")
    ] = None,
    kl_tolerance: Annotated[
        float, typer.Option(min=0, help="With --verify and no other rule: nats above the best that are as good.")
    ] = 0.02,
    ratio: Annotated[float, typer.Option(help="Budget of the profile: share of the visible keys.")] = 0.10,
    min_keys: Annotated[int, typer.Option(help="Budget of the profile: at least this many keys.")] = 128,
    top_k: Annotated[int, typer.Option(min=1, help="Keys that similarity compares.")] = 64,
    over_tiles: Annotated[
        Literal["min", "mean"], typer.Option(help="A prompt's similarity is its worst tile's, or the mean.")
    ] = "min",
    cost: Annotated[
        Path | None, typer.Option(help="JSON of `kascade bench`. Default: the paper's H100 figures.")
    ] = None,
    context: Annotated[str, typer.Option(help="Context length that speed-ups are predicted for.")] = "128k",
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Resamples for the stability figures; 0 leaves them out.")
    ] = 200,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw the figures as PNG here.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read the capture.")] = None,
    dtype: Annotated[str, typer.Option(help="To verify in: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="To verify on: auto, cpu, cuda ...")] = "auto",
    backend: Annotated[str, typer.Option(help="To verify with: auto, torch or tilelang.")] = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing profile.")] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Choose anchor layers and head maps from a capture, and write the profile that attention runs."""
    check_output(output, overwrite)
    rules = {"anchors": anchors, "min_recovered": min_recovered, "target_speedup": target_speedup}
    length = parse_size(context, "--context")
    held_out_length = parse_size(verify_length, "--verify-length") if verify_length is not None else None

    from kascade_cli.analysis import cost as costs
    from kascade_cli.analysis import selection, similarity, stability
    from kascade_cli.capture.store import open_capture
    from kascade_cli.commands import selection_report as report
    from kascade_cli.schema import Budget, Profile

    selection.check_rules(**rules)
    if verify:
        from kascade_cli.kernels.backend import check_backend
        from kascade_cli.models import check_revision, resolve_device, resolve_dtype

        # What verification needs is refused before the capture is read, which takes longer.
        check_backend(backend)
        resolve_dtype(dtype)
        resolve_device(device)
    else:
        given = {
            "--model": model,
            "--verify-dev-set": verify_dev_set,
            "--verify-length": verify_length,
            "--revision": revision,
        }
        if unused := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{unused[0]} is for verification: pass --verify N too")
    if plots is not None:
        check_output_folder(plots)
        require_extra("matplotlib", "plot")
    budget = _budget(Budget, ratio, min_keys)
    table = costs.load(cost) if cost else costs.published()
    with open_capture(capture) as file:
        meta, layers = file.meta, len(file.profiled_layers)
        if verify:
            check_revision(model or meta["model_name"], revision)
        budget = budget.model_copy(update={"tile": meta["tile"]})
        if not file.complete:
            line = f"{capture}: {len(file)} of {meta['num_prompts']} prompts are captured; using these"
            err.print(line, markup=False, soft_wrap=True)
    limit = _limit(layers, anchors, max_anchors)

    with progress("reading the capture") as bar:
        measured = similarity.measure(
            capture,
            top_k=top_k,
            reduce=over_tiles,
            workers=workers,
            advance=lambda done, total: bar.update(bar.first, completed=done, total=total),
        )
    problem = selection.make_problem(measured, phase)
    for note in problem.notes:
        err.print(note, markup=False, soft_wrap=True)
    sets = selection.search_sets(problem, weights, limit, assignment)
    rows = [selection.make_row(problem, found, assignment, table, length) for found in sets]
    nearest = None
    if assignment == "free":
        nearest = [entry.objective for entry in selection.search_sets(problem, weights, limit, "nearest")]

    candidates: list[Any] = []
    verified: dict[str, Any] = {}
    if verify:
        fixed = (
            None
            if not any(value is not None for value in rules.values())
            else selection.choose(rows, phase=phase, **rules)
        )
        sizes = [fixed.row.size] if fixed else range(1, limit + 1)
        candidates = selection.candidates(problem, sizes, verify, assignment)
        options = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
        verified = _verify(
            meta,
            problem,
            candidates,
            assignment,
            budget,
            phase,
            model,
            options,
            backend,
            verify_dev_set or meta["dev_set_name"],
            verify_prompts,
            held_out_length,
        )
        best, why = selection.decide(candidates, fixed.row.size if fixed else None, kl_tolerance)
        row = selection.candidate_row(problem, best, weights, assignment, table, length)
        choice = selection.Choice(
            row, fixed.rule if fixed else "verify", f"{fixed.why}; of these {why}" if fixed else why
        )
    else:
        choice = selection.choose(rows, phase=phase, **rules)

    chosen = choice.row
    stable = None
    if bootstrap:
        stable = stability.bootstrap(measured, phase, weights, chosen.anchors, assignment, bootstrap)
    settings = {
        "method": "verify" if verify else "milp" if assignment == "free" else "dp",
        "phase": phase,
        "weights": weights,
        "assignment": assignment,
        "over_tiles": over_tiles,
        "top_k": top_k,
    }
    profile = Profile.build(
        model=report.model_card(meta),
        anchors=problem.absolute(chosen.anchors),
        profiled_layers=problem.layers,
        head_maps=selection.head_maps(problem, chosen.anchors, assignment),
        budget=budget,
        selection=report.selection_document(settings, problem, choice, rows, stable, candidates, verified),
        provenance=report.provenance(capture, meta, measured, table, length),
    )
    drawn = []
    if plots:
        from kascade_cli.analysis.plots import draw_all

        drawn = draw_all(plots, measured, problem, rows, chosen, candidates)
    profile.save(output, overwrite=overwrite)
    document = report.result_document(
        output, problem, choice, rows, nearest, table, length, stable, candidates, verified
    )
    document["notes"], document["plots"] = problem.notes, [str(path) for path in drawn]
    print_json(document) if as_json else report.render(document, out)


def _budget(kind: Any, ratio: float, min_keys: int) -> Any:
    if not 0 < ratio <= 1:
        raise UsageError(f"--ratio {ratio} is outside (0, 1]")
    if min_keys < 1:
        raise UsageError(f"--min-keys {min_keys} must be 1 or more")
    return kind(ratio=ratio, min_keys=min_keys)


def _limit(layers: int, anchors: int | None, max_anchors: int | None) -> int:
    """The largest number of anchors to look at. Raises UsageError for numbers that the model cannot have."""
    from kascade_cli.analysis.selection import default_max_anchors

    for name, value in (("--anchors", anchors), ("--max-anchors", max_anchors)):
        if value is not None and not 1 <= value <= layers:
            raise UsageError(f"{name} {value} is outside 1..{layers}: the capture has {layers} full-attention layers")
    if anchors is not None and max_anchors is not None and anchors > max_anchors:
        raise UsageError(f"--anchors {anchors} is more than --max-anchors {max_anchors}")
    return max_anchors or max(default_max_anchors(layers), anchors or 0)


def _verify(
    meta: dict[str, Any],
    problem: Any,
    candidates: list[Any],
    assignment: str,
    budget: Any,
    phase: str,
    name: str | None,
    options: dict[str, Any],
    backend: str,
    source: str,
    num_prompts: int,
    max_length: int | None,
) -> dict[str, Any]:
    """Fills in the candidates' KL; returns what the profile records about the verification."""
    from kascade_cli.analysis.selection import head_maps
    from kascade_cli.commands.selection_report import model_card
    from kascade_cli.evaluation.kl import held_out_prompts, measure_kl
    from kascade_cli.integrations.transformers import compile_ahead
    from kascade_cli.models import describe, load_model
    from kascade_cli.schema import PHASES, Profile

    name = name or meta["model_name"]
    model, tokenizer = load_model(name, **options)
    info = describe(model, name)
    if info.fingerprint != meta["model_fingerprint"]:
        raise KascadeError(f"the capture was made from {meta['model_name']}, whose weights are not those of {name}")
    max_length = max_length or meta["max_length"]
    if info.max_positions and max_length > info.max_positions:
        raise UsageError(f"--verify-length {max_length} is more than the {info.max_positions} positions of {name}")
    devset = held_out_prompts(meta, tokenizer, source, num_prompts=num_prompts, max_length=max_length)
    profiles = [
        Profile.build(
            model=model_card(meta),
            anchors=problem.absolute(entry.anchors),
            profiled_layers=problem.layers,
            head_maps=head_maps(problem, entry.anchors, assignment),
            budget=budget,
        )
        for entry in candidates
    ]
    phases = list(PHASES) if phase == "both" else [phase]
    compile_ahead(model, profiles[0], backend=backend)
    with progress("verifying", total=len(profiles) * len(devset.prompts)) as bar:
        results = measure_kl(
            model,
            profiles,
            devset.prompts,
            devset.answer_positions,
            phases,
            backend=backend,
            advance=lambda: bar.update(bar.first, advance=1),
        )
    for entry, result in zip(candidates, results, strict=True):
        entry.kl, entry.prompts = result.kl, result.prompts
    return {
        "model": name,
        "dev_set": devset.name,
        "dev_set_sha256": devset.sha256,
        "prompts": len(devset.prompts),
        "max_length": devset.max_length,
        "positions": "answers" if any(devset.answer_positions) else "last",
        "phases": phases,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
