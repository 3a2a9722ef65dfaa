"""PNG figures of a capture and of the choice made from it. matplotlib is imported when a figure is drawn."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kascade_cli.analysis.anchors import layer_similarity
from kascade_cli.analysis.rows import Row
from kascade_cli.analysis.similarity import Measured
from kascade_cli.errors import KascadeError, plain, require_extra
from kascade_cli.files import atomic_write

FILES = ("similarity.png", "importance.png", "pareto.png", "sparsity.png")
_SIZE = 4.6  # inches, one panel
_BLUE, _ORANGE, _GREY = "#2166ac", "#d6604d", "#8c8c8c"


def _figure(panels: int, width: float = _SIZE, height: float = _SIZE) -> tuple[Any, list[Any]]:
    """A figure without pyplot's global state, so that no display is needed and nothing leaks."""
    require_extra("matplotlib", "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _layer_ticks(axis: Any, layers: Sequence[int], both: bool = False) -> None:
    step = max(1, -(-len(layers) // 16))
    places = np.arange(0, len(layers), step)
    axis.set_xticks(places, [str(layers[i]) for i in places], fontsize=8)
    if both:
        axis.set_yticks(places, [str(layers[i]) for i in places], fontsize=8)


def similarity(measured: Measured, anchors: Sequence[int] = ()) -> Any:
    """S[a, b] for each phase (paper, Fig. 3); a frame around the layers that each anchor (position)
    serves.
    """
    figure, axes = _figure(len(measured.sim), height=_SIZE + 0.3)
    for axis, phase in zip(axes, measured.sim, strict=True):
        values = np.ma.masked_array(layer_similarity(measured.mean(phase)))
        values[np.tril_indices(len(values), -1)] = np.ma.masked
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis")
        _layer_ticks(axis, measured.profiled_layers, both=True)
        axis.set_xlabel("layer b that reuses")
        axis.set_ylabel("layer a that chooses")
        rows = "decode rows" if phase == "decode" else "prefill tiles"
        axis.set_title(f"Similarity, {rows}\n(top {measured.top_k}, {measured.reduce} over tiles)", fontsize=10)
        for anchor, end in zip(anchors, [*anchors[1:], len(values)], strict=True):
            axis.add_patch(_rectangle((anchor - 0.5, anchor - 0.5), end - anchor, 1))
    figure.colorbar(image, ax=axes, shrink=0.8, label="S[a, b]")
    return figure


def _rectangle(corner: tuple[float, float], width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor=_ORANGE, linewidth=1.2)


def importance(measured: Measured, anchors: Sequence[int] = ()) -> Any:
    """w[b] = 1 - cos(x, x + attention) per layer (paper, Fig. 4); anchors stand out."""
    figure, (axis,) = _figure(1, width=6.4, height=3.4)
    places = np.arange(len(measured.importance))
    colours = [_ORANGE if place in anchors else _BLUE for place in places]
    spread = measured.importance_per_prompt.std(axis=0)
    axis.bar(places, measured.importance, yerr=spread, color=colours, error_kw={"lw": 0.8, "ecolor": _GREY})
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(measured.importance.min() / 2, 1e-5))
    _layer_ticks(axis, measured.profiled_layers)
    axis.set_xlabel("layer" + (" (anchors in orange)" if len(anchors) else ""))
    axis.set_ylabel("importance w")
    axis.set_title(f"Layer importance, mean and spread over {measured.prompts} prompts", fontsize=10)
    return figure


def pareto(rows: Sequence[Row], chosen: Row, candidates: Sequence[Any] = ()) -> Any:
    """Recovered mass against predicted speed-up for every budget, and measured KL where there is any."""
    measured = [entry for entry in candidates if entry.kl]
    figure, axes = _figure(2 if measured else 1, width=5.2, height=3.8)
    axis = axes[0]
    for phase, colour, marker in (("decode", _BLUE, "o"), ("prefill", _ORANGE, "s")):
        points = [(row.speedup[phase], row.recovered_mean, row.size) for row in rows if row.speedup[phase]]
        if not points:
            continue
        axis.plot(*zip(*[point[:2] for point in points], strict=True), color=colour, marker=marker, ms=4, label=phase)
        for speed, mass, size in points[:: max(1, len(points) // 8)]:
            axis.annotate(str(size), (speed, mass), textcoords="offset points", xytext=(4, 4), fontsize=7)
        if chosen.speedup[phase]:
            axis.plot(chosen.speedup[phase], chosen.recovered_mean, marker="*", ms=13, color=colour, mec="black")
    axis.set_xlabel("predicted attention speed-up")
    axis.set_ylabel("attention kept at the budget, mean over layers")
    read = "\none set for all heads (lines: head maps)" if chosen.pooled else ""
    axis.set_title(f"Budgets (number: anchors); star: chosen, {chosen.size} anchors{read}", fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    if measured:
        _kl_panel(axes[1], measured, chosen)
    return figure


def _kl_panel(axis: Any, measured: Sequence[Any], chosen: Row) -> None:
    for pooled, colour, label in ((False, _BLUE, "candidate"), (True, _GREY, "candidate, pooled")):
        points = [(len(entry.anchors), max(entry.score, 1e-6)) for entry in measured if entry.pooled == pooled]
        if points:
            axis.scatter(*zip(*points, strict=True), s=22, color=colour, alpha=0.8, label=label)
    picked = [max(entry.score, 1e-6) for entry in measured if entry.key == chosen.key]
    if picked:
        axis.plot(chosen.size, picked[0], marker="*", ms=13, color=_ORANGE, mec="black", ls="", label="chosen")
    axis.set_yscale("log")
    axis.set_xticks(sorted({len(entry.anchors) for entry in measured}))
    axis.set_xlabel("anchors")
    axis.set_ylabel("KL(dense || sparse), nats")
    axis.set_title("Measured on held-out prompts", fontsize=10)
    axis.legend(fontsize=8)


def sparsity(measured: Measured) -> Any:
    """Mass that the top keys cover, per layer and query head (paper, Fig. 1), and the mean per layer for
    all sizes.
    """
    keys = measured.top_mass_keys
    index = keys.index("256") if "256" in keys else 0
    figure, (heat, lines) = _figure(2, width=5.4, height=4.0)
    image = heat.imshow(measured.top_mass[:, :, index].T, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    _layer_ticks(heat, measured.profiled_layers)
    heat.set_xlabel("layer")
    heat.set_ylabel("query head")
    heat.set_title(f"Mass in the top {_label(keys[index])} keys", fontsize=10)
    figure.colorbar(image, ax=heat, shrink=0.9)
    places = np.arange(len(measured.profiled_layers))
    for number, label in enumerate(keys):
        values = measured.top_mass[:, :, number]
        colour = (0.13, 0.25 + 0.6 * number / max(1, len(keys) - 1), 0.75 - 0.5 * number / max(1, len(keys) - 1))
        lines.plot(places, values.mean(axis=1), marker="o", ms=3, color=colour, label=f"top {_label(label)}")
    lines.set_ylim(0, 1.02)
    _layer_ticks(lines, measured.profiled_layers)
    lines.set_xlabel("layer")
    lines.set_ylabel("mass, mean over heads")
    lines.set_title("Mass in the top keys", fontsize=10)
    lines.legend(fontsize=8, loc="lower left")
    return figure


def draw_all(
    folder: str | Path, measured: Measured, rows: Sequence[Row], chosen: Row, candidates: Sequence[Any]
) -> list[Path]:
    """Writes FILES, replacing older ones; returns their paths.

    Raises KascadeError if matplotlib is missing or the folder cannot be written.
    """
    folder = Path(folder)
    draws = (
        lambda: similarity(measured, chosen.anchors),
        lambda: importance(measured, chosen.anchors),
        lambda: pareto(rows, chosen, candidates),
        lambda: sparsity(measured),
    )
    pictures = {}
    for name, draw in zip(FILES, draws, strict=True):
        picture = io.BytesIO()
        draw().savefig(picture, dpi=140, format="png")
        pictures[folder / name] = picture.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KascadeError(f"cannot write plots to {folder}: {error.strerror or error}") from error
    for path, picture in pictures.items():
        atomic_write(path, picture)
    return list(pictures)


def _label(text: object) -> str:
    """Text from a file as matplotlib may draw it: it would read what stands between dollars as mathematics."""
    return plain(text, 60).replace("$", r"\$")
