"""Draw docs/images/overview.png, the README's picture, from recorded results:

    python scripts/overview_picture.py [-o docs/images/overview.png]

Left: benchmarks/results/real-qwen2.5-coder-1.5b.json (benchmarks/real_models.py). Right: serving-h200.json
(benchmarks/serving.py).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROFILE = "defaults of 977ff26: 0 1 3 6 9 14 23, head maps"
TASKS = ("niah_multikey_1, 8k", "niah_multiquery, 8k", "vt, 8k")
COLOURS = {"dense": "#444444", "kascade": "#d55e00", "oracle": "#009e73", "streaming-llm": "#0072b2"}
LEFT_OUT = ("kascade-pooled", "kascade-decode-only")  # they lie upon kascade
LABELS = {
    "streaming-llm:ratio=0.3": ("streaming-llm 30 %", False),
    "dense": ("dense", True),
    "oracle": ("oracle", True),
    "kascade": ("kascade", True),
}
PLACES = {"oracle": 5, "kascade": -7}  # points
SPEED_COLOURS = {"decode": "#d55e00", "first token": "#56b4e9"}


def answers(axes: Any, result: dict[str, Any]) -> None:
    """Mean score over TASKS by the share of keys that decoding reads; hollow where the prompt is read densely."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["profile"] == PROFILE and row["what"] in TASKS:
            found.setdefault(row["strategy"], []).append(row)
    for name, rows in found.items():
        if len(rows) < len(TASKS) or name in LEFT_OUT:
            continue
        score = sum(row["score"] for row in rows) / len(rows)
        share = {
            phase: 100 * sum(row["density"][phase] for row in rows) / len(rows) for phase in ("prefill", "decode")
        }
        colour = COLOURS.get(name.partition(":")[0], "#999999")
        face = "none" if share["prefill"] > 99 and name != "dense" else colour
        axes.plot(share["decode"], score, "o", markersize=7, markeredgecolor=colour, markerfacecolor=face)
        label, left, down = *LABELS.get(name, (name, False)), PLACES.get(name, 0)
        place = {"xytext": (-7 if left else 7, down), "ha": "right" if left else "left"}
        axes.annotate(label, (share["decode"], score), textcoords="offset points", va="center", fontsize=8, **place)
    axes.set(xscale="log", xlim=(7, 140), ylim=(0, 95), ylabel="score, mean of 3 tasks at 8k")
    axes.set_xlabel("% of the keys that decoding reads (hollow: dense prefill)")
    axes.set_xticks([10, 20, 30, 50, 100], ["10", "20", "30", "50", "100"])
    axes.minorticks_off()
    axes.set_title("Answers: Qwen2.5-Coder-1.5B, 7 of 28 layers anchors", fontsize=10)


def speed(axes: Any, result: dict[str, Any]) -> None:
    """Times vLLM's own attention, of every size: tokens per second, and time to the first token."""
    rows = sorted(result["ratios"], key=lambda row: (row["case"], row["requests"] * row["tokens"]))
    for case, colour in SPEED_COLOURS.items():
        found = [(place, row["times_dense"]) for place, row in enumerate(rows) if row["case"] == case]
        name = {"decode": "tokens per second in decoding", "first token": "time to the first token"}[case]
        bars = axes.bar([place for place, _ in found], [up for _, up in found], 0.7, color=colour, label=name)
        axes.bar_label(bars, [f"{up:.2f}x" for _, up in found], fontsize=8, padding=1)
    axes.axhline(1, color=COLOURS["dense"], linestyle="--", linewidth=1)
    labels = [f"{row['requests']} x {round(row['tokens'] / 1024)}k" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set(xlabel="requests x tokens", ylabel="times FlashAttention-3 in vLLM", ylim=(0, 3.2))
    axes.legend(fontsize=8, loc="upper right", frameon=False)
    gpu = result["machine"]["gpu"].removeprefix("NVIDIA ")
    axes.set_title(f"Speed: vLLM on an {gpu}, Llama-3.1-8B shape, 10 % of the keys", fontsize=10)


def main() -> int:
    """Draws the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images" / "overview.png")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    answers(left, json.loads((RESULTS / "real-qwen2.5-coder-1.5b.json").read_text()))
    speed(right, json.loads((RESULTS / "serving-h200.json").read_text()))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.tight_layout()
    figure.savefig(options.output, dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
