"""Figure 5: scores summed before or after the softmax, over tile sizes."""

from kascade_cli.report import sweeps
from kascade_cli.report.colours import series
from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, figure, join, tag
from kascade_cli.report.sections.oracle import percent


def build(content: Content) -> Section | None:
    found = content.sweeps("pooling")
    if not found:
        return None
    lead = (
        "The queries of a tile share one choice of keys. Summed after the softmax, every query has one vote; summed "
        "before it, a query with large logits and flat attention drowns one that looks for a single key."
    )
    parts = [tag("p", lead, class_="lead")]
    for source in found:
        with trusted(source):
            parts += [several(found, source), _figure(source)]
    return Section("pooling", "Figure 5: pooling before or after the softmax", join(parts))


def _figure(source: Source) -> Safe:
    rows = source.document["rows"]
    ratios = sorted({row["ratio"] for row in rows if row.get("tile") is not None})
    labels = list(dict.fromkeys(row["strategy"] for row in rows if row.get("tile") is not None))
    looks = series(["dense", *labels])
    pictures = []
    for ratio in ratios:
        found = sweeps.lines([row for row in rows if row.get("ratio") == ratio], "tile")
        heading = f", {percent(ratio)} of the keys"
        pictures += sweeps.panels(
            source, "tile", found, looks, x_label="queries of a tile, log scale", heading=heading
        )
    key = legend(((look, label, shape) for label, (look, shape) in looks.items()), line=True)
    said = caption(source, tag("b", "Answers and KL to dense against the tile size."), sweeps.asked(source))
    more = sweeps.numbers(
        source,
        {
            "ratio": lambda row: "" if row.get("ratio") is None else percent(row["ratio"]),
            "tile": lambda row: row.get("tile", ""),
        },
    )
    return figure(join([key, *pictures]), said, id_="figure-5", more=more)
