"""What the sections are given: the files by kind, and what was measured on the captures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kascade_cli.provenance import short
from kascade_cli.report.files import Kind, Source
from kascade_cli.report.markup import Safe, code, command, join, tag

if TYPE_CHECKING:
    from kascade_cli.analysis.similarity import Measured


@dataclass(frozen=True)
class Content:
    """measured: of each capture, by its path."""

    sources: Sequence[Source]
    measured: dict[Path, "Measured"] = field(default_factory=dict)

    def of(self, kind: Kind) -> list[Source]:
        return [source for source in self.sources if source.kind == kind]

    def sweeps(self, name: str) -> list[Source]:
        return [source for source in self.of("sweep") if source.document.get("sweep") == name]

    @property
    def anchors(self) -> list[int]:
        """Those of the first profile, none without one."""
        profiles = self.of("profile")
        return profiles[0].document.anchors if profiles else []


@dataclass(frozen=True)
class Section:
    """A part of the page; `title` stands in the list of contents too."""

    id: str
    title: str
    body: Safe


def caption(source: Source, *sentences: Any, unit: str = "") -> Safe:
    """What is seen, in what unit, and which file, command and weights it comes from."""
    weights = Safe("")
    if source.model:
        weights = join([" Weights: ", source.model, " (", short(source.fingerprint) or "no fingerprint", ")."])
    origin = join(["From ", code(source.name), "; made by ", command(source.command), ".", weights])
    return join([join(sentences, " "), f" {unit}" if unit else "", tag("span", origin, class_="from")])


def points(score: dict[str, Any]) -> str:
    """`83.5 ±1.1`, the farther limit."""
    return f"{score['score']:.1f} ±{reach(score):.1f}"


def difference(score: dict[str, Any]) -> str:
    return f"{score['score']:+.1f} ±{reach(score):.1f}".replace("-", "−")


def reach(score: dict[str, Any]) -> float:
    return max(score["high"] - score["score"], score["score"] - score["low"])


def several(sources: Sequence[Source], source: Source) -> Safe:
    """A heading with the file's name where a section shows more than one."""
    return tag("h3", source.name) if len(sources) > 1 else Safe("")
