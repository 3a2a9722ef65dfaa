"""What figures 2, 5 and 6 share: curves of score and of KL over something that was swept."""

from collections.abc import Callable, Sequence
from typing import Any

from kascade_cli.report.content import difference, points
from kascade_cli.report.files import Source
from kascade_cli.report.markup import Safe, details, number, table
from kascade_cli.report.svg import Plot, Scale, label_of

Row = dict[str, Any]
_SMALLEST = 1e-6  # nats; less is drawn there


def dense_row(source: Source) -> Row | None:
    return next((row for row in source.document["rows"] if row["strategy"] == "dense"), None)


def lines(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    """Strategy -> its rows that have `name`, ascending."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["strategy"] != "dense" and row.get(name) is not None:
            found.setdefault(row["strategy"], []).append(row)
    return {label: sorted(group, key=lambda row: row[name]) for label, group in found.items()}


def panels(
    source: Source,
    name: str,
    found: dict[str, list[Row]],
    looks: dict[str, tuple[str, str]],
    *,
    x_label: str,
    x_format: Callable[[float], str] = label_of,
    heading: str = "",
) -> list[Safe]:
    """Score against `name`, and KL where it was measured: one curve per strategy, dense as a dashed level."""
    values = sorted({row[name] for group in found.values() for row in group})
    dense = dense_row(source)
    pictures = [_score(name, values, found, looks, dense, x_label, x_format, heading)]
    if any(row.get("kl", {}).get("mean") is not None for group in found.values() for row in group):
        pictures.append(_kl(name, values, found, looks, x_label, x_format, heading))
    return pictures


def _beside(label: str, found: dict[str, list[Row]]) -> float:
    """Pixels by which a curve's marks stand beside their place, so that strokes do not cover each other."""
    return 5.0 * (list(found).index(label) - (len(found) - 1) / 2)


def _x(values: Sequence[float]) -> Scale:
    log = len(values) > 1 and min(values) > 0
    if log:
        return Scale(values[0] / 1.15, values[-1] * 1.15, log=True, ticks=values)
    return Scale(values[0] - 0.5, values[-1] + 0.5, ticks=values)


def _score(name, values, found, looks, dense, x_label, x_format, heading) -> Safe:
    scores = [row["mean"] for group in found.values() for row in group] + ([dense["mean"]] if dense else [])
    low = min(score["low"] for score in scores)
    plot = Plot(
        _x(values),
        Scale(max(0.0, 10 * int(low / 10 - 0.3)), 102.0, ticks=None),
        x_label=x_label,
        y_label="right answers, points of 100",
        x_format=x_format,
        heading=f"Score{heading}",
    )
    if dense:
        plot.band(dense["mean"]["low"], dense["mean"]["high"], "dense")
        plot.level(dense["mean"]["score"], "dense")
    for label, group in found.items():
        series, shape = looks[label]
        beside = _beside(label, found)
        plot.line([(row[name], row["mean"]["score"]) for row in group], series)
        for row in group:
            score = row["mean"]
            said = f"{label}, {x_format(row[name])}: {points(score)}"
            plot.reach(row[name], score["low"], score["high"], series, beside)
            plot.dot(row[name], score["score"], series, shape, said=said, shift=beside)
    described = "; ".join(
        f"{label} from {group[0]['mean']['score']} to {group[-1]['mean']['score']}" for label, group in found.items()
    )
    return plot.svg(f"Score against {x_label}", f"{described}.")


def _kl(name, values, found, looks, x_label, x_format, heading) -> Safe:
    have = {
        label: [row for row in group if row.get("kl", {}).get("mean") is not None] for label, group in found.items()
    }
    means = [max(row["kl"]["mean"], _SMALLEST) for group in have.values() for row in group]
    highs = [max(row["kl"]["high"], _SMALLEST) for group in have.values() for row in group]
    plot = Plot(
        _x(values),
        Scale(min(means) / 2, max(highs) * 1.6, log=True),
        x_label=x_label,
        y_label="KL to dense, nats, log scale",
        x_format=x_format,
        heading=f"KL at the answers{heading}",
    )
    for label, group in have.items():
        series, shape = looks[label]
        beside = _beside(label, have)
        plot.line([(row[name], max(row["kl"]["mean"], plot.y.low)) for row in group], series)
        for row in group:
            kl = row["kl"]
            plot.reach(row[name], max(kl["low"], plot.y.low), max(kl["high"], plot.y.low), series, beside)
            said = f"{label}, {x_format(row[name])}: {kl['mean']:.4g} nats"
            plot.dot(row[name], max(kl["mean"], plot.y.low), series, shape, said=said, shift=beside)
    described = "; ".join(
        f"{label} from {group[0]['kl']['mean']:.3g} to {group[-1]['kl']['mean']:.3g}"
        for label, group in have.items()
        if group
    )
    return plot.svg(f"KL against {x_label}", f"{described} nats.")


def numbers(source: Source, columns: dict[str, Callable[[Row], Any]]) -> Safe:
    """Every row as a table; `columns` are those that were varied."""
    names = ["strategy", *columns, "keys read, %", "score", "− dense", "KL, nats", "95 %"]
    rows = []
    for row in source.document["rows"]:
        kl = row.get("kl") or {}
        versus = row["mean"].get("vs_dense")
        limits = (
            ""
            if kl.get("low") is None or row["strategy"] == "dense"
            else f"{number(kl['low'])} to {number(kl['high'])}"
        )
        rows.append(
            [
                row["strategy"],
                *(read(row) for read in columns.values()),
                number(100 * row["density"]["all"]),
                points(row["mean"]),
                "" if versus is None else difference(versus),
                "" if row["strategy"] == "dense" else number(kl.get("mean")),
                limits,
            ]
        )
    return details("Numbers", table(names, rows))


def asked(source: Source) -> str:
    """What was asked, in one sentence."""
    document, row = source.document, source.document["rows"][0]
    settings, mean = document["settings"], row["mean"]
    kl = f" KL at {row['kl']['positions']} answer tokens of {row['kl']['prompts']} prompts." if row.get("kl") else ""
    return (
        f"{mean['questions']} questions about {mean['prompts']} prompts of {settings['length']} tokens "
        f"({', '.join(map(str, document['tasks']))}), at least {settings['min_keys']} keys; "
        f"strokes: 95 % intervals.{kl}"
    )
