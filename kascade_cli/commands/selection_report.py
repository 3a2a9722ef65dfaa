"""What `select-anchors` prints: the result as one document, and its tables for people."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kascade_cli.console import cell, format_size, plain_table


def result_document(output: Path, search: Any, decision: Any, budget: Any, plots: Sequence[Path]) -> dict[str, Any]:
    """The result as plain data. A set that is no row of the search (asked for, or measured) has a row of its own."""
    from kascade_cli.analysis.record import number, row_document, stability_document, verify_document

    problem, row = search.problem, decision.choice.row
    budgets = [row_document(problem, entry) for entry in search.rows]
    for entry, objective in zip(budgets, search.nearest or [], strict=False):
        entry["objective_nearest"] = number(objective)
    chosen = row_document(problem, row)
    place = next((n for n, entry in enumerate(budgets) if entry["anchors"] == chosen["anchors"]), None)
    if place is None:
        budgets.append(dict(chosen))
        budgets.sort(key=lambda entry: len(entry["anchors"]))
    elif not _same(budgets[place], chosen):  # the row says what is kept as the chosen set is read
        budgets[place] = chosen | {key: value for key, value in budgets[place].items() if key not in chosen}
    return {
        "profile": str(output),
        "chosen": chosen,
        "rule": decision.choice.rule,
        "why": decision.choice.why,
        "budgets": budgets,
        "cost": {"source": search.cost.source, "context": search.context},
        "recovered_own_keys": number(search.own),
        "tensor_parallel": search.ranks_document(decision),
        "stability": stability_document(problem, decision.stable) if decision.stable else None,
        "verify": verify_document(problem, decision),
        "ratios": decision.ratios,
        "budget": budget.model_dump(mode="json"),
        "notes": [*problem.notes, *decision.notes],
        "plots": [str(path) for path in plots],
    }


def renderables(document: dict[str, Any]) -> list[Any]:
    """The result for people, ready to be printed: lines and tables, with nothing left that could fail."""
    chosen, own = document["chosen"], document["recovered_own_keys"]
    parts: list[Any] = [budget_table(document["budgets"], chosen, document["cost"], own), ""]
    if document["verify"]:
        parts += [verify_table(document["verify"], chosen), ""]
    if document["ratios"]:
        parts += [ratio_table(document["ratios"], document["budget"]["ratios"]), ""]
    return parts + [cell(line) for line in closing_lines(document)]


def join(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))


def _same(entry: dict[str, Any], chosen: dict[str, Any]) -> bool:
    return (entry["anchors"], entry.get("pooled")) == (chosen["anchors"], chosen.get("pooled"))


def _named(entry: dict[str, Any]) -> str:
    return join(entry["anchors"]) + (" pooled" if entry.get("pooled") else "")


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _nats(value: float | None) -> str:
    return "inf" if value is None else f"{value:.4f}"  # NaN logits: infinitely wrong


def budget_table(budgets: Sequence[dict[str, Any]], chosen: dict[str, Any], cost: dict[str, Any], own: float) -> Any:
    """The Pareto table; the chosen row is marked."""
    free = any("objective_nearest" in row for row in budgets)
    crossing = any("recovered_free_mean" in row for row in budgets)
    figures = ["similarity", "recovered", *(["free maps"] if crossing else []), "worst layer"]
    numbers = ["objective", *(["nearest"] if free else []), *figures, "decode", "prefill"]
    table = plain_table(["", "M", "anchors", *numbers], title="Best anchors for every budget", right=["M", *numbers])
    for row in budgets:
        mark = "*" if row["anchors"] == chosen["anchors"] else ""
        values = [f"{row['objective']:.4f}" + ("" if row.get("proven_optimal", True) else "?")]
        if free:
            nearest = row.get("objective_nearest")
            values.append("-" if nearest is None else f"{nearest:.4f}")
        worst = f"{row['recovered_worst']:.1%} ({row['recovered_worst_layer']})"
        values += [f"{row['similarity_mean']:.1%}", f"{row['recovered_mean']:.1%}"]
        values += [f"{row['recovered_free_mean']:.1%}"] if crossing else []
        values.append(worst)
        values += [_times(row["speedup"][phase]) for phase in ("decode", "prefill")]
        table.add_row(mark, str(len(row["anchors"])), _named(row), *values)
    table.caption = cell(
        f"recovered: attention kept at the budget, mean and worst layer ({own:.1%} if every layer chose for "
        "itself); decode, prefill: speed-up of attention at "
        f"{format_size(cost['context'])}, from {cost['source']}"
        + ("; free maps: recovered, could heads read those of other ranks" if crossing else "")
    )
    table.caption_justify = "left"
    return table


def verify_table(verified: dict[str, Any], chosen: dict[str, Any]) -> Any:
    """Candidates beside their measured KL; the chosen one is marked."""
    title = f"Measured on {verified['prompts']} held-out prompts of '{verified['dev_set']}': KL(dense || sparse), nats"
    asked, given = verified["answers"]["asked"], verified["answers"]["given"]
    if asked:
        title += f"; dense answers {given} of {asked}"
    numbers = ["importance", "uniform", *verified["phases"], "mean", *(["answers"] if given else []), "prompts"]
    table = plain_table(["", "M", "anchors", *numbers], title=title, right=["M", *numbers])
    for entry in verified["candidates"]:
        objectives = [entry["objectives"].get(name) for name in ("importance", "uniform")]
        table.add_row(
            "*" if _same(entry, chosen) else "",
            str(len(entry["anchors"])),
            _named(entry),
            *("-" if value is None else f"{value:.4f}" for value in objectives),
            *(_nats(entry["kl"][phase]) for phase in verified["phases"]),
            _nats(entry["kl_mean"]),
            *([f"{entry['answers']['kept']}/{entry['answers']['given']}"] if given else []),
            str(entry["prompts"]),
        )
    table.caption = cell(
        "importance, uniform: objective under the weighting that proposes the set (both: a neighbour of "
        "the best); fewer prompts: given up early"
    )
    table.caption_justify = "left"
    return table


def ratio_table(found: Sequence[dict[str, Any]], chosen: dict[Any, float]) -> Any:
    """What was measured at each length; the ratio in the profile's table is marked where it was measured."""
    numbers = ["length", "ratio", "KL", "answers", "prompts"]
    table = plain_table(["", *numbers], title="Smallest ratio that keeps the answers, by length", right=numbers)
    ratios = {int(length): ratio for length, ratio in chosen.items()}
    for entry in found:
        for row in entry["tried"]:
            table.add_row(
                "*" if row["ratio"] == ratios[entry["length"]] else "",
                format_size(entry["length"]),
                f"{row['ratio']:g}",
                _nats(row["kl"]),
                f"{row['kept']}/{row['given']}" if row["given"] else "-",
                str(row["prompts"]),
            )
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


def closing_lines(document: dict[str, Any]) -> Iterator[str]:
    """What was chosen, why, how firmly, and where it was written."""
    speed = ", ".join(f"{phase} {_times(value)}" for phase, value in document["chosen"]["speedup"].items())
    recovered, chosen = document["chosen"]["recovered_mean"], document["chosen"]["anchors"]
    pooled = ", all heads reading one set" if document["chosen"].get("pooled") else ""
    yield f"chosen: {join(chosen)}{pooled} (recovers {recovered:.1%}; predicted {speed})"
    yield f"because: {document['why']}"
    if document["budget"].get("ratios"):
        shares = ", ".join(f"{format_size(int(n))} {r:g}" for n, r in document["budget"]["ratios"].items())
        yield f"ratio by length, never rising: {shares}"
    if split := document["tensor_parallel"]:
        yield (
            f"head maps stay within the heads of each of {split['ranks']} ranks: they recover "
            f"{split['recovered_mass']:.1%}, free ones {split['recovered_mass_free']:.1%} "
            f"({100 * split['cost']:+.2f} points)"
        )
    if document["stability"]:
        yield from stability_lines(document["stability"])
    for path in [*document["plots"], document["profile"]]:
        yield f"wrote {path}"
