"""What `select-anchors` says and records: the profile's `selection` and `provenance`, tables and JSON."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kascade_cli import __version__
from kascade_cli.errors import KascadeError


def model_card(meta: dict[str, Any]) -> Any:
    """The profile's model section from a capture's root attributes. Raises KascadeError if they make no
    sense.
    """
    from pydantic import ValidationError

    from kascade_cli.schema import ModelCard

    try:
        return ModelCard(
            name=meta["model_name"],
            fingerprint=meta["model_fingerprint"],
            **{key: meta[key] for key in ("layers", "query_heads", "kv_heads", "head_dim")},
        )
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "model"
        raise KascadeError(f"the capture's description of its model is wrong: {place}: {problem['msg']}") from error


def file_sha256(path: Path) -> str:
    """sha256 of a capture's bytes; of an index and its parts, of all of them in order."""
    from kascade_cli.capture.store import parts_folder

    digest = hashlib.sha256()
    for part in [path, *sorted(parts_folder(path).glob("*.h5"))]:
        with part.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def provenance(capture: Path, meta: dict[str, Any], measured: Any, table: Any, context: int) -> dict[str, Any]:
    """Where a profile comes from."""
    from importlib.metadata import version

    return {
        "tool": f"kascade {__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "capture": capture.name,
        "capture_sha256": file_sha256(capture),
        "capture_tool": meta["tool_version"],
        "dev_set": {"name": meta["dev_set_name"], "sha256": meta["dev_set_sha256"], "seed": meta["seed"]},
        "prompts": measured.prompts,
        "max_length": meta["max_length"],
        "tiles": dict(measured.tiles),
        "cost": {"source": table.source, "context": context},
        "versions": meta["versions"] | {name: version(name) for name in ("numpy", "scipy", "h5py")},
    }


def _number(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else round(float(value), digits)


def row_document(problem: Any, row: Any) -> dict[str, Any]:
    """One budget, absolute layers."""
    worst, layer = row.worst
    return {
        "anchors": problem.absolute(row.anchors),
        "objective": _number(row.objective),
        "recovered_mean": _number(row.recovered_mean),
        "recovered_worst": _number(worst),
        "worst_layer": problem.layers[layer],
        "speedup": {phase: _number(value, 3) for phase, value in row.speedup.items()},
    } | ({} if row.proven else {"proven_optimal": False})


def candidate_document(problem: Any, entry: Any) -> dict[str, Any]:
    """One verified candidate. `rank_by` holds the objective under each weighting that proposes it."""
    return {
        "anchors": problem.absolute(entry.anchors),
        "objectives": {name: _number(value) for name, value in entry.objectives.items()},
        "kl": {phase: _number(value) for phase, value in entry.kl.items()},
        "kl_mean": _number(entry.score),
        "prompts": entry.prompts,
    }


def stability_document(problem: Any, stable: Any) -> dict[str, Any]:
    """Shares over resamples; layers that were never chosen are left out."""
    chosen = zip(problem.layers, stable.chosen, strict=True)
    return {
        "resamples": stable.resamples,
        "searched": problem.absolute(stable.searched),
        "searched_again": _number(stable.same_set, 4),
        "head_map_entries_kept": _number(stable.heads, 4),
        "layer_chosen": {str(layer): _number(share, 4) for layer, share in chosen if share > 0},
    }


def selection_document(
    settings: dict[str, Any],
    problem: Any,
    choice: Any,
    rows: Sequence[Any],
    stable: Any,
    candidates: Sequence[Any],
    verified: dict[str, Any],
) -> dict[str, Any]:
    """The profile's `selection`."""
    from kascade_cli.analysis.selection import recovered_dict

    document = settings | {
        "anchors": problem.absolute(choice.row.anchors),
        "objective": _number(choice.row.objective),
        "recovered_mass": recovered_dict(problem, choice.row),
        "rule": choice.rule,
        "why": choice.why,
    }
    if problem.notes:
        document["notes"] = problem.notes
    if stable:
        document["stability"] = stability_document(problem, stable)
    if verified:
        document["verify"] = verified | {"candidates": [candidate_document(problem, entry) for entry in candidates]}
    document["budgets"] = [row_document(problem, row) for row in rows]
    return document


def result_document(
    output: Path,
    problem: Any,
    choice: Any,
    rows: Sequence[Any],
    nearest: Sequence[float] | None,
    table: Any,
    context: int,
    stable: Any,
    candidates: Sequence[Any],
    verified: dict[str, Any],
) -> dict[str, Any]:
    """What the command prints."""
    budgets = [row_document(problem, row) for row in rows]
    for entry, objective in zip(budgets, nearest or [], strict=False):
        entry["objective_nearest"] = _number(objective)
    return {
        "profile": str(output),
        "chosen": row_document(problem, choice.row),
        "rule": choice.rule,
        "why": choice.why,
        "budgets": budgets,
        "cost": {"source": table.source, "context": context},
        "stability": stability_document(problem, stable) if stable else None,
        "verify": verified | {"candidates": [candidate_document(problem, entry) for entry in candidates]}
        if verified
        else None,
    }


def join(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def budget_table(budgets: Sequence[dict[str, Any]], chosen: Sequence[int], cost: dict[str, Any]) -> Any:
    """The Pareto table; the chosen row is marked."""
    from rich.table import Table

    from kascade_cli.console import format_size

    table = Table(
        title="Best anchors for every budget", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    free = any("objective_nearest" in row for row in budgets)
    table.add_column("", width=1)
    table.add_column("M", justify="right")
    table.add_column("anchors")
    for name in ["objective", *(["nearest"] if free else []), "recovered", "worst layer", "decode", "prefill"]:
        table.add_column(name, justify="right")
    for row in budgets:
        mark = "*" if row["anchors"] == list(chosen) else ""
        values = [f"{row['objective']:.4f}" + ("" if row.get("proven_optimal", True) else "?")]
        if free:
            values.append(f"{row['objective_nearest']:.4f}")
        values += [f"{row['recovered_mean']:.1%}", f"{row['recovered_worst']:.1%} ({row['worst_layer']})"]
        values += [_times(row["speedup"][phase]) for phase in ("decode", "prefill")]
        table.add_row(mark, str(len(row["anchors"])), join(row["anchors"]), *values)
    table.caption = f"speed-up of attention at {format_size(cost['context'])} predicted from {cost['source']}"
    table.caption_justify = "left"
    return table


def verify_table(verified: dict[str, Any], chosen: Sequence[int]) -> Any:
    """Candidates beside their measured KL; the chosen one is marked."""
    from rich.table import Table

    title = f"Measured on {verified['prompts']} held-out prompts of '{verified['dev_set']}': KL(dense || sparse), nats"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", width=1)
    table.add_column("M", justify="right")
    table.add_column("anchors")
    for name in ("importance", "uniform", *verified["phases"], "mean", "prompts"):
        table.add_column(name, justify="right")
    for entry in verified["candidates"]:
        objectives = [entry["objectives"].get(name) for name in ("importance", "uniform")]
        table.add_row(
            "*" if entry["anchors"] == list(chosen) else "",
            str(len(entry["anchors"])),
            join(entry["anchors"]),
            *("-" if value is None else f"{value:.4f}" for value in objectives),
            *(f"{entry['kl'][phase]:.4f}" for phase in verified["phases"]),
            f"{entry['kl_mean']:.4f}",
            str(entry["prompts"]),
        )
    table.caption = (
        "importance, uniform: objective under the weighting that proposes the set; fewer prompts: given up early"
    )
    table.caption_justify = "left"
    return table


def stability_lines(stable: dict[str, Any]) -> list[str]:
    """Two lines about the bootstrap."""
    shares = sorted(stable["layer_chosen"].items(), key=lambda item: int(item[0]))
    kept = stable["head_map_entries_kept"]
    maps = "" if kept is None else f"; {kept:.0%} of the chosen set's head-map entries stay"
    again = f"the objective alone gives {join(stable['searched'])} again in {stable['searched_again']:.0%}"
    return [
        f"bootstrap over prompts, {stable['resamples']} resamples: {again}{maps}",
        "how often it chooses each layer: " + ", ".join(f"{layer} {share:.0%}" for layer, share in shares),
    ]


def render(document: dict[str, Any], out: Any) -> None:
    """Prints the result for people."""
    chosen = document["chosen"]["anchors"]
    out.print(budget_table(document["budgets"], chosen, document["cost"]))
    if document["verify"]:
        out.print()
        out.print(verify_table(document["verify"], chosen))
    out.print()
    speed = ", ".join(f"{phase} {_times(value)}" for phase, value in document["chosen"]["speedup"].items())
    recovered = document["chosen"]["recovered_mean"]
    out.print(f"chosen: {join(chosen)} (recovers {recovered:.1%}; predicted {speed})", markup=False, soft_wrap=True)
    out.print(f"because: {document['why']}", markup=False, soft_wrap=True)
    if document["stability"]:
        for line in stability_lines(document["stability"]):
            out.print(line, markup=False, soft_wrap=True)
    for path in document["plots"]:
        out.print(f"wrote {path}", markup=False, soft_wrap=True)
    out.print(f"wrote {document['profile']}", markup=False, soft_wrap=True)
