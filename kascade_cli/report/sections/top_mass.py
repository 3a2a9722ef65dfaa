"""Figure 1: how much of its attention each query head has on its largest keys."""

from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.heat import heat_map
from kascade_cli.report.markup import Safe, details, figure, join, table, tag


def build(content: Content) -> Section | None:
    captures = content.of("capture")
    if not captures:
        return None
    lead = "If few keys hold nearly all of a head's attention, reading only those loses nearly nothing."
    parts = [tag("p", lead, class_="lead")]
    for source in captures:
        parts += [several(captures, source), _figure(source, content.measured[source.path])]
    return Section("top-mass", "Figure 1: attention on the top keys", join(parts))


def _figure(source, measured) -> Safe:
    keys = list(measured.top_mass_keys)
    at = keys.index("256") if "256" in keys else 0
    mass = measured.top_mass[:, :, at]  # [Lp, H]
    layers, heads = mass.shape
    low = min(0.9, int(float(mass.min()) * 10) / 10)
    what = f"top {keys[at]} keys" if not keys[at].endswith("%") else f"top {keys[at]} of the keys"
    picture = heat_map(
        mass.T.tolist(),
        columns=measured.profiled_layers,
        rows=list(range(heads)),
        x_label="layer",
        y_label="query head",
        title=f"Share of attention on the {what}, per layer and query head",
        description=f"{layers} layers across, {heads} query heads down; from {mass.min():.3f} to {mass.max():.3f}.",
        low=low,
        width=920,
        cell_height=max(5.0, min(22.0, 380 / heads)),
    )
    rows = [
        [layer, *(cell for k in range(len(keys)) for cell in _pair(measured.top_mass[place, :, k]))]
        for place, layer in enumerate(measured.profiled_layers)
    ]
    names = ["layer", *(name for key in keys for name in (f"top {key}", "worst head"))]
    said = caption(
        source,
        tag("b", f"Share of a query's attention on its {what}"),
        "(0 to 1), mean over decode rows and",
        f"{measured.prompts} prompts of up to {source.document['max_length']} tokens. Yellow: nearly all.",
    )
    numbers = details("Numbers: every layer, mean over heads and the worst head", table(names, rows))
    return figure(tag("div", picture, class_="wide"), said, id_="figure-1", more=numbers)


def _pair(values) -> tuple[str, str]:
    return f"{values.mean():.3f}", f"{values.min():.3f}"
