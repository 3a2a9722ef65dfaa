"""What `kascade sweep` prints: a line per row where no bar can be drawn, and the table."""

import time
from collections.abc import Callable
from typing import Any

from kascade_cli.console import cell, format_size, note


def finished(total: int) -> Callable[[Any, dict[str, Any]], None]:
    """Says after each of `total` rows what it gave and how long the rest will take."""
    began, count = time.perf_counter(), [0]

    def tell(point: Any, row: dict[str, Any]) -> None:
        count[0] += 1
        left = (time.perf_counter() - began) / count[0] * (total - count[0])
        rest = f"; about {round(left / 60)} min left" if left >= 60 else ""
        kl = f", KL {_kl(row)}" if "kl" in row else ""
        note(f"{count[0]} of {total}: {point.describe()}: {row['mean']['score']:.1f} points{kl}{rest}")

    return tell


def _kl(row: dict[str, Any]) -> str:
    mean = row["kl"]["mean"]
    return "not finite" if mean is None else f"{mean:.4f}"


def render(document: dict[str, Any], console: Any) -> None:
    """The table: what was varied, keys read, score and KL."""
    from rich.table import Table

    rows, settings = document["rows"], document["settings"]
    dense = next((row for row in rows if row["strategy"] == "dense"), None)
    asked = rows[0]["mean"]
    varied = [name for name in ("ratio", "keys", "tile", "anchors") if any(row.get(name) is not None for row in rows)]
    table = Table(
        title=cell(
            f"Figure {document['figure']}: {document['model']}, {format_size(settings['length'])} tokens, "
            f"{asked['prompts']} prompts, {asked['questions']} questions"
        ),
        title_justify="left",
    )
    table.add_column("strategy", no_wrap=True)
    for name in (*varied, "keys read, %", "score", "- dense", "KL, nats"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        difference = row["mean"].get("vs_dense")
        table.add_row(
            cell(row["strategy"]),
            *("" if row.get(name) is None else _at(row[name]) for name in varied),
            f"{100 * row['density']['all']:.3g}",
            f"{row['mean']['score']:.1f} ±{_reach(row['mean']):.1f}",
            "" if difference is None else f"{difference['score']:+.1f} ±{_reach(difference):.1f}",
            _kl(row) if "kl" in row and row is not dense else "",
        )
    console.print(table)
    if dense and dense["mean"]["score"] == 0:
        console.print(
            f"dense answers 0 of {dense['mean']['questions']}: the scores say nothing, only the KL does; "
            "choose another task or model",
            soft_wrap=True,
        )


def _at(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}"
    return f"{value:g}"


def _reach(score: dict[str, float]) -> float:
    return max(score["high"] - score["score"], score["score"] - score["low"])
