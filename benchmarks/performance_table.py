"""Write the README's performance table from a GPU suite's result, between two markers:

    python benchmarks/performance_table.py [RESULT.json] [--readme README.md] [--bench docs/bench.md] [--check]

    <!-- performance:begin -->
    ...
    <!-- performance:end -->

The approximations that are off by default go into docs/bench.md, between `approximations` markers; a result that has
none leaves that page alone. Without RESULT, the newest benchmarks/results/gpu_suite*.json by its own date. --check
changes nothing and exits with 1 if a page is not what the result gives.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- {}:begin -->", "<!-- {}:end -->")
BEGIN, END = (marker.format("performance") for marker in MARKERS)
BENCH_BEGIN, BENCH_END = "<!-- approximations:begin -->", "<!-- approximations:end -->"
LABELS = {
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention CuTe",
    "flashinfer": "FlashInfer",
    "own": "ours",
    "sdpa": "SDPA",
}


def newest(folder: Path) -> Path:
    """The result with the latest date. Raises SystemExit if there is none."""
    found = [path for path in folder.glob("gpu_suite*.json") if json.loads(path.read_text()).get("gpu")]
    if not found:
        raise SystemExit(f"no GPU result in {folder}: run benchmarks/gpu_suite.py on a Hopper machine")
    return max(found, key=lambda path: json.loads(path.read_text())["date"])


def milliseconds(value: float) -> str:
    """Three figures."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def table(result: dict[str, Any]) -> str:
    """The markdown between the markers. Raises SystemExit if the result has no whole-model row."""
    exact = [row for row in result["rows"] if row.get("strategy", "kascade") == "kascade"]
    models = [row for row in exact if row["kind"] == "model" and "speedup" in row]
    if not models:
        raise SystemExit("the result has no whole-model row")
    first = models[0]
    limits = result["ceilings"]
    lines = [
        f"Attention time per layer on one {result['gpu']} in milliseconds (medians), "
        f"{first['query_heads']} query and {first['kv_heads']} KV heads of {first['head_dim']}, {first['dtype']}, "
        f"{first['ratio']:.0%} of the keys; the last column is {first['layers']} layers with {first['anchors']} "
        "anchors over the best dense attention of the same run.",
        "",
        "| step | batch x context | best dense | layer 0 | anchor | reuse | mean | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in models:
        dense = f"{milliseconds(row['dense_ms'])} ({LABELS.get(row['baseline'], row['baseline'])})"
        times = [milliseconds(row[f"{name}_ms"]) for name in ("layer0", "anchor", "reuse", "mean")]
        lines.append(f"| {row['phase']} | {row['size']} | {dense} | {' | '.join(times)} | **{row['speedup']:.2f}x** |")
    whole = [row for row in exact if row["kind"] == "e2e"]
    pairs = {}
    for row in whole:
        # The dense row of an approximation comes later, and is not this pair's.
        pairs.setdefault((row["phase"], row["size"]), {}).setdefault(row["name"], row)
    if pairs:
        lines += ["", f"Whole model ({whole[0]['shape']}, random weights):", ""]
        lines += ["| step | batch x context | dense | sparse | speed-up |", "|---|---|---|---|---|"]
    for (phase, size), pair in pairs.items():
        if len(pair) == 2:
            if phase == "decode":
                cells = [f"{pair[name]['tokens_s']:.0f} tokens/s" for name in ("dense", "sparse")]
            else:
                cells = [f"{pair[name]['ms_p50'] / 1000:.2f} s to first token" for name in ("dense", "sparse")]
            lines.append(f"| {phase} | {size} | {' | '.join(cells)} | **{pair['sparse']['speedup']:.2f}x** |")
    lines += [
        "",
        f"The machine copies {limits['copy_gb_s']:,.0f} GB/s and multiplies {limits['matmul_tflop_s']:.0f} TFLOP/s; "
        f"{origin(result)}",
    ]
    return "\n".join(lines)


def origin(result: dict[str, Any]) -> str:
    """Versions, date, commit, and the scripts that made it."""
    versions = result["versions"]
    return (
        f"torch {versions['torch']}, tilelang {versions.get('tilelang', 'none')}; {result['date'][:10]}, commit "
        f"`{result['commit']}`. Made by `benchmarks/gpu_suite.py` and `benchmarks/performance_table.py`."
    )


def approximations(result: dict[str, Any]) -> str:
    """Speed of the strategies that are off by default, beside what they cost the demo model; "" if none ran."""
    rows = result["rows"]
    found = [row for row in rows if row.get("strategy", "kascade") != "kascade" and row["name"] in ("model", "sparse")]
    if not found:
        return ""
    lines = [
        f"One {result['gpu']}; the speed-up is over the best dense attention, or the dense model, of the same run. "
        "Answers are exact match of the demo model at 1k in points of 100; with `kascade-refresh` the questions are "
        "decoded too.",
        "",
        "| strategy | measured | batch x context | speed-up | answers: dense, kascade, this |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        what = f"{row['phase']}, {'whole model' if row['kind'] == 'e2e' else 'attention'}"
        name = row["strategy"] + (f":refresh={row['refresh']}" if "refresh" in row else "")
        cells = [f"`{name}`", what, row["size"], f"**{row['speedup']:.2f}x**", answers(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"With {origin(result)}"])


def answers(row: dict[str, Any]) -> str:
    """Points of dense attention, kascade and the row's strategy on the demo model, from the recorded results."""
    refresh = row.get("refresh")
    name = "refresh_stress-demo-1k.json" if refresh else "evaluate-reused-norm.json"
    scores = {
        (entry["strategy"], entry.get("refresh")): entry["mean"]["score"]
        for entry in json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
        if entry.get("length", 1024) == 1024
    }
    return ", ".join(f"{scores[key]:.1f}" for key in (("dense", None), ("kascade", None), (row["strategy"], refresh)))


def replace(text: str, inside: str, mark: str = "performance", page: str = "the README") -> str:
    """`text` with what is between the markers replaced. Raises SystemExit if the markers are missing."""
    begin, end = (marker.format(mark) for marker in MARKERS)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page} needs one line {begin} and, after it, one line {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{inside}\n{end}{rest.split(end)[1]}"


def write(page: Path, after: str, check: bool) -> bool:
    """Whether `page` was `after` already; writes it unless `check`."""
    current = page.read_text(encoding="utf-8") == after
    if not current and not check:
        page.write_text(after, encoding="utf-8")
    return current


def main() -> int:
    """Rewrites the tables, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="a GPU suite's JSON file")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--bench", type=Path, default=ROOT / "docs" / "bench.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    result = json.loads((options.result or newest(ROOT / "benchmarks" / "results")).read_text())
    pages = {options.readme: replace(options.readme.read_text(encoding="utf-8"), table(result))}
    if others := approximations(result):
        text = options.bench.read_text(encoding="utf-8")
        pages[options.bench] = replace(text, others, "approximations", str(options.bench))
    current = [write(page, after, options.check) for page, after in pages.items()]
    return int(options.check and not all(current))


if __name__ == "__main__":
    sys.exit(main())
