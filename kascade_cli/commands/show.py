"""`kascade show`: a capture or a profile for people."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kascade_cli.commands import options as shared
from kascade_cli.console import cell, format_bytes, out, plain_table, print_json
from kascade_cli.errors import KascadeError
from kascade_cli.files import check_name
from kascade_cli.help import examples
from kascade_cli.provenance import short

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ANY_WEIGHTS = "(any weights of this shape)"


@examples("kascade show profile.yaml", "kascade show capture.h5 --json")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture (.h5) or a profile (.yaml).")],
    as_json: shared.AsJson = False,
) -> None:
    """Print what a capture or a profile holds."""
    check_name(file, "FILE")
    if file.exists() and not file.is_file():  # a pipe would block, a device may never end
        raise KascadeError(f"cannot read {file}: it is {'a folder' if file.is_dir() else 'not a regular file'}")
    try:
        with file.open("rb") as handle:
            head = handle.read(len(_HDF5))
    except OSError as error:
        raise KascadeError(f"cannot read {file}: {error.strerror}") from error
    if head == _HDF5 or file.suffix in (".h5", ".hdf5"):
        from kascade_cli.analysis.summary import describe_capture

        document = describe_capture(file)
        print_json(document) if as_json else _render_capture(document)
    else:
        from kascade_cli.schema import Profile

        profile = Profile.load(file)
        if as_json:
            print_json(profile.model_dump(by_alias=True, exclude_none=True, mode="json"))
        else:
            _render_profile(file, profile)


def _facts(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(cell(name), cell(value))
    return table


def _span(values: list[int]) -> str:
    """`128` or `97 to 255`."""
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _render_capture(document: dict[str, Any]) -> None:
    from kascade_cli.analysis.selection import ranges

    meta, prompts = document["meta"], document["prompts"]
    tiles = document["tiles"]
    state = "complete" if document["complete"] else "unfinished: go on with `kascade profile ... --resume`"
    facts = [
        ("capture", f"{document['file']} ({format_bytes(document['bytes'])}, {state})"),
        ("model", f"{meta['model_name']} {short(meta['model_fingerprint'])}"),
        ("heads", f"{meta['query_heads']} query, {meta['kv_heads']} KV, size {meta['head_dim']}"),
        ("layers", f"{ranges(document['profiled_layers'])} profiled, of {meta['layers']}"),
        ("dev set", f"{meta['dev_set_name']} (seed {meta['seed']}, sha256 {meta['dev_set_sha256'][:12]})"),
        ("prompts", f"{len(prompts)} of {meta['num_prompts']}"),
    ]
    if prompts:
        tokens = [row["tokens"] for row in prompts]
        facts += [
            ("tokens", f"{sum(tokens)} in all, {_span(tokens)} per prompt"),
            ("tiles", f"{tiles['prefill']} prefill tiles of {meta['tile']} queries, {tiles['decode']} decode rows"),
        ]
    facts += [
        ("made", f"{meta['dtype']} on {meta['device']}, kascade {meta['tool_version']}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in sorted(meta["versions"].items()))),
    ]
    out.print(_facts(facts))
    if not prompts:
        return
    out.print()
    keys = meta["top_mass_keys"]
    names = ["layer", "w", *(f"top {key}" for key in keys), *([f"worst head, {keys[-1]}"] if keys else [])]
    title = "Per layer, means over prompts: importance w, share of attention on the top keys"
    table = plain_table(names, title=title, right=names)
    for row in document["layers"]:
        values = [f"{row['top_mass'][key]:.3f}" for key in keys]
        worst = [f"{row['worst_head'][keys[-1]]:.3f}"] if keys else []
        table.add_row(str(row["layer"]), f"{row['importance']:.4f}", *values, *worst)
    out.print(table)


def compact_map(entries: list[tuple[int, int]], anchor: int) -> str:
    """A head map in one cell: `=` for the identity, `3 1 0 2` for heads of `anchor`, `8:3` for another
    anchor's.
    """
    if entries == [(anchor, head) for head in range(len(entries))]:
        return "="
    return " ".join(str(head) if source == anchor else f"{source}:{head}" for source, head in entries)


def _render_profile(path: Path, profile: Any) -> None:
    card, budget, selection, origin = profile.model, profile.budget, profile.selection, profile.provenance
    facts = [
        ("profile", f"{path} ({profile.schema_})"),
        ("model", f"{card.name} {short(card.fingerprint) if card.fingerprint else _ANY_WEIGHTS}"),
        ("heads", f"{card.query_heads} query, {card.kv_heads} KV, size {card.head_dim}"),
        (
            "budget",
            f"{budget.describe()} of the visible keys, at least {budget.min_keys}; tiles of {budget.tile} queries",
        ),
        (
            "anchors",
            f"{' '.join(map(str, profile.anchors))} ({len(profile.anchors)} of {len(profile.attention_layers)})",
        ),
    ]
    if profile.pooled:
        facts.append(("head maps", "none: all heads of a layer read one key set (pooled)"))
    elif not profile.heads_measured:
        facts.append(("head maps", "not measured: pooled (kascade select-anchors measures them)"))
    out.print(_facts(facts))
    out.print()
    title = "Roles; heads: per KV head, the anchor head whose keys it reads (= its own number)"
    if not profile.heads_measured:
        title = "Roles; heads: all read one key set per anchor"
    table = plain_table(
        ["layer", "role", "reads", "decode heads", "prefill heads"], title=title, right=["layer", "reads"]
    )
    for index, layer in enumerate(profile.layers):
        if layer.role == "reuse" and not profile.heads_measured:
            table.add_row(str(index), "reuse", str(layer.anchor), "pooled", "pooled")
        elif layer.role == "reuse":
            maps = [compact_map(profile.head_map(index, phase), layer.anchor) for phase in ("decode", "prefill")]
            table.add_row(str(index), "reuse", str(layer.anchor), *maps)
        else:
            style = "bold" if layer.role in ("dense", "anchor") else ""
            table.add_row(str(index), cell(layer.role, style), "", "", "")
    out.print(table)
    for title, section in (("Selection", selection), ("Provenance", origin)):
        if section:
            out.print()
            out.print(cell(title, "bold"))
            out.print(_facts(list(_flatten(section))))


def _flatten(section: dict[str, Any], prefix: str = "") -> Any:
    """(name, value) rows of nested mappings; long lists of mappings are counted, not printed."""
    for name, value in section.items():
        label = f"{prefix}{name}"
        if isinstance(value, dict):
            if value and all(not isinstance(entry, dict | list) for entry in value.values()):
                yield label, ", ".join(f"{key} {_value(entry)}" for key, entry in value.items())
            else:
                yield from _flatten(value, f"{label}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            yield label, f"{len(value)} rows (see --json)"
        elif isinstance(value, list):
            yield label, " ".join(map(str, value))
        else:
            yield label, _value(value)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
