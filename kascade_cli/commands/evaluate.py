"""`kascade evaluate`: exact match of strategies on long-context questions, with intervals and targets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli import processes, provenance
from kascade_cli.commands import options as shared
from kascade_cli.console import compiling, format_size, note, out, parse_floats, parse_sizes, print_json, progress
from kascade_cli.errors import KascadeError, TargetMissed, UsageError, require_extra
from kascade_cli.files import check_output
from kascade_cli.help import BUDGET, OUTPUT, PROMPTS, examples

DEFAULT_LENGTH, NATURAL_LENGTH = 1024, 4096
COMPARED = "How attention runs"
_WIDTH = 120
_PACKAGES = ("torch", "transformers", "tilelang")


@shared.shared_out
@examples(
    "kascade evaluate demo --profile profiles/demo.yaml",
    "kascade evaluate demo --profile profiles/demo.yaml --strategies dense,kascade,quest,streaming-llm:ratio=0.3",
    "kascade evaluate MODEL --profile profile.yaml --task questions.jsonl --require 'kascade >= dense - 2'",
)
def evaluate(
    model: shared.Model,
    strategies: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Comma-separated, options after colons (streaming-llm:ratio=0.3). There are: {strategies}.",
            rich_help_panel=COMPARED,
        ),
    ] = "dense,kascade,streaming-llm",
    profile: shared.ProfileFile = None,
    anchors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="Also kascade with other anchors: random:10 (mean of 10 draws) or 0,2,7. Repeatable.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    capture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Capture to take the head maps of --anchors from. Default: none, all heads share one key set.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="Target in points: 'kascade >= dense - 2', 'two-hop: kascade >= 90'. A miss exits with 3.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Built-in tasks, comma-separated (mix, niah_multikey_1, vt ...: docs/tasks.md), or a .jsonl file. "
            "Default: mix, which is several; what a demo model was trained on.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    max_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens of a prompt (of a demo task: before the questions), such as 1k,2k. "
            "Default: 1k for demo tasks, 4k for others; of a file, what the model takes.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=shared.MOST_PROMPTS,
            metavar="N",
            help="Prompts per length. Default: 16; of a file, all its rows.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Questions of each task about one prompt. Default: 8 for demo tasks, 4 for others.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65536,
            metavar="N",
            help="Room for an answer. Default: each task's own.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    haystack: shared.Haystack = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Send prompts of a file through the chat template, as tasks like mix are.",
            rich_help_panel=PROMPTS,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=shared.LARGEST_SEED,
            metavar="N",
            help="Chooses the test prompts and the random anchors.",
            rich_help_panel=PROMPTS,
        ),
    ] = 0,
    ratio: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Shares of the keys to read, such as 0.05,0.1,0.2. Default: the profile's.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    min_keys: shared.MinKeys = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    device_map: shared.DeviceMap = None,
    backend: shared.Backend = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.TrustRemoteCode = False,
    allow_other_weights: shared.AllowOtherWeights = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figure to this PNG.", rich_help_panel=OUTPUT)
    ] = None,
    overwrite: shared.Overwrite = False,
    as_json: shared.AsJson = False,
) -> None:
    """Score attention strategies on the same questions: answers, 95 % intervals, density.

    Test prompts come from seeds that no dev set uses. Every question is answered greedily under its strategy. Under
    torchrun or accelerate launch the processes share the prompts.
    """
    team = processes.team()
    follows = team is not None and not team.leader
    if plot and not follows:
        asked = [name for given in task or () for name in given.split(",")]
        check_output(plot, overwrite, [model, profile, capture, *asked])
        if plot.suffix.lower() != ".png":
            raise UsageError(f"--plot {plot}: the figure is a PNG; name a file that ends in .png")
        require_extra("matplotlib", "plot")
    lengths = parse_sizes(max_length, "--max-length") if max_length is not None else []
    ratios = parse_floats(ratio) if ratio is not None else [None]

    from kascade_cli.schema import Profile

    loaded_profile = Profile.load(profile) if profile else None

    from kascade_cli.evaluation.anchors import parse_anchors
    from kascade_cli.evaluation.answering import follow_answers
    from kascade_cli.evaluation.batched import grouped
    from kascade_cli.evaluation.cases import Asking, gather_cases, named_tasks
    from kascade_cli.evaluation.plan import anchors_label, check_strategies, parse_strategies, plan_runs
    from kascade_cli.evaluation.require import parse_requirement
    from kascade_cli.evaluation.run import run_table
    from kascade_cli.integrations.transformers import compile_ahead
    from kascade_cli.models import describe, gpu_name
    from kascade_cli.sparse import Setting

    shared.check_haystack(haystack)
    _, sources = named_tasks(task, model)
    # A file has the lengths it has; built-in texts are made to one.
    lengths = lengths or [NATURAL_LENGTH if sources.natural else DEFAULT_LENGTH if sources.kinds else None]
    sets = {text: parse_anchors(text) for text in anchors or []}
    base = Setting(profile=loaded_profile, min_keys=min_keys, backend=backend, allow_other_weights=allow_other_weights)
    named = parse_strategies(strategies, base)
    check_strategies(named, ratios)
    _check(ratios, lengths, loaded_profile, sets, capture, chat, sources)
    labels = [label for label, _ in named] + list(dict.fromkeys(anchors_label(chosen) for chosen in sets.values()))
    kinds = sources.names
    targets = [parse_requirement(text, labels, kinds) for text in require or []]

    told: list[str] = []  # shown once nothing is left to refuse
    loading = shared.Loading(dtype, device, device_map, revision, trust_remote_code)
    loaded, tokenizer = loading.load(model, told.append)
    split = device_map == "tp"  # every process runs everything, with its heads
    if follows and not split:
        follow_answers(team, loaded)
        return
    info = describe(loaded, model)
    asking = Asking(num_prompts, questions, seed, chat, max_new_tokens, haystack, note)
    found = [(length, gather_cases(sources, tokenizer, info, length, asking)) for length in lengths]
    cases = {length or max(case.tokens for case in part): part for length, part in found}
    runs, maps = plan_runs(named, ratios, sets, capture, info, base, seed)

    for line in told:
        note(line)
    for part in () if split else cases.values():
        shared.few(len(list(grouped(part))), "groups of questions")
    if any(run.strategy != "dense" for run in runs):
        compile_ahead(loaded, loaded_profile, backend=backend, progress=compiling)
    passes = sum(len(run.settings) for run in runs)
    # Time grows with the tokens read, so they are what the bar counts.
    total = sum(case.tokens for part in cases.values() for case in part) * passes
    with progress("evaluating", total=total) as bar:

        def show(what: str, tokens: int) -> None:
            bar.update(bar.first, description=what, advance=tokens)

        rows = run_table(loaded, tokenizer, cases, runs, show, note, None if split else team)
    verdicts = [verdict for target in targets for verdict in target.check(rows)]
    document = {
        "command": provenance.command_line("evaluate"),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(_PACKAGES),
        "gpu": gpu_name(loaded.device),
        "model": model,
        "fingerprint": info.fingerprint,
        "profile": str(profile) if profile else None,
        "tasks": kinds,
        "seed": seed,
        "split": "test",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "rows": rows,
        "requirements": verdicts,
    }
    if sets:
        document["head_maps_of_other_anchors"] = maps
    if plot and not follows:
        from kascade_cli.evaluation.plot import draw

        draw(document, plot)
        note(f"wrote {plot}")
    print_json(document) if as_json else _render(document)
    _judge(verdicts)


def _check(
    ratios: list[float | None],
    lengths: list[int | None],
    profile: Any,
    sets: dict[str, Any],
    capture: Path | None,
    chat: bool,
    sources: Any,
) -> None:
    """Refuses what cannot work before a model is loaded."""
    for option, values in (("--ratio", ratios), ("--max-length", lengths)):
        if len(set(values)) < len(values):
            raise UsageError(f"{option} names {next(v for v in values if values.count(v) > 1)} twice")
    if sets and profile is None:
        raise UsageError("--anchors varies the anchors of a profile: pass --profile")
    if capture and not sets:
        raise UsageError("--capture gives the head maps of --anchors: pass --anchors too")
    if chat and not sources.files:
        raise UsageError("--chat is for prompts of a file: built-in tasks know what they need")
    for path in sources.files:
        if not path.is_file():
            raise KascadeError(f"cannot read {path}: No such file or directory")
    if capture:
        from kascade_cli.capture.store import open_capture

        open_capture(capture).close()


def _render(document: dict[str, Any]) -> None:
    from rich.table import Table

    if not out.is_terminal:
        out.width = max(out.width, _WIDTH)  # a pipe or a file has no width of its own
    tasks = document["tasks"]
    for length in dict.fromkeys(row["length"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["length"] == length]
        asked = rows[0]["mean"]
        table = Table(
            title=f"{format_size(length)} tokens, {asked['prompts']} prompts, {asked['questions']} questions",
            title_justify="left",
            title_style="bold",
        )
        table.add_column("strategy", no_wrap=True)
        for name in ("ratio", "keys read"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in [*tasks, "mean"] if len(tasks) > 1 else tasks:
            table.add_column(name.replace("-", " "), justify="right", overflow="fold")
        for row in rows:
            scores = [row["scores"][task] for task in tasks] + ([row["mean"]] if len(tasks) > 1 else [])
            table.add_row(
                row["strategy"],
                "" if row["ratio"] is None else f"{row['ratio']:g}{'*' if 'ratios' in row else ''}",
                _density(row["density"]),
                *(_cell(score) for score in scores),
            )
        out.print(table)
    out.print(
        "answers in points of 100, ± the farther 95 % limit (prompts as clusters); second line: difference to "
        "dense on the same questions\nkeys read: prefill / decode, in % of the keys visible",
        soft_wrap=True,
    )
    if any("ratios" in row for row in document["rows"]):
        out.print("* at the longest prompt: the profile's budget is a table by context length (kascade show)")
    randoms = [row for row in document["rows"] if "draws" in row]
    for row in randoms:
        out.print(
            f"random, ratio {row['ratio']:g} at {format_size(row['length'])}: {len(row['draws'])} sets of "
            f"{len(row['anchors'][0])} anchors ({document['head_maps_of_other_anchors']} head maps), means from "
            f"{min(row['draws']):.1f} to {max(row['draws']):.1f}",
            soft_wrap=True,
        )
    from kascade_cli.sparse.strategies.kascade import UNMEASURED

    pooled = [row["strategy"] for row in document["rows"] if row.get("head_maps") == UNMEASURED]
    if pooled:
        note(f"note: head maps not measured: {', '.join(dict.fromkeys(pooled))} ran pooled, one key set for all heads")
    full = [row for row in document["rows"] if row["ratio"] is not None and row["density"]["all"] == 1.0]
    for row in full:
        note(
            f"note: {row['strategy']} read every key at {format_size(row['length'])} tokens and ratio "
            f"{row['ratio']:g} (at least {row['min_keys']} keys): that is dense attention"
        )


def _density(density: dict[str, float]) -> str:
    return " / ".join(f"{100 * density[phase]:.3g}" if phase in density else "-" for phase in ("prefill", "decode"))


def _cell(score: dict[str, Any]) -> str:
    text = f"{score['score']:.1f} ±{_reach(score):.1f}"
    if "vs_dense" in score:
        text += f"\n{score['vs_dense']['score']:+.1f} ±{_reach(score['vs_dense']):.1f}"
    return text


def _reach(score: dict[str, float]) -> float:
    return max(score["high"] - score["score"], score["score"] - score["low"])


def _judge(verdicts: list[dict[str, Any]]) -> None:
    from kascade_cli.evaluation.require import describe_verdict

    for verdict in verdicts:
        if verdict["met"]:
            note(f"met: {describe_verdict(verdict)}")
    missed = [verdict for verdict in verdicts if not verdict["met"]]
    if missed:
        more = f"; and {len(missed) - 1} more" if len(missed) > 1 else ""
        for verdict in missed[1:]:
            note(f"missed: {describe_verdict(verdict)}")
        raise TargetMissed(f"missed: {describe_verdict(missed[0])}{more}")
