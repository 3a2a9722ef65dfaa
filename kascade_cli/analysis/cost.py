"""What attention costs by role, and the speed-up that a number of anchors predicts."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kascade_cli.errors import KascadeError, plain
from kascade_cli.files import read_bounded

_STRATEGY = "kascade"
_FIELDS = ("dense_ms", "layer0_ms", "anchor_ms", "reuse_ms")
_K = 1024
_MAX_BYTES = 64 << 20

# Kascade paper, Table 3: one H100, H=32, G=8, D=128, fp16, Top-k 10 %; milliseconds per layer.
# step: [(context, FlashAttention-3, layer 0, anchor, reuse)]
_PUBLISHED = {
    "decode": [
        (32 * _K, 2.93, 3.35, 2.71, 0.35),
        (64 * _K, 5.85, 6.74, 5.39, 0.65),
        (128 * _K, 11.68, 14.08, 10.78, 1.24),
        (256 * _K, 21.77, 25.95, 20.63, 2.31),
    ],
    "prefill": [
        (32 * _K, 12.28, 28.97, 25.11, 2.81),
        (64 * _K, 53.77, 120.36, 103.77, 9.36),
        (128 * _K, 215.76, 483.69, 416.53, 37.18),
        (256 * _K, 864.02, 1955.47, 1696.55, 160.14),
    ],
}


@dataclass(frozen=True)
class RoleCost:
    """Milliseconds of attention in one layer, by role; `dense` is the baseline of speed-ups."""

    context: int
    dense: float
    layer0: float
    anchor: float
    reuse: float


@dataclass(frozen=True)
class CostTable:
    """Costs per phase and context length. `source` says where they come from."""

    source: str
    rows: dict[str, list[RoleCost]]

    def at(self, phase: str, context: int) -> RoleCost | None:
        """The row whose context is nearest on a logarithmic scale; None if the phase was not measured."""
        rows = self.rows.get(phase)
        return min(rows, key=lambda row: abs(math.log(row.context / context))) if rows else None

    def speedup(self, phase: str, context: int, layers: int, anchors: int) -> float | None:
        """Attention time of `layers` dense layers over that with `anchors` anchors, the dense layer 0
        included.
        """
        cost = self.at(phase, context)
        if cost is None:
            return None
        sparse = cost.layer0 + (anchors - 1) * cost.anchor + (layers - anchors) * cost.reuse
        return layers * cost.dense / sparse


def published() -> CostTable:
    """The figures of the paper."""
    rows = {phase: [RoleCost(*row) for row in table] for phase, table in _PUBLISHED.items()}
    return CostTable("paper, Table 3 (one H100, 32 query and 8 KV heads, head size 128, Top-k 10 %)", rows)


def load(path: str | Path) -> CostTable:
    """Reads a bench result: JSON with `rows` (or a bare list) of objects with `phase` (or `step`), `context`,
    `dense_ms`, `layer0_ms`, `anchor_ms`, `reuse_ms`; other keys are ignored, and rows of another `strategy`
    than kascade. Where a phase and context come twice, the last row counts.

    Raises KascadeError if the file is missing or is not that.
    """
    path = Path(path)
    data = read_bounded(path, _MAX_BYTES, "cost table")
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not text, not JSON, a number of thousands of digits; nested
        raise KascadeError(f"{path}: not readable as JSON ({plain(error, 200)})") from error
    entries = document.get("rows") if isinstance(document, dict) else document
    found: dict[str, dict[int, RoleCost]] = {"decode": {}, "prefill": {}}
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        phase = entry.get("phase", entry.get("step")) if isinstance(entry, dict) else None
        if (
            isinstance(phase, str)
            and phase in found
            and all(name in entry for name in _FIELDS)
            and entry.get("strategy", _STRATEGY) == _STRATEGY
        ):
            row = _row(path, number, entry)
            found[phase][row.context] = row
    rows = {phase: sorted(table.values(), key=lambda row: row.context) for phase, table in found.items() if table}
    if not rows:
        raise KascadeError(
            f"{path}: no cost row; `kascade bench model -o` writes rows with phase, context and {', '.join(_FIELDS)}"
        )
    device = document.get("gpu") or document.get("device") if isinstance(document, dict) else None
    name = plain(path.name)
    return CostTable(f"{name} ({plain(device, 100)})" if device else name, rows)


def _row(path: Path, number: int, entry: dict[str, Any]) -> RoleCost:
    values = [entry.get("context"), *(entry[name] for name in _FIELDS)]
    if not all(_usable(value) for value in values) or values[0] < 1:
        raise KascadeError(f"{path}: rows.{number}: context and {', '.join(_FIELDS)} must be numbers above 0")
    return RoleCost(int(values[0]), *(float(value) for value in values[1:]))


def _usable(value: Any) -> bool:
    """A number above 0 with which sums and ratios stay finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-12 < value < 1e15
