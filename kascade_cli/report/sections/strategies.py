"""Strategies on the same questions: points with intervals, differences to dense, and what they read."""

from typing import Any

from kascade_cli.report.colours import series
from kascade_cli.report.content import Content, Section, caption, difference, points, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, figure, join, number, table, tag
from kascade_cli.report.svg import Plot, Scale

Row = dict[str, Any]


def build(content: Content) -> Section | None:
    found = content.of("evaluation")
    if not found:
        return None
    lead = "Right answers to the same questions. High and to the left is better: answers kept with few keys read."
    parts = [tag("p", lead, class_="lead")]
    for source in found:
        with trusted(source):
            parts.append(several(found, source))
            rows = source.document["rows"]
            lengths = list(dict.fromkeys(row["length"] for row in rows))
            for length in lengths:
                here = [row for row in rows if row["length"] == length]
                parts.append(_figure(source, here, length, len(lengths) > 1))
    return Section("strategies", "Strategies: answers against keys read", join(parts))


def name_of(row: Row, ratios: list[float]) -> str:
    """The strategy, with its ratio where there are several."""
    ratio = row.get("ratio")
    return row["strategy"] if ratio is None or len(ratios) < 2 else f"{row['strategy']}, {100 * ratio:.3g} %"


def _figure(source: Source, rows: list[Row], length: int, headed: bool) -> Safe:
    ratios = sorted({row["ratio"] for row in rows if row.get("ratio") is not None})
    looks = series(list(dict.fromkeys(row["strategy"] for row in rows)))
    asked = rows[0]["mean"]
    key = legend((look, label, shape) for label, (look, shape) in looks.items())
    panels = [_answers(rows, ratios, looks), _read(rows, looks)]
    said = caption(
        source,
        tag("b", f"Right answers in points of 100 at {length:,} tokens;"),
        f"{asked['questions']} questions about {asked['prompts']} prompts, mean over tasks. Strokes: 95 % intervals, "
        "prompts as clusters. Keys read: of those visible, over both phases and all layers.",
    )
    head = tag("h3", f"{length:,} tokens") if headed else Safe("")
    picture = figure(join([key, *panels]), said, more=_table(source, rows, ratios))
    return join([head, picture])


def _answers(rows: list[Row], ratios: list[float], looks: dict[str, tuple[str, str]]) -> Safe:
    """One line per row of the table, best to read for many strategies."""
    count = len(rows)
    names = [name_of(row, ratios) for row in rows]
    left = min(215, 24 + int(6.6 * max(map(len, names))))
    plot = Plot(
        Scale(0, 102, ticks=(0, 20, 40, 60, 80, 100)),
        Scale(-0.7, count - 0.3, ticks=range(count)),
        x_label="right answers, points of 100", y_label="", heading="Answers, mean over tasks",
        y_format=lambda place: _cut(names[count - 1 - int(place)]), left=left, height=max(150, 86 + 23 * count),
    )  # fmt: skip
    for place, row in enumerate(rows):
        look, shape = looks[row["strategy"]]
        score, y = row["mean"], count - 1 - place
        low, high = plot.x(score["low"]), plot.x(score["high"])
        at = plot.y(y)
        plot.parts.append(f'<g class="{look}"><path class="reach" d="M{low:.1f} {at:.1f}H{high:.1f}"/></g>')
        plot.dot(score["score"], y, look, shape, 4.6, said=f"{names[place]}: {points(score)}")
    said = "; ".join(f"{name} {row['mean']['score']:.1f}" for name, row in zip(names, rows, strict=True))
    return plot.svg("Right answers per strategy", said)


def _cut(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:26]}…"


def _read(rows: list[Row], looks: dict[str, tuple[str, str]]) -> Safe:
    least = min(100 * row["density"]["all"] for row in rows) / 1.4
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick > least]
    plot = Plot(
        Scale(max(0.01, least), 118, log=True, ticks=ticks), Scale(0, 104, ticks=(0, 20, 40, 60, 80, 100)),
        x_label="keys read, % of those visible, log scale", y_label="right answers, points of 100",
        heading="Answers against keys read", height=320,
    )  # fmt: skip
    for label, (look, shape) in looks.items():
        mine = sorted((row for row in rows if row["strategy"] == label), key=lambda row: row["density"]["all"])
        if len(mine) > 1:
            plot.line([(100 * row["density"]["all"], row["mean"]["score"]) for row in mine], look)
        for row in mine:
            x, score = 100 * row["density"]["all"], row["mean"]
            plot.reach(x, score["low"], min(score["high"], 104), look)
            plot.dot(x, score["score"], look, shape, 5, said=f"{label}: {points(score)} at {x:.3g} % of the keys")
    said = "; ".join(
        f"{row['strategy']} {row['mean']['score']:.1f} at {100 * row['density']['all']:.3g} %" for row in rows
    )
    return plot.svg("Right answers against the share of keys read", said)


def _table(source: Source, rows: list[Row], ratios: list[float]) -> Safe:
    tasks = [task for task in source.document["tasks"] if all(task in row["scores"] for row in rows)]
    several_tasks = len(tasks) > 1
    names = ["strategy", "ratio", "keys read, % (prefill / decode)", *tasks]
    names += ["mean", "mean − dense"] if several_tasks else ["− dense"]
    body = []
    for row in rows:
        density = row["density"]
        read = " / ".join(number(100 * density[p]) if p in density else "–" for p in ("prefill", "decode"))
        versus = row["mean"].get("vs_dense")
        cells = [
            "" if row.get("ratio") is None else f"{row['ratio']:g}{' (by length)' if 'ratios' in row else ''}", read,
            *(points(row["scores"][task]) for task in tasks), *([points(row["mean"])] if several_tasks else []),
            "" if versus is None else difference(versus),
        ]  # fmt: skip
        label = row["strategy"]
        if row.get("draws"):
            label = f"{label} ({len(row['draws'])} draws)"
        body.append([label, *cells])
    return table(names, body, caption="95 % intervals: ± the farther limit; − dense: on the same questions")
