"""Figure 6: head maps against one key set for all heads against no map."""

from kascade_cli.report import sweeps
from kascade_cli.report.colours import series
from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, figure, join, tag
from kascade_cli.report.sections.oracle import percent

_MEANING = {
    "kascade": "kascade (head map)",
    "kascade-pooled": "kascade-pooled (one set for all heads)",
    "kascade-no-remap": "kascade-no-remap (head g reads head g)",
}


def build(content: Content) -> Section | None:
    found = content.sweeps("remap")
    if not found:
        return None
    lead = (
        "A head of a reuse layer reads keys that some head of its anchor chose: the one most like it (the head map), "
        "its namesake, or one choice for all heads."
    )
    parts = [tag("p", lead, class_="lead")]
    for source in found:
        with trusted(source):
            parts += [several(found, source), _figure(source)]
    return Section("remap", "Figure 6: head maps, pooled, or neither", join(parts))


def _figure(source: Source) -> Safe:
    rows = [row for row in source.document["rows"] if row["strategy"] != "dense"]
    sets = sorted({tuple(row["anchors"]) for row in rows}, key=lambda anchors: (len(anchors), anchors))
    looks = series(["dense", *dict.fromkeys(row["strategy"] for row in rows)])
    pictures = []
    for anchors in sets:
        found = sweeps.lines([row for row in rows if tuple(row["anchors"]) == anchors], "ratio")
        heading = f", {len(anchors)} anchors ({_short(anchors)})"
        pictures += sweeps.panels(
            source, "ratio", found, looks, x_label="ratio of keys, log scale", x_format=percent, heading=heading
        )
    key = legend(((look, _MEANING.get(label, label), shape) for label, (look, shape) in looks.items()), line=True)
    said = caption(source, tag("b", "Answers and KL to dense against the ratio of keys."), sweeps.asked(source))
    more = sweeps.numbers(
        source,
        {
            "anchors": lambda row: " ".join(map(str, row.get("anchors", []))),
            "ratio": lambda row: "" if row.get("ratio") is None else percent(row["ratio"]),
        },
    )
    return figure(join([key, *pictures]), said, id_="figure-6", more=more)


def _short(anchors: tuple[int, ...]) -> str:
    named = " ".join(map(str, anchors))
    return named if len(named) < 24 else f"{named[:21]}..."
