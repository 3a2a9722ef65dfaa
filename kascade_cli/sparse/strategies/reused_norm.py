"""An approximation of Kascade's prefill, off by default (docs/decisions.md)."""

from collections.abc import Iterable

from torch import Tensor

from kascade_cli.schema import Phase
from kascade_cli.sparse.layer import Layer
from kascade_cli.sparse.strategies.kascade import Kascade


class ReusedNorm(Kascade):
    """Normalises an anchor's scores over the keys of the anchor before it: most of a pass over Q K^T less."""

    name, rank = "kascade-reused-norm", 8
    summary = "anchors normalise their prefill scores over the keys of the anchor before (approximate)"

    def norm(self, layer: Layer) -> Tensor | None:
        if layer.phase == "decode":
            return None
        before = self.anchor_before(layer.index)
        return layer.sparse_norm(layer.state.kept(before, layer.index).to(layer.query.device))

    def anchor_before(self, layer: int) -> int:
        return max(anchor for anchor in self.profile.anchors if anchor < layer)

    def reads(self, layer: int, phase: Phase) -> Iterable[int]:
        if phase == "prefill" and self.role(layer) == "anchor":
            return (self.anchor_before(layer),)
        return super().reads(layer, phase)
