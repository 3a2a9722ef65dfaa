"""The profile as a picture: a row per layer with its role, whom it reads, and the head maps of both phases."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kascade_cli.report.content import Content, Section, caption, several
from kascade_cli.report.files import Source, trusted
from kascade_cli.report.markup import Safe, details, figure, join, number, table, tag, text
from kascade_cli.report.svg import picture

if TYPE_CHECKING:
    from kascade_cli.schema import Profile

_ROLE = {"dense": "role-dense", "anchor": "role-anchor", "reuse": "role-reuse", "passthrough": "role-none"}
_MEANING = {
    "dense": "dense: reads every key, and chooses for others",
    "anchor": "anchor: chooses its own keys, and for others",
    "reuse": "reuse: reads keys that an anchor chose",
    "passthrough": "passthrough: not full attention, the model's own",
}
_ROW, _TOP, _MAPS = 19, 46, 176  # pixels: a layer's height, where layers begin, where the first head map begins
_MOST_CELLS = 20_000


def build(content: Content) -> Section | None:
    profiles = content.of("profile")
    if not profiles:
        return None
    parts: list[Safe] = []
    for source in profiles:
        with trusted(source):
            parts += [several(profiles, source), _budget(source.document), _figure(source)]
    return Section("profile", "The profile: roles, head maps, budget", join(parts))


def _budget(profile: "Profile") -> Safe:
    budget, selection = profile.budget, profile.selection
    anchors, full = profile.anchors, profile.attention_layers
    lengths = ratio_rows(budget)
    share = "a share by length (table)" if lengths else f"{100 * budget.ratio:.4g} %"
    sentence = (
        f"{len(anchors)} of {len(full)} layers choose keys (layers {', '.join(map(str, anchors))}). A query reads "
        f"{share} of the keys that it sees, at least {budget.min_keys}, chosen for tiles of {budget.tile} queries in "
        "prefill."
    )
    parts = [tag("p", sentence)]
    if selection.get("why"):
        parts.append(tag("p", "Why these anchors: ", str(selection["why"]), ".", class_="lead"))
    if lengths:
        names = ["keys visible, from", "ratio", "keys read there"]
        parts.append(table(names, lengths, caption="Ratio by length; below the first length its ratio holds too"))
    return join(parts)


def ratio_rows(budget: Any) -> list[list[Any]]:
    """(length, ratio, keys read) of a budget with a table of lengths; nothing where one ratio serves all."""
    found = getattr(budget, "ratios", None)
    pairs = sorted(found.items()) if isinstance(found, Mapping) else []
    return [[f"{length:,}", f"{100 * ratio:.4g} %", f"{budget.count(length):,}"] for length, ratio in pairs]


def _figure(source: Source) -> Safe:
    profile: Profile = source.document
    used = list(dict.fromkeys(layer.role for layer in profile.layers))
    boxes = [tag("li", tag("span", class_=f"box {_ROLE[role]}"), _MEANING[role]) for role in used]
    measured = profile.heads_measured
    boxes += (
        []
        if not measured
        else [
            tag("li", tag("span", class_="box moved"), "remapped head"),
            tag("li", tag("span", class_="box same"), "head reads its namesake"),
        ]
    )
    drawing = _draw(profile)
    said = caption(
        source,
        tag("b", "Layers from first to last."),
        "Lines lead from an anchor to the layers that read its keys.",
        "A cell is a KV head; its number is the anchor's head whose keys it reads."
        if measured
        else ("" if profile.pooled else "The head maps have not been measured: ")
        + "All heads read the keys that the anchor's heads choose together.",
        _stability(profile),
    )
    more = join([details("Numbers: every layer", _table(profile)), _recovered(profile)])
    return figure(join([tag("ul", *boxes, class_="legend"), tag("div", drawing, class_="wide")]), said, more=more)


def _stability(profile: "Profile") -> str:
    """How firmly the anchors were chosen."""
    stable = profile.selection.get("stability")
    if not isinstance(stable, dict) or not isinstance(stable.get("searched_again"), float | int):
        return ""
    searched = stable.get("searched")
    if not isinstance(searched, list):
        return ""
    # Verification may have chosen another set than the objective, which is what the resamples are searched with.
    found = "these anchors" if searched == profile.selection.get("anchors") else " ".join(map(str, searched))
    return (
        f"The objective alone gives {found} again from {100 * stable['searched_again']:.0f} % of "
        f"{stable.get('resamples')} resamples of the prompts."
    )


def _draw(profile: "Profile") -> Safe:
    groups, count = profile.model.kv_heads, len(profile.layers)
    cell = 26 if groups <= 8 else 20 if groups <= 16 else 12
    unmeasured = not profile.heads_measured
    block = max(groups * cell + 34, 210 if unmeasured else 150)
    starts = {"decode": _MAPS, "prefill": _MAPS + block}
    parts = ['<text class="label" x="6" y="16">layer</text><text class="label" x="44" y="16">role</text>']
    for phase, start in starts.items():
        parts.append(f'<text class="heading" x="{start}" y="16">{phase} head map</text>')
        every = 1 if cell > 18 else 4
        for head in range(0, 0 if unmeasured else groups, every):
            at = start + (head + 0.5) * cell
            parts.append(f'<text class="tick middle" x="{at:.1f}" y="{_TOP - 9}">{head}</text>')
    parts += _lines(profile)
    cells = 2 * groups * sum(layer.role == "reuse" for layer in profile.layers) <= _MOST_CELLS
    for index, layer in enumerate(profile.layers):
        top = _TOP + index * _ROW
        ink = "on-role" if layer.role in ("dense", "anchor") else ""
        parts.append(f'<text class="tick end" x="34" y="{top + 13.5}">{index}</text>')
        parts.append(
            f'<rect class="{_ROLE[layer.role]}" x="44" y="{top + 1}" width="84" height="{_ROW - 2}" rx="3"/>'
            f'<text class="note middle {ink}" x="86" y="{top + 13.5}">{text(layer.role)}</text>'
        )
        if layer.role == "reuse" and not layer.mapped:
            for start in starts.values():
                parts.append(
                    f'<text class="note" x="{start + 2}" y="{top + 13.5}">pooled: one set for all heads</text>'
                )
        elif layer.role == "reuse" and cells:
            for phase, start in starts.items():
                parts += _cells(profile.head_map(index, phase), layer.anchor, index, start, top, cell)
    width = starts["prefill"] + block
    anchors = ", ".join(map(str, profile.anchors))
    return picture(
        parts, max(width, 560), _TOP + count * _ROW + 8, "The profile's layers, roles and head maps",
        f"{count} layers from top to bottom; anchors are {anchors}.",
    )  # fmt: skip


def _lines(profile: "Profile") -> list[str]:
    """A line down from every anchor, with a foot at each layer that reads it."""
    readers: dict[int, set[int]] = {}
    for index, layer in enumerate(profile.layers):
        if layer.role == "reuse":
            for phase in ("decode", "prefill"):
                for anchor in {anchor for anchor, _ in _entries(profile, index, phase)} or {layer.anchor}:
                    readers.setdefault(anchor, set()).add(index)
    several_read = any(
        len([anchor for anchor, who in readers.items() if index in who]) > 1 for index in range(len(profile.layers))
    )
    parts = []
    for number_, (anchor, who) in enumerate(sorted(readers.items())):
        x = 138 + (6 * (number_ % 5) if several_read else 0)
        middle = _TOP + anchor * _ROW + _ROW / 2
        feet = "".join(f"M{x} {_TOP + index * _ROW + _ROW / 2}H{_MAPS - 8}" for index in sorted(who))
        last = _TOP + max(who) * _ROW + _ROW / 2
        parts.append(f'<path class="arc" d="M128 {middle}H{x}V{last}{feet}"/>')
    return parts


def _entries(profile: "Profile", layer: int, phase: Any) -> list[tuple[int, int]]:
    """A reuse layer's head map; nothing where it has none."""
    return profile.head_map(layer, phase) if profile.layers[layer].mapped else []


def _cells(
    entries: list[tuple[int, int]], nearest: int, layer: int, start: float, top: float, cell: float
) -> list[str]:
    parts = []
    for head, (anchor, read) in enumerate(entries):
        look = "same" if (anchor, read) == (nearest, head) else "moved"
        said = f"layer {layer}, head {head} reads head {read} of layer {anchor}"
        x = start + head * cell
        parts.append(
            f'<g><title>{said}</title><rect class="{look}" x="{x + 1}" y="{top + 1}" width="{cell - 2}" '
            f'height="{_ROW - 2}" rx="2"/>'
        )
        if cell > 18:
            shown = str(read) if anchor == nearest else f"{anchor}:{read}"
            size = ' style="font-size:9px"' if len(shown) > 3 else ""
            parts.append(f'<text class="note middle"{size} x="{x + cell / 2}" y="{top + 13.5}">{shown}</text>')
        parts.append("</g>")
    return parts


def _table(profile: "Profile") -> Safe:
    rows = []
    for index, layer in enumerate(profile.layers):
        maps = ["", ""]
        if layer.role == "reuse":
            maps = [
                " ".join(f"{head}" if anchor == layer.anchor else f"{anchor}:{head}" for anchor, head in entries)
                for entries in (_entries(profile, index, "decode"), _entries(profile, index, "prefill"))
            ]
        rows.append([index, layer.role, "" if layer.anchor is None else layer.anchor, *maps])
    return table(["layer", "role", "reads", "decode heads", "prefill heads"], rows, left=5)


def _recovered(profile: "Profile") -> Safe:
    """What each number of anchors was predicted to give."""
    budgets = profile.selection.get("budgets")
    if not isinstance(budgets, list) or not all(isinstance(row, dict) and "anchors" in row for row in budgets):
        return Safe("")
    chosen = None if profile.pooled else profile.selection.get("anchors")  # rows are of sets with head maps
    rows = []
    for row in budgets:
        speed = row.get("speedup") or {}
        cells = [
            len(row["anchors"]), " ".join(map(str, row["anchors"])), number(row.get("recovered_mean")),
            number(row.get("recovered_worst")), number(speed.get("decode")), number(speed.get("prefill")),
        ]  # fmt: skip
        first = tag("th", cells[0], scope="row", class_="name")
        rest = join([tag("td", cells[1], class_="name"), *(tag("td", cell) for cell in cells[2:])])
        rows.append(tag("tr", first, rest, class_="chosen" if row["anchors"] == chosen else None))
    names = ["anchors", "layers", "attention kept, mean", "worst layer", "decode speed-up", "prefill speed-up"]
    return details("Numbers: the best set of every size, as predicted from the capture", table(names, rows, left=2))
