"""Draw docs/images/overview.png, the README's picture, from recorded results:

    python scripts/overview_picture.py [-o docs/images/overview.png]

Left: benchmarks/results/evaluate-demo-*.json (their command is in the README). Right: the newest GPU suite.
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


def answers(axes: Any, results: list[dict[str, Any]]) -> None:
    """Mean exact match with its 95 % limits by the length of the text, a line per strategy."""
    rows = [row for result in results for row in result["rows"]]
    lengths = sorted({row["length"] for row in rows})
    for name, style in COLOURS.items():
        line = sorted((row for row in rows if row["strategy"] == name), key=lambda row: row["length"])
        scores = [row["mean"]["score"] for row in line]
        reach = [[abs(row["mean"]["score"] - row["mean"][end]) for row in line] for end in ("low", "high")]
        share = 100 * sum(row["density"]["all"] for row in line) / len(line)
        where = [lengths.index(row["length"]) for row in line]
        label = f"{name} ({share:.0f} % of the keys)"
        axes.errorbar(where, scores, reach, fmt="o-", markersize=4, capsize=3, color=style, label=label)
    axes.set_xticks(range(len(lengths)), [f"{length // 1024}k" for length in lengths])
    axes.set(ylim=(0, 105), xlabel="tokens of the text", ylabel="exact match, points")
    axes.legend(fontsize=8, loc="center right", frameon=False)
    axes.set_title("Answers: 16-layer demo model, mean of 4 tasks", fontsize=10)


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
    axes.set_title(
        f"Speed: attention of 32 layers, 10 % of the keys, {' '.join(result['gpu'].split()[:2])}", fontsize=10
    )


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
    answers(left, [json.loads(path.read_text()) for path in RESULTS.glob("evaluate-demo-[0-9]*k.json")])
    speed(right, json.loads(newest(RESULTS).read_text()))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.tight_layout()
    figure.savefig(options.output, dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
