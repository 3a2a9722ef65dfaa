"""Figure 2: what exact Top-k could keep, against k."""

from kascade_cli.report import sweeps
from kascade_cli.report.colours import series
from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, figure, join, tag


def build(content: Content) -> Section | None:
    found = content.sweeps("oracle")
    if not found:
        return None
    lead = (
        "Every layer reads its own exact Top-k keys (the first is dense): the best that choosing keys can do at a "
        "budget. What Kascade loses beyond it is the price of sharing a choice between layers."
    )
    parts = [tag("p", lead, class_="lead")]
    for source in found:
        with trusted(source):
            parts += [several(found, source), _figure(source)]
    return Section("oracle", "Figure 2: oracle Top-k against k", join(parts))


def percent(ratio: float) -> str:
    return f"{100 * ratio:.4g} %"


def _figure(source: Source) -> Safe:
    rows = source.document["rows"]
    by_ratio, by_keys = sweeps.lines(rows, "ratio"), sweeps.lines(rows, "keys")
    looks = series(["dense", *dict.fromkeys([*by_ratio, *by_keys])])
    pictures = []
    if by_ratio:
        label = "k, share of the visible keys, log scale"
        pictures += sweeps.panels(source, "ratio", by_ratio, looks, x_label=label, x_format=percent)
    if by_keys:
        pictures += sweeps.panels(source, "keys", by_keys, looks, x_label="k, number of keys, log scale")
    key = legend(((look, label, shape) for label, (look, shape) in looks.items()), line=True)
    said = caption(source, tag("b", "Answers and KL to dense against the number of keys."), sweeps.asked(source))
    more = sweeps.numbers(
        source,
        {
            "k, share": lambda row: "" if row.get("ratio") is None else percent(row["ratio"]),
            "k, keys": lambda row: row.get("keys", ""),
        },
    )
    return figure(join([key, *pictures]), said, id_="figure-2", more=more)
