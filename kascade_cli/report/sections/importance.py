"""Figure 4: how much each layer's attention changes what flows through it."""

from typing import TYPE_CHECKING

from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source
from kascade_cli.report.legend import legend
from kascade_cli.report.markup import Safe, details, figure, join, table, tag
from kascade_cli.report.svg import Plot, Scale

if TYPE_CHECKING:
    from kascade_cli.analysis.similarity import Measured


def build(content: Content) -> Section | None:
    captures = content.of("capture")
    if not captures:
        return None
    lead = "Weights with which layers may count when anchors are chosen. Early layers usually dominate."
    parts = [tag("p", lead, class_="lead")]
    for source in captures:
        parts += [several(captures, source), _figure(source, content.measured[source.path], content.anchors)]
    return Section("importance", "Figure 4: importance of the layers", join(parts))


def _figure(source: Source, measured: "Measured", anchors: list[int]) -> Safe:
    layers = measured.profiled_layers
    values = measured.importance
    spread = measured.importance_per_prompt.std(axis=0)
    low, high = max(float(values.min()) / 2, 1e-6), max(float((values + spread).max()) * 1.3, 1e-5)
    count = len(layers)
    x = Scale(-0.7, count - 0.3, ticks=range(count))
    plot = Plot(
        x,
        Scale(low, high, log=True),
        x_label="layer",
        y_label="importance w, log scale",
        x_format=lambda place: str(layers[int(place)]),
        width=920,
        height=260,
        x_grid=False,
    )
    width = min(28.0, 0.66 * (plot.right - plot.left) / count)
    for place, layer in enumerate(layers):
        series = "s1" if layer in anchors else "dense"
        said = f"layer {layer}: {values[place]:.5f} ± {spread[place]:.5f}"
        plot.bar(place, width, float(values[place]), series, said)
        below = max(float(values[place] - spread[place]), low)
        plot.reach(place, below, float(values[place] + spread[place]), "ink")
    picture = plot.svg(
        "Importance of each layer", f"{count} bars on a logarithmic scale from {low:.2g} to {high:.2g}."
    )
    key = legend([("s1", "anchor of the profile", "square"), ("dense", "other layer", "square")]) if anchors else ""
    said = caption(
        source,
        tag("b", "w = 1 − cos(x, x + attention output)"),
        f"of the residual stream x, no unit; mean over {measured.prompts} prompts, strokes: their standard deviation.",
    )
    rows = [[layer, f"{values[p]:.5f}", f"{spread[p]:.5f}"] for p, layer in enumerate(layers)]
    numbers = details("Numbers", table(["layer", "w", "standard deviation"], rows))
    return figure(join([key, tag("div", picture, class_="wide")]), said, id_="figure-4", more=numbers)
