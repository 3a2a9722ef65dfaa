"""The whole page: one HTML document that needs nothing else.

page(load_all(paths)) -> text. Raises KascadeError or UsageError, in one line, for files that cannot share a page.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kascade_cli import provenance
from kascade_cli.provenance import short
from kascade_cli.report import svg
from kascade_cli.report.content import Content, Section
from kascade_cli.report.files import Source, check_one_model, load
from kascade_cli.report.glance import tiles
from kascade_cli.report.markup import Safe, code, join, tag
from kascade_cli.report.sections import BUILDERS
from kascade_cli.report.style import style_sheet

# A browser then fetches nothing, whatever the files hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def load_all(paths: Sequence[Path]) -> list[Source]:
    """Every file once, all of one model. Raises KascadeError or UsageError."""
    sources = [load(path) for path in dict.fromkeys(paths)]
    check_one_model(sources)
    return sources


def measure_captures(
    sources: Sequence[Source], *, top_k: int, advance: Callable[[str, int, int], None] = lambda name, done, total: None
) -> dict[Path, Any]:
    """What figures 1, 3 and 4 need of every capture, streamed; `advance(file name, prompts done, of how many)`."""
    from kascade_cli.analysis.similarity import measure

    found = {}
    for source in sources:
        if source.kind == "capture":
            found[source.path] = measure(
                source.path,
                top_k=top_k,
                reduce="mean",
                advance=lambda done, total, s=source: advance(s.name, done, total),
            )
    return found


def page(sources: Sequence[Source], measured: dict[Path, Any], *, title: str | None = None) -> str:
    """The HTML text. Raises KascadeError for a file whose rows are damaged."""
    svg.restart_ids()
    content = Content(sources, measured)
    sections = [section for build in BUILDERS if (section := build(content)) is not None]
    return _document(content, sections, title)


def _document(content: Content, sections: Sequence[Section], title: str | None) -> str:
    named = next((source for source in content.sources if source.model), None)
    heading = title or (f"Kascade on {named.model}" if named else "Kascade: measurements")
    subject = ["Sparse attention report"]
    if shape := next((source.shape for source in content.sources if source.shape), None):
        subject.append(f"{shape['layers']} layers, {shape['query_heads']} query and {shape['kv_heads']} KV heads")
    if named and named.fingerprint:
        subject.append(join(["weights ", code(short(named.fingerprint))]))
    contents = join(tag("li", tag("a", section.title, href=f"#{section.id}")) for section in sections)
    head = join(
        [
            Safe('<meta charset="utf-8">'),
            Safe('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Safe(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            tag("title", heading),
            tag("style", Safe(style_sheet())),
        ]
    )
    top = tag(
        "header", tag("p", join(subject, " · "), class_="kicker"), tag("h1", heading), tiles(content),
        tag("nav", tag("ol", contents), aria_label="Contents"),
    )  # fmt: skip
    body = tag("main", *(tag("section", tag("h2", part.title), part.body, id_=part.id) for part in sections))
    foot = tag("footer", f"Made by {provenance.tool()} (kascade report) on {provenance.now()}. ", _method())
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{top}{body}{foot}</body></html>\n'


def _method() -> str:
    return (
        "Figures and Table 3 are numbered as in “Kascade: A Practical Sparse Attention Method for Long-Context LLM "
        "Inference” (arXiv 2512.16391)."
    )
