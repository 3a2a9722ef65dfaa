"""What a decision leaves behind: the profile's `selection` and `provenance` as plain data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from kascade_cli import provenance
from kascade_cli.analysis.rows import figures_dict, worst_layer
from kascade_cli.capture.store import parts_folder
from kascade_cli.errors import KascadeError
from kascade_cli.schema import Budget, ModelCard

if TYPE_CHECKING:
    from kascade_cli.analysis.candidates import Candidate
    from kascade_cli.analysis.cost import CostTable
    from kascade_cli.analysis.decision import Decision
    from kascade_cli.analysis.problem import Problem
    from kascade_cli.analysis.rows import Row
    from kascade_cli.analysis.similarity import Measured
    from kascade_cli.analysis.stability import Stability


def model_card(meta: dict[str, Any]) -> ModelCard:
    """The profile's model section from a capture's root attributes. Raises KascadeError if they make no sense."""
    shape = {key: meta[key] for key in ("layers", "query_heads", "kv_heads", "head_dim")}
    name = provenance.portable_name(meta["model_name"])
    return _made(ModelCard, "the capture's description of its model", "model", name=name,
                 fingerprint=meta["model_fingerprint"], **shape)  # fmt: skip


def budget(**values: Any) -> Budget:
    """Raises KascadeError for values that make no sense."""
    return _made(Budget, "the budget", "budget", **values)


def _made(kind: type[BaseModel], what: str, place: str, **values: Any) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or place
        raise KascadeError(f"{what} is wrong: {where}: {problem['msg'].removeprefix('Value error, ')}") from error


def provenance_document(capture: Path, measured: "Measured", table: "CostTable", context: int) -> dict[str, Any]:
    """Where a profile comes from. Of paths only what means something on another machine."""
    meta = measured.meta
    parts = sorted(parts_folder(capture).glob("*.h5"))
    return {
        "tool": provenance.tool(),
        "created": provenance.now(),
        "capture": capture.name,
        # Of an index and its parts: of all of them in order.
        "capture_sha256": provenance.file_sha256(capture, *parts),
        "capture_tool": meta["tool_version"],
        "dev_set": {
            "name": provenance.portable_name(meta["dev_set_name"]),
            "sha256": meta["dev_set_sha256"],
            "seed": meta["seed"],
        },
        "prompts": measured.prompts,
        "max_length": meta["max_length"],
        "tiles": dict(measured.tiles),
        "cost": {"source": table.source, "context": context},
        "versions": meta["versions"] | provenance.versions(("numpy", "scipy", "h5py")),
    }


def number(value: float | None, digits: int = 6) -> float | None:
    """Rounded; None for what is no number (a set whose logits are NaN has an infinite KL)."""
    return None if value is None or not math.isfinite(value) else round(float(value), digits)


def row_document(problem: "Problem", row: "Row") -> dict[str, Any]:
    """One budget whose recovered mass is measured, absolute layers."""
    figures: dict[str, Any] = {}
    for name, mean, phases in (
        ("similarity", row.similarity_mean, row.similarity),
        ("recovered", row.recovered_mean, row.recovered),
    ):
        worst, layer = worst_layer(phases)
        figures |= {f"{name}_mean": number(mean), f"{name}_worst": number(worst)}
        figures[f"{name}_worst_layer"] = problem.layers[layer]
    if row.recovered_free:
        figures["recovered_free_mean"] = number(row.recovered_free_mean)
    return (
        {
            "anchors": problem.absolute(row.anchors),
            "objective": number(row.objective),
            **figures,
            "speedup": {phase: number(value, 3) for phase, value in row.speedup.items()},
        }
        | ({} if row.proven else {"proven_optimal": False})
        | ({"pooled": True} if row.pooled else {})
    )


def candidate_document(problem: "Problem", entry: "Candidate") -> dict[str, Any]:
    """One verified candidate. `objectives` holds the objective under each weighting that proposes it."""
    return {
        "anchors": problem.absolute(entry.anchors),
        "objectives": {name: number(value) for name, value in entry.objectives.items()},
        "kl": {phase: number(value) for phase, value in entry.kl.items()},
        "kl_mean": number(entry.score),
        "answers": {"asked": entry.asked, "given": entry.given, "kept": entry.kept},
        "prompts": entry.prompts,
    } | {name: True for name in ("neighbour", "pooled") if getattr(entry, name)}


def stability_document(problem: "Problem", stable: "Stability") -> dict[str, Any]:
    """Shares over resamples; layers that were never chosen are left out."""
    chosen = zip(problem.layers, stable.chosen, strict=True)
    return {
        "resamples": stable.resamples,
        "searched": problem.absolute(stable.searched),
        "searched_again": number(stable.same_set, 4),
        "head_map_entries_kept": number(stable.heads, 4),
        "layer_chosen": {str(layer): number(share, 4) for layer, share in chosen if share > 0},
    }


def verify_document(problem: "Problem", decision: "Decision") -> dict[str, Any] | None:
    """What was measured, on what; None where nothing was."""
    if not decision.candidates:
        return None
    return decision.verified | {"candidates": [candidate_document(problem, entry) for entry in decision.candidates]}


def selection_document(
    settings: dict[str, Any], problem: "Problem", decision: "Decision", rows: Sequence["Row"], own: float
) -> dict[str, Any]:
    """The profile's `selection`. own: the mass recovered where every layer chooses for itself."""
    choice = decision.choice
    document = settings | {
        "anchors": problem.absolute(choice.row.anchors),
        "objective": number(choice.row.objective),
        "similarity": figures_dict(problem, choice.row.similarity),
        "recovered_mass": figures_dict(problem, choice.row.recovered) | {"own_keys": number(own)},
        "rule": choice.rule,
        "why": choice.why,
    }
    if notes := [*problem.notes, *decision.notes]:
        document["notes"] = notes
    if decision.stable:
        document["stability"] = stability_document(problem, decision.stable)
    if verified := verify_document(problem, decision):
        document["verify"] = verified
    if decision.ratios:
        document["ratios"] = decision.ratios
    document["budgets"] = [row_document(problem, row) for row in rows]
    return document
