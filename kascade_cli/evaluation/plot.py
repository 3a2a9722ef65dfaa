"""The figure of an evaluation: score against ratio, or bars where there is one ratio."""

from pathlib import Path
from typing import Any

from kascade_cli.console import format_size
from kascade_cli.errors import require_extra

# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8B5A2B", "#444444")


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes the PNG: a row of panels per length, a panel per task and their mean. Needs matplotlib."""
    matplotlib = require_extra("matplotlib", "plot")
    matplotlib.use("Agg")
    plt = require_extra("matplotlib.pyplot", "plot")
    rows = document["rows"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    panels = [*document["tasks"], "mean"] if len(document["tasks"]) > 1 else document["tasks"]
    labels = list(dict.fromkeys(row["strategy"] for row in rows))
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
    figure, axes = plt.subplots(
        len(lengths),
        len(panels),
        figsize=(2.6 * len(panels) + 1.6, 2.7 * len(lengths) + 0.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, length in zip(axes, lengths, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            here = [row for row in rows if row["length"] == length]
            (_curves if len(ratios) > 1 else _bars)(axis, here, panel, colours)
            axis.set_title(panel if len(lengths) == 1 else f"{panel}, {format_size(length)}", fontsize=9)
            axis.set_ylim(-3, 103)
            axis.grid(axis="y", linewidth=0.4, alpha=0.6)
            axis.set_axisbelow(True)
            axis.tick_params(labelsize=8)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        line[0].set_ylabel("exact match, points", fontsize=9)
    if len(ratios) > 1:
        for axis in axes[-1]:
            axis.set_xlabel("ratio of keys", fontsize=9)
    style = {"marker": "o", "linewidth": 2} if len(ratios) > 1 else {"marker": "s", "linewidth": 0}
    handles = [plt.Line2D([], [], color=colours[label], label=label, **style) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=8)
    where = f" at {format_size(lengths[0])} tokens" if len(lengths) == 1 else ""
    budget = f", ratio {ratios[0]:g}" if len(ratios) == 1 else ""
    figure.suptitle(f"{document['model']}{where}{budget}: exact match with 95 % intervals", fontsize=10)
    partial = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(partial, dpi=150, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)


def _score(row: dict[str, Any], panel: str) -> dict[str, float]:
    return row["mean"] if panel == "mean" and "mean" not in row["scores"] else row["scores"][panel]


def _reach(scores: list[dict[str, float]]) -> list[list[float]]:
    return [[s["score"] - s["low"] for s in scores], [s["high"] - s["score"] for s in scores]]


def _curves(axis: Any, rows: list[dict[str, Any]], panel: str, colours: dict[str, str]) -> None:
    """Score against ratio, one curve per strategy; dense is a line with its band."""
    for label, colour in colours.items():
        mine = sorted((row for row in rows if row["strategy"] == label), key=lambda row: row["ratio"] or 0)
        scores = [_score(row, panel) for row in mine]
        if scores and mine[0]["ratio"] is None:
            axis.axhspan(scores[0]["low"], scores[0]["high"], color=colour, alpha=0.15, linewidth=0)
            axis.axhline(scores[0]["score"], color=colour, linewidth=1, linestyle="--")
            continue
        axis.errorbar(
            [row["ratio"] for row in mine],
            [score["score"] for score in scores],
            yerr=_reach(scores),
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.3,
            capsize=2,
        )
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
    axis.set_xscale("log")
    axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axis.minorticks_off()


def _bars(axis: Any, rows: list[dict[str, Any]], panel: str, colours: dict[str, str]) -> None:
    scores = [_score(row, panel) for row in rows]
    axis.bar(
        range(len(rows)),
        [score["score"] for score in scores],
        yerr=_reach(scores),
        color=[colours[row["strategy"]] for row in rows],
        width=0.75,
        capsize=2,
        error_kw={"linewidth": 0.9},
    )
    axis.set_xticks([])
