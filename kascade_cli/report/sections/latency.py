"""Attention time per layer and whole models, beside the paper's Table 3."""

from typing import Any

from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, details, figure, join, number, table, tag
from kascade_cli.report.svg import Plot, Scale

Row = dict[str, Any]

# The paper's Table 3: one H100, top-k 10 %, 32 query and 8 KV heads of 128, fp16; milliseconds a layer.
# (phase, context) -> FlashAttention-3, layer 0, anchor, reuse, mean over 32 layers with 5 anchors, speed-up.
PAPER = {
    ("decode", 32768): (2.93, 3.35, 2.71, 0.35, 0.74, 3.97),
    ("decode", 65536): (5.85, 6.74, 5.39, 0.65, 1.43, 4.08),
    ("decode", 131072): (11.68, 14.08, 10.78, 1.24, 2.83, 4.12),
    ("decode", 262144): (21.77, 25.95, 20.63, 2.31, 5.34, 4.08),
    ("prefill", 32768): (12.28, 28.97, 25.11, 2.81, 6.42, 1.91),
    ("prefill", 65536): (53.77, 120.36, 103.77, 9.36, 24.63, 2.18),
    ("prefill", 131072): (215.76, 483.69, 416.53, 37.18, 98.55, 2.19),
    ("prefill", 262144): (864.02, 1955.47, 1696.55, 160.14, 408.30, 2.12),
}


def paper_row(row: Row) -> tuple[float, ...] | None:
    """The paper's figures for this phase and context, where the row has the paper's heads."""
    same = (row.get("query_heads"), row.get("kv_heads"), row.get("head_dim")) == (32, 8, 128)
    return PAPER.get((row["phase"], row["context"])) if same else None


def build(content: Content) -> Section | None:
    found = content.of("bench")
    if not found:
        return None
    parts = []
    for source in found:
        with trusted(source):
            parts += [several(found, source), _machine(source), *_parts(source)]
    return Section("latency", "Latency", join(parts))


def _machine(source: Source) -> Safe:
    document = source.document
    best = document.get("ceilings") or {}
    device = document.get("gpu") or "a CPU (its figures say nothing about the kernels' speed)"
    limits = ""
    if {"copy_gb_s", "matmul_tflop_s"} <= set(best):
        limits = (
            f" It copies {best['copy_gb_s']:,.0f} GB/s and multiplies {best['matmul_tflop_s']:.3g} TFLOP/s at best."
        )
    return tag("p", f"Measured on {device}.{limits}", class_="lead")


def _parts(source: Source) -> list[Safe]:
    rows = [row for row in source.document["rows"] if "skipped" not in row and "error" not in row]
    models = [row for row in rows if row.get("kind") == "model"]
    whole = [row for row in rows if row.get("kind") == "e2e"]
    roles = [row for row in rows if row.get("kind") in ("dense", "role", "op")]
    parts = []
    if models:
        parts.append(_figure(source, models))
    if whole:
        parts += [tag("h3", "Whole models"), _whole(whole)]
    if roles:
        names = ["phase", "size", "what", "median, ms", "20th", "80th percentile", "rate", "speed-up"]
        parts.append(details("Numbers: every kernel and role", table(names, [_timed(row) for row in roles], left=3)))
    if not parts:
        parts.append(tag("p", "No row of this file was timed."))
    return parts


def _figure(source: Source, models: list[Row]) -> Safe:
    plain = [row for row in models if row.get("strategy", "kascade") == "kascade"] or models
    phases = list(dict.fromkeys(row["phase"] for row in plain))
    panels = [_panel(phase, [row for row in plain if row["phase"] == phase]) for phase in phases]
    entries = [("s1", "here", "square"), ("dense", "the paper, one H100, same context", "square")]
    beside = any(map(paper_row, plain))
    key = legend(entries if beside else entries[:1])
    row = plain[0]
    said = caption(
        source,
        tag("b", "Attention of a whole model: times faster than the fastest dense attention."),
        f"{row['layers']} layers with {row['anchors']} anchors, {row['query_heads']} query and {row['kv_heads']} KV "
        f"heads of {row['head_dim']}, {row['dtype']}, {100 * row['ratio']:g} % of the keys; sizes are batch x "
        "context. " + ("The paper compares with FlashAttention-3 and does not state the batch." if beside else ""),
    )
    return figure(join([key, *panels]), said, id_="latency-figure", more=_table(models))


def _panel(phase: str, rows: list[Row]) -> Safe:
    top = max([row["speedup"] for row in rows] + [paper[5] for paper in map(paper_row, rows) if paper])
    count = len(rows)
    plot = Plot(
        Scale(-0.6, count - 0.4, ticks=range(count)), Scale(0, top * 1.15), x_label="batch x context",
        y_label="times faster than dense", heading=phase.capitalize(), x_grid=False,
        x_format=lambda place: str(rows[int(place)]["size"]),
    )  # fmt: skip
    width = min(34.0, 0.34 * (plot.right - plot.left) / count)
    step = (plot.right - plot.left) / (count + 0.2)
    for place, row in enumerate(rows):
        shift = width / 2 / step
        bars = [("s1", row["speedup"], -shift)]
        if paper := paper_row(row):
            bars.append(("dense", paper[5], shift))
        for look, value, beside in bars if len(bars) > 1 else [(*bars[0][:2], 0.0)]:
            plot.bar(place + beside, width - 2, value, look, f"{row['size']}: {value:.2f}x")
            plot.say(place + beside, value, f"{value:.2f}", dy=-5, anchor="middle")
    plot.level(1.0, "ink")
    said = "; ".join(f"{row['size']} {row['speedup']:.2f}x" for row in rows)
    return plot.svg(f"Speed-up in {phase}", said)


def _table(models: list[Row]) -> Safe:
    names = ["phase", "size", "strategy", "dense", "layer 0", "anchor", "reuse", "mean a layer", "speed-up"]
    body: list[Any] = []
    told: set[tuple[str, int]] = set()
    for row in models:
        dense = f"{_ms(row['dense_ms'])} ({row.get('baseline')})"
        timed = [_ms(row.get(name)) for name in ("layer0_ms", "anchor_ms", "reuse_ms", "mean_ms")]
        speed = f"{row['speedup']:.2f}x"
        body.append([row["phase"], row["size"], row.get("strategy", "kascade"), dense, *timed, speed])
        key = (row["phase"], row["context"])
        if (paper := paper_row(row)) and key not in told:
            told.add(key)
            fa3, *others, faster = paper
            cells = [f"? x {row['context'] // 1024}k", "kascade, the paper", f"{_ms(fa3)} (fa3)", *map(_ms, others)]
            first = tag("th", row["phase"], scope="row", class_="name")
            rest = join(tag("td", value, class_="name" if n < 2 else None) for n, value in enumerate(cells))
            body.append(tag("tr", first, rest, tag("td", f"{faster:.2f}x"), class_="paper"))
    return table(
        names, body, left=3, caption="Milliseconds of attention per layer, medians; grey: the paper's Table 3"
    )


def _ms(value: float | None) -> str:
    return number(value, 4)


def _whole(rows: list[Row]) -> Safe:
    names = ["phase", "size", "attention", "median, ms", "tokens/s", "keys read, %", "speed-up"]
    body = []
    for row in rows:
        what = row.get("strategy") or f"dense ({row.get('attention', '?')})"
        read = "" if row.get("density") is None else number(100 * row["density"])
        cells = [_ms(row.get("ms_p50")), number(row.get("tokens_s"), 4), read, f"{row['speedup']:.2f}x"]
        body.append([row["phase"], row["size"], what, *cells])
    caption_ = "A whole model: prefill to the first token, decode per step of the batch"
    return table(names, body, left=3, caption=caption_)


def _timed(row: Row) -> list[Any]:
    rate = f"{row['gb_s']:,.0f} GB/s" if row.get("gb_s") else ""
    rate = f"{row['tflop_s']:.3g} TFLOP/s" if row.get("tflop_s") else rate
    times = [_ms(row.get(name)) for name in ("ms_p50", "ms_p20", "ms_p80")]
    speed = f"{row['speedup']:.2f}x" if row.get("speedup") else ""
    return [row["phase"], row["size"], row["name"], *times, rate, speed]
