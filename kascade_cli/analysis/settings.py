"""How anchors are chosen, as one value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kascade_cli.analysis import rules, selection, verdict
from kascade_cli.errors import UsageError
from kascade_cli.schema import PHASES


@dataclass(frozen=True)
class Settings:
    """How anchors are chosen. Raises UsageError for more than one rule, or numbers that make no sense.

    phase: decode, prefill or both; weights: importance or uniform; assignment: nearest or free. The rules:
    `anchors` (how many, or which absolute layers), `min_recovered`, `target_speedup`; None of them: the default.
    max_anchors: the largest number to look at. What is as good as the best, where candidates were measured:
    kl_tolerance (nats), lost_tolerance (share of the answers; None: 0.01 of anchor sets, 0.03 of ratios).
    tensor_parallel: ranks that head maps stay within. heads: `maps`, every head of a reuse layer reads what its anchor
    head chose; `pooled`, all read what those choose together; `auto`, what does better where candidates are measured
    (else maps; so too over ranks, which pooled sets would make wait for each other, and under free assignment).
    """

    phase: str = "both"
    weights: str = "importance"
    assignment: str = "nearest"
    anchors: int | tuple[int, ...] | None = None
    min_recovered: float | None = None
    target_speedup: float | None = None
    max_anchors: int | None = None
    kl_tolerance: float = verdict.KL_TOLERANCE
    lost_tolerance: float | None = None
    tensor_parallel: int = 1
    heads: str = "auto"

    def __post_init__(self) -> None:
        rules.check_rules(self.anchors, self.min_recovered, self.target_speedup)
        if not (math.isfinite(self.kl_tolerance) and self.kl_tolerance >= 0):
            raise UsageError(f"--kl-tolerance {self.kl_tolerance} must be a number, 0 or more")
        if self.lost_tolerance is not None and not 0 <= self.lost_tolerance <= 1:
            raise UsageError(f"--lost-tolerance {self.lost_tolerance} is outside [0, 1]")
        if isinstance(self.anchors, tuple):
            selection.check_set(self.anchors)
        if self.heads == "pooled" and self.tensor_parallel > 1:
            raise UsageError("--heads pooled: one set for the heads of all ranks cannot stay within a rank")
        if self.heads == "pooled" and self.assignment == "free":
            raise UsageError(
                "--assignment free says which anchor each head reads, and --heads pooled that all read one"
            )

    @property
    def phases(self) -> list[str]:
        return list(PHASES) if self.phase == "both" else [self.phase]

    def both_ways(self, kv_heads: int) -> bool:
        """Whether sets are measured with head maps and pooled."""
        return (self.heads, self.tensor_parallel, self.assignment) == ("auto", 1, "nearest") and kv_heads > 1

    @property
    def tolerance(self) -> verdict.Tolerance:
        if self.lost_tolerance is None:
            return verdict.Tolerance(self.kl_tolerance)
        return verdict.Tolerance(self.kl_tolerance, self.lost_tolerance, self.lost_tolerance)

    @property
    def has_rule(self) -> bool:
        return not (self.anchors is self.min_recovered is self.target_speedup is None)

    def limit(self, layers: Sequence[int]) -> int:
        """The largest number of anchors to look at in a capture of these (absolute) layers.

        Raises UsageError for numbers and sets that it cannot have.
        """
        count = len(layers)
        given = isinstance(self.anchors, tuple)
        if given:
            selection.positions(self.anchors, layers)
        size = len(self.anchors) if given else self.anchors
        for name, value in (("--anchors", None if given else size), ("--max-anchors", self.max_anchors)):
            if value is not None and not 1 <= value <= count:
                raise UsageError(
                    f"{name} {value} is outside 1..{count}: the capture has {count} full-attention layers"
                )
        if not given and size is not None and self.max_anchors is not None and size > self.max_anchors:
            raise UsageError(f"--anchors {size} is more than --max-anchors {self.max_anchors}")
        return self.max_anchors or max(selection.default_max_anchors(count), size or 0)
