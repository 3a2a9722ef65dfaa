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
PROFILE = "defaults"
TASKS = ("niah_multikey_1", "niah_multivalue", "niah_multiquery", "vt", "fwe", "code_completion")
LENGTHS = ("8k", "16k")
QUESTIONS = 64  # a task that was asked fewer is left out
COLOURS = {"dense": "#444444", "kascade": "#d55e00", "oracle": "#009e73", "streaming-llm": "#0072b2"}
OTHER = "#999999"
NAMES = {"random": "random anchors"}
LARGE = ":ratio=0.3"
MARK = {"marker": "D", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": "black", "linestyle": "none"}
SPEED_COLOURS = {"decode": "#d55e00", "first token": "#56b4e9"}


def means(result: dict[str, Any]) -> tuple[int, dict[str, dict[str, float]]]:
    """How many tasks there are; for each strategy, over them and LENGTHS: score, % of the keys that a phase reads."""
    rows = [row for row in result["rows"] if row["profile"] == PROFILE and row["questions"] >= QUESTIONS]
    found = {(row["what"], row["strategy"]): row for row in rows}
    tasks = [task for task in TASKS if (f"{task}, {LENGTHS[0]}", "dense") in found]
    mean = {}
    for name in dict.fromkeys(strategy for _, strategy in found):
        mine = [found[f"{task}, {length}", name] for task in tasks for length in LENGTHS]
        mean[name] = {"score": sum(row["score"] for row in mine) / len(mine)}
        for phase in ("prefill", "decode"):
            mean[name][phase] = 100 * sum(row["density"][phase] for row in mine) / len(mine)
    return len(tasks), mean


def answers(axes: Any, result: dict[str, Any]) -> None:
    """For each strategy a bar, hollow where prompts are read densely, and a mark for its score at 30 % of the keys."""
    count, mean = means(result)
    names = sorted((name for name in mean if not name.endswith(LARGE)), key=lambda name: mean[name]["score"])
    for at, name in enumerate(names):
        score = mean[name]["score"]
        colour = COLOURS.get(name.removesuffix("-decode-only"), OTHER)
        hollow = mean[name]["prefill"] > 99 and name != "dense"
        axes.barh(at, score, 0.66, facecolor="white" if hollow else colour, edgecolor=colour, linewidth=1.2)
        axes.text(1, at, f"{score:.0f}", va="center", fontsize=8, color="black" if hollow else "white")
        if name + LARGE in mean:
            axes.plot(mean[name + LARGE]["score"], at, **MARK)
    shares = [f"{mean[name]['prefill']:.0f} / {mean[name]['decode']:.0f}" for name in names]
    labels = [f"{NAMES.get(name, name)}   {share}" for name, share in zip(names, shares, strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    place = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(-0.02, -0.02, "% of the keys read at\n10 %, prefill / decode", fontsize=7, **place)
    axes.set(xlim=(0, 72), xlabel=f"mean score, {count} tasks at 8k and 16k (hollow: dense prefill)")
    axes.plot([], [], "s", markersize=7, color="black", label="10 % of the keys")
    axes.plot([], [], **MARK, label="30 %")
    axes.legend(fontsize=8, loc="lower right", ncols=2, columnspacing=1, handletextpad=0.2, frameon=False)
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

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 1.15))
    answers(left, json.loads((RESULTS / "real-qwen2.5-coder-1.5b.json").read_text()))
    speed(right, json.loads((RESULTS / "serving-h200.json").read_text()))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is left else "y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(options.output, dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
