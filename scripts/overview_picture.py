"""Draw docs/images/overview.png, the README's picture, from recorded results:

    python scripts/overview_picture.py [-o docs/images/overview.png]

Left: benchmarks/results/evaluate-ratios-1k.json (its command is in docs/evaluate.md). Right: the newest GPU suite.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {"dense": "#444444", "kascade": "#d55e00", "streaming-llm": "#0072b2"}
SPEED_COLOURS = ("#d55e00", "#e69f00", "#56b4e9")


def answers(axes: Any, result: dict[str, Any]) -> None:
    """Mean exact match with its 95 % limits against the share of keys read, a line per strategy."""
    rows = result["rows"]
    dense = next(row for row in rows if row["strategy"] == "dense")["mean"]
    axes.axhline(dense["score"], color=COLOURS["dense"], linestyle="--", linewidth=1)
    axes.annotate("dense", (100, dense["score"]), ha="right", va="bottom", color=COLOURS["dense"])
    for name in dict.fromkeys(row["strategy"] for row in rows if row["strategy"] != "dense"):
        line = sorted((row for row in rows if row["strategy"] == name), key=lambda row: row["density"]["all"])
        scores = [row["mean"]["score"] for row in line]
        reach = [
            [row["mean"]["score"] - row["mean"]["low"] for row in line],
            [row["mean"]["high"] - row["mean"]["score"] for row in line],
        ]
        share = [100 * row["density"]["all"] for row in line]
        axes.errorbar(share, scores, reach, marker="o", markersize=4, capsize=3, color=COLOURS[name], label=name)
    axes.set(xlim=(0, 100), ylim=(0, 105), xlabel="keys read, %", ylabel="exact match, points")
    axes.legend(fontsize=8, loc="center right", frameon=False)
    axes.set_title("Answers: 16-layer demo model, 1k tokens", fontsize=10)


def speed(axes: Any, result: dict[str, Any]) -> None:
    """Speed-up of the whole model's attention over the best dense attention, by context."""
    rows = [
        row
        for row in result["rows"]
        if row["kind"] == "model" and "speedup" in row and row.get("strategy", "kascade") == "kascade"
    ]
    groups: dict[str, dict[int, tuple[str, float]]] = {}
    for row in rows:
        tokens = row["batch"] * row["context"]
        cached = f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"
        name = "prefill" if row["phase"] == "prefill" else f"decode, {cached} tokens in the cache"
        groups.setdefault(name, {})[row["context"]] = row["size"], row["speedup"]
    contexts = sorted({row["context"] for row in rows})
    width = 0.8 / len(groups)
    for place, (name, found) in enumerate(groups.items()):
        where = [contexts.index(context) + (place - (len(groups) - 1) / 2) * width for context in found]
        bars = axes.bar(where, [up for _, up in found.values()], 0.92 * width, color=SPEED_COLOURS[place], label=name)
        axes.bar_label(bars, [f"{up:.1f}x\n{size}" for size, up in found.values()], fontsize=7, padding=1)
    axes.axhline(1, color=COLOURS["dense"], linestyle="--", linewidth=1)
    axes.set_xticks(range(len(contexts)), [f"{context // 1024}k" for context in contexts])
    axes.set(xlabel="context (bars: batch x context)", ylabel="times the best dense", ylim=(0, 7.4))
    axes.legend(fontsize=7, loc="upper right", frameon=False)
    axes.set_title(f"Speed: attention of 32 layers, 10 % of the keys, {result['gpu']}", fontsize=10)


def main() -> int:
    """Draws the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "overview.png")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sys.path.insert(0, str(ROOT))
    from benchmarks.performance_table import newest

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    answers(left, json.loads((RESULTS / "evaluate-ratios-1k.json").read_text()))
    speed(right, json.loads(newest(RESULTS).read_text()))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.tight_layout()
    figure.savefig(options.output, dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
