"""Which model, and which files with what made them."""

from kascade_cli.report.content import Content, Section
from kascade_cli.report.files import Source
from kascade_cli.report.markup import Safe, code, command, join, table, tag

_KIND = {
    "capture": "capture",
    "profile": "profile",
    "evaluation": "evaluation",
    "sweep": "sweep",
    "bench": "benchmark",
}


def build(content: Content) -> Section:
    known = [source for source in content.sources if source.model is not None]
    parts = [_facts(known)] if known else []
    rows = [
        [code(source.name), _KIND[source.kind], _about(source), source.made or "–", command(source.command)]
        for source in content.sources
    ]
    parts.append(tag("h3", "Files"))
    parts.append(table(["file", "kind", "what", "made", "command"], rows, left=5, class_="files"))
    note = "Commands of captures, profiles and evaluations are put together from what the files record."
    parts.append(tag("p", note, class_="small"))
    return Section("model", "Model, files and commands", join(parts))


def _facts(known: list[Source]) -> Safe:
    rows: list[tuple[str, object]] = [("model", known[0].model)]
    prints = list(dict.fromkeys(source.fingerprint for source in known if source.fingerprint))
    rows.append(("fingerprint", join([code(value) for value in prints], " ") or "none: for every model of this shape"))
    shape = next((source.shape for source in known if source.shape), None)
    if shape:
        rows.append(
            ("attention", f"{shape['layers']} layers, {shape['query_heads']} query and {shape['kv_heads']} KV heads")
        )
    body = join(tag("tr", tag("th", name, scope="row", class_="name"), tag("td", value)) for name, value in rows)
    if len(prints) > 1:
        older = "Older files have fingerprints made by another rule; they are matched by the model's name and shape."
        return join([tag("table", tag("tbody", body), class_="facts"), tag("p", older, class_="small")])
    return tag("table", tag("tbody", body), class_="facts")


def _about(source: Source) -> str:
    document = source.document
    if source.kind == "capture":
        return (
            f"{document['num_prompts']} prompts of {document['dev_set_name']}, up to {document['max_length']} tokens"
        )
    if source.kind == "profile":
        return f"{len(document.anchors)} anchors of {len(document.attention_layers)} layers"
    if source.kind == "sweep":
        return f"figure {document.get('figure')}: {document.get('sweep')}, {len(document['rows'])} rows"
    return f"{len(document['rows'])} rows"
