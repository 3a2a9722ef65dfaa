"""The verified candidates: what each anchor set does to the model, against how many anchors it has."""

import math
from typing import Any

from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, details, figure, join, number, table, tag, text
from kascade_cli.report.svg import Plot, Scale

_LOOKS = {"importance": ("s1", "circle"), "uniform": ("s2", "square"), "both": ("s3", "diamond")}
_OTHER = ("s4", "triangle")


def build(content: Content) -> Section | None:
    profiles = [source for source in content.of("profile") if _candidates(source)]
    if not profiles:
        return None
    lead = (
        "Anchor sets that the capture's similarity proposed, measured on the model with prompts that the capture does "
        "not hold. Down and to the left is better."
    )
    parts = [tag("p", lead, class_="lead")]
    for source in profiles:
        with trusted(source):
            parts += [several(profiles, source), _figure(source)]
    return Section("candidates", "Verified candidates", join(parts))


def _verify(source: Source) -> dict[str, Any]:
    found = source.document.selection.get("verify")
    return found if isinstance(found, dict) else {}


def _candidates(source: Source) -> list[dict[str, Any]]:
    found = _verify(source).get("candidates")
    found = found if isinstance(found, list) else []
    return [entry for entry in found if isinstance(entry, dict) and _mean(entry) is not None and entry.get("anchors")]


def _mean(entry: dict[str, Any]) -> float | None:
    value = entry.get("kl_mean")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def kept_share(entry: dict[str, Any]) -> float | None:
    """Of the answers that dense gives, those that the set gives too, in points of 100; None where none was counted."""
    value, answers = entry.get("kept"), entry.get("answers")
    if isinstance(answers, dict):
        total = answers.get("given")
        value = answers.get("kept") / total if total else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return 100.0 * value if value <= 1 else float(value)


def proposed_by(entry: dict[str, Any]) -> str:
    if entry.get("neighbour"):
        return "neighbour"
    names = [str(name) for name in entry.get("objectives") or {}]
    return "both" if {"importance", "uniform"} <= set(names) else names[0] if names else "neighbour"


def _key(entry: dict[str, Any]) -> tuple[Any, bool]:
    """A set and how it is read, of a candidate or a profile's selection."""
    return entry.get("anchors"), bool(entry.get("pooled")) or entry.get("heads") == "pooled"


def _named(entry: dict[str, Any]) -> str:
    return " ".join(map(str, entry["anchors"])) + (", pooled" if entry.get("pooled") else "")


def _figure(source: Source) -> Safe:
    entries, chosen = _candidates(source), _key(source.document.selection)
    labels = list(dict.fromkeys(map(proposed_by, entries)))
    looks = {label: _LOOKS.get(label, _OTHER) for label in labels}
    counted = [entry for entry in entries if kept_share(entry) is not None]
    size = (460, 300) if counted else (560, 330)
    panels = [_panel(entries, chosen, looks, "kl", size)]
    if counted:
        panels.append(_panel(counted, chosen, looks, "kept", size))
    key = legend((look, f"proposed by {_weighting(label)}", shape) for label, (look, shape) in looks.items())
    about = _verify(source)
    where = f"{about.get('prompts')} prompts of {about.get('dev_set')}, up to {about.get('max_length')} tokens"
    said = caption(
        source,
        tag("b", "KL(dense ‖ sparse) of next-token distributions, nats, mean of the phases,"),
        f"against the number of anchors, measured at the {about.get('positions')} of {where}. Ring: the profile's "
        "anchors. Small marks: dropped after fewer prompts. Answers kept: of those that dense gives. The line "
        "joins the best of each number.",
    )
    return figure(join([key, *panels]), said, id_="pareto", more=_numbers(entries, chosen))


def _weighting(label: str) -> str:
    return {"both": "both weightings", "importance": "importance weights", "uniform": "uniform weights"}.get(
        label, label
    )


def _panel(
    entries: list[dict[str, Any]], chosen: Any, looks: dict[str, tuple[str, str]], what: str, size: tuple[int, int]
) -> Safe:
    sizes = sorted({len(entry["anchors"]) for entry in entries})
    values = [_value(entry, what) for entry in entries]
    if what == "kl":
        y = Scale(min(values) / 4, max(values) * 1.8, log=True)
        y_label, heading = "KL to dense, nats, log scale", "KL to dense"
    else:
        y = Scale(max(0.0, min(values) - 12), 103.0)
        y_label, heading = "answers kept, points of 100", "Answers kept"
    plot = Plot(
        Scale(sizes[0] - 0.6, sizes[-1] + 0.6, ticks=sizes), y, x_label="anchors", y_label=y_label,
        heading=heading, x_format=lambda size: f"{size:g}", width=size[0], height=size[1],
    )  # fmt: skip
    pick = min if what == "kl" else max
    most = max(entry.get("prompts") or 0 for entry in entries)
    ordered = sorted(entries, key=lambda entry: _key(entry) == chosen)
    beside = {label: 0.0 if len(looks) == 1 else 0.16 * (n - (len(looks) - 1) / 2) for n, label in enumerate(looks)}

    def place(entry: dict[str, Any]) -> tuple[float, float]:
        return len(entry["anchors"]) + beside[proposed_by(entry)], _value(entry, what)

    best = [pick((e for e in entries if len(e["anchors"]) == size), key=lambda e: _value(e, what)) for size in sizes]
    plot.line(map(place, best), "dense", dashed=True)
    for entry in ordered:
        series, shape = looks[proposed_by(entry)]
        named = _named(entry)
        x, value = place(entry)
        short = (entry.get("prompts") or 0) < most
        plot.dot(x, value, series, shape, 2.8 if short else 4.6, said=f"{named}: {number(value)}")
        if _key(entry) == chosen:
            plot.parts.append(f'<circle class="ring" cx="{plot.x(x):.1f}" cy="{plot.y(value):.1f}" r="9"/>')
            _name_chosen(plot, f"chosen (ring): {named}")
    said = (
        f"{len(entries)} candidates of {sizes[0]} to {sizes[-1]} anchors; from {min(values):.3g} to {max(values):.3g}."
    )
    return plot.svg(heading, said)


def _name_chosen(plot: Plot, words: str) -> None:
    """At the bottom, which the scales leave free: beside the ring it would lie upon other sets."""
    place = f'x="{plot.right - 6:.1f}" y="{plot.bottom - 7:.1f}"'
    plot.parts.append(f'<text class="note end" {place}>{text(words)}</text>')


def _value(entry: dict[str, Any], what: str) -> float:
    found = max(_mean(entry) or 0.0, 1e-6) if what == "kl" else kept_share(entry)
    return float(found or 0.0)


def _numbers(entries: list[dict[str, Any]], chosen: Any) -> Safe:
    kept = any(kept_share(entry) is not None for entry in entries)
    rows = []
    for entry in sorted(entries, key=lambda entry: (len(entry["anchors"]), _mean(entry))):
        kl = entry.get("kl") or {}
        cells = [
            len(entry["anchors"]), _named(entry), proposed_by(entry), number(_mean(entry)),
            number(kl.get("decode")), number(kl.get("prefill")),
        ]  # fmt: skip
        cells += [number(kept_share(entry))] if kept else []
        cells.append(entry.get("prompts", ""))
        first = tag("th", cells[0], scope="row", class_="name")
        rest = join(tag("td", cell, class_="name" if place < 2 else None) for place, cell in enumerate(cells[1:]))
        rows.append(tag("tr", first, rest, class_="chosen" if _key(entry) == chosen else None))
    names = ["anchors", "layers", "proposed by", "KL, nats", "decode", "prefill"]
    names += ["answers kept", "prompts"] if kept else ["prompts"]
    return details("Numbers", table(names, rows, left=3))
