"""Figure 3: how much of a layer's attention another layer's keys recover."""

from typing import TYPE_CHECKING, Any

import numpy as np

from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source
from kascade_cli.report.heat import heat_map
from kascade_cli.report.markup import Safe, details, figure, join, table, tag

if TYPE_CHECKING:
    from kascade_cli.analysis.similarity import Measured

_NAMES = {"decode": "Decode rows", "prefill": "Prefill tiles"}


def build(content: Content) -> Section | None:
    captures = content.of("capture")
    if not captures:
        return None
    lead = (
        "Layer a chooses keys; layer b reads them. Where the map is bright to the right of a layer, that layer can "
        "serve as an anchor for those after it."
    )
    parts = [tag("p", lead, class_="lead")]
    for source in captures:
        parts += [several(captures, source), _figure(source, content.measured[source.path], content.anchors)]
    return Section("similarity", "Figure 3: similarity across layers", join(parts))


def _figure(source: Source, measured: "Measured", anchors: list[int]) -> Safe:
    from kascade_cli.analysis.anchors import layer_similarity

    layers = measured.profiled_layers
    panels, tables = [], []
    for phase in measured.sim:
        values = layer_similarity(measured.mean(phase))
        panels.append(_panel(phase, values, layers, _served(layers, anchors)))
        tables.append(_numbers(phase, values, layers))
    framed = "Orange frames: the layers that each anchor of the profile serves." if anchors else ""
    said = caption(
        source,
        tag("b", "Share of layer b's attention on its own keys that layer a's keys keep"),
        f"(0 to 1; top {measured.top_k} keys, best head of a for each head of b), mean over tiles and "
        f"{measured.prompts} prompts.",
        framed,
    )
    return figure(join(panels), said, id_="figure-3", more=join(tables))


def _panel(phase: str, values: np.ndarray, layers: list[int], frames: list[tuple[int, int, int]]) -> Safe:
    count = len(layers)
    cells: list[list[Any]] = [[float(values[a, b]) if b >= a else None for b in range(count)] for a in range(count)]
    above = values[np.triu_indices(count, 1)] if count > 1 else values.ravel()
    low = min(0.9, max(0.0, int(float(above.min()) * 10) / 10))
    return heat_map(
        cells,
        columns=layers,
        rows=layers,
        x_label="layer b, which reads",
        y_label="layer a, which chooses",
        heading=_NAMES[phase],
        title=f"Similarity of layers, {_NAMES[phase].lower()}",
        description=f"{count} by {count} layers; off the diagonal from {above.min():.3f} to {above.max():.3f}.",
        low=low,
        frames=frames,
    )


def _served(layers: list[int], anchors: list[int]) -> list[tuple[int, int, int]]:
    """(row, first column, columns) of each anchor's layers."""
    places = [layers.index(anchor) for anchor in anchors if anchor in layers]
    ends = [*places[1:], len(layers)]
    return [(place, place, end - place) for place, end in zip(places, ends, strict=False)]


def _numbers(phase: str, values: np.ndarray, layers: list[int]) -> Safe:
    rows = [[a, *("" if y < x else f"{values[x, y]:.2f}" for y in range(len(layers)))] for x, a in enumerate(layers)]
    return details(f"Numbers: {_NAMES[phase].lower()}", table(["a \\ b", *layers], rows))
