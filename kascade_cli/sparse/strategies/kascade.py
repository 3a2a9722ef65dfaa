"""Kascade (arXiv 2512.16391): anchors choose keys, the layers between read them through a head map."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kascade_cli.schema import PHASES, Phase
from kascade_cli.sparse.layer import Keys, Layer, numbers
from kascade_cli.sparse.strategy import Strategy

UNMEASURED = "not measured: pooled"  # what a report says of head maps that the profile should have


class Kascade(Strategy):
    """Paper, section 3: layer 0 is dense and an anchor; anchors attend to their own Top-k; reuse layers to theirs.

    A profile without head maps runs pooled: one key set per anchor for all heads.
    """

    name, summary, rank = "kascade", "anchors choose keys, reuse layers read them through the head map", 1
    needs_profile, pooled, needs_head_maps = True, False, True

    def prepare(self) -> None:
        if self.needs_head_maps and not self.profile.heads_measured:
            self.pooled = True

    def facts(self) -> dict[str, Any]:
        if not self.needs_head_maps or self.profile.heads_measured:
            return {}
        return {"head_maps": "pooled" if self.profile.pooled else UNMEASURED}

    def attend(self, layer: Layer) -> Tensor:
        role = self.role(layer.index)
        if role == "dense":
            out, hint = layer.dense_and_hint()
            self.keep(layer, layer.choose(hint, self.pooled))
            return out
        if role == "anchor":
            keys = layer.choose(self.norm(layer), self.pooled)
            self.keep(layer, keys)
            return layer.attend(keys)
        return layer.attend(self.reused(layer))

    def role(self, layer: int) -> str:
        return self.profile.layers[layer].role

    def norm(self, layer: Layer) -> Tensor | None:
        """The log-sum-exp that an anchor's prefill scores are normalised with; None: the exact one."""
        return None

    def sources(self, layer: int, phase: Phase) -> list[tuple[int, int]]:
        """Per KV head of a reuse layer, (anchor layer, anchor head); pooled, an anchor has one set."""
        if self.pooled:
            return [(self.profile.layers[layer].anchor, 0)] * self.profile.model.kv_heads
        return self.profile.head_map(layer, phase)

    def reads(self, layer: int, phase: Phase) -> Iterable[int]:
        return {anchor for anchor, _ in self.sources(layer, phase)} if self.role(layer) == "reuse" else ()

    def keep(self, layer: Layer, keys: Keys) -> None:
        # A pooled set is the same in all processes.
        layer.state.keep(layer.index, keys, layer.groups, gather=not (self.pooled or self.stays(layer.batch)))

    def stays(self, batch: Any) -> bool:
        """Whether all heads read keys that their own process has chosen, so that no set must be gathered."""
        if batch.partition is None or self.pooled:
            return False
        key = ("stays", batch.partition.world)
        if key not in self._derived:
            size = self.profile.model.kv_heads // batch.partition.world
            rows = (
                self.sources(index, phase) for index in self.layers if self.role(index) == "reuse" for phase in PHASES
            )
            self._derived[key] = all(
                head // size == other // size for row in rows for head, (_, other) in enumerate(row)
            )
        return self._derived[key]

    def _first(self, layer: Layer) -> int:
        """The number of the first head whose set is at hand."""
        return layer.first_group if self.stays(layer.batch) else 0

    def reused(self, layer: Layer) -> Keys:
        """What a reuse layer reads."""
        device = layer.query.device
        sources = self.sources(layer.index, layer.phase)
        chosen = {a: layer.state.kept(a, layer.index).to(device) for a in sorted({a for a, _ in sources})}
        if len(chosen) == 1:
            return replace(chosen.popitem()[1], heads=self.head_map(layer))
        # Free assignment: heads of one layer read keys of several anchors.
        mine = sources[layer.first_group : layer.first_group + layer.groups]
        first = self._first(layer)
        indices = torch.stack([chosen[anchor].indices[:, head - first] for anchor, head in mine], 1)
        return Keys(indices, next(iter(chosen.values())).counts, heads=self.identity(layer))

    def head_map(self, layer: Layer) -> Tensor:
        """Which of the sets at hand each KV head of this process reads, int32 [G].

        Made once per device: a copy from the host in every step would keep decoding out of CUDA graphs.
        """
        key = (layer.index, layer.phase, layer.first_group, layer.query.device)
        if key not in self._derived:
            heads = [head - self._first(layer) for _, head in self.sources(layer.index, layer.phase)]
            mine = heads[layer.first_group : layer.first_group + layer.groups]
            self._derived[key] = torch.tensor(mine, dtype=torch.int32, device=layer.query.device)
        return self._derived[key]

    def identity(self, layer: Layer) -> Tensor:
        """Every KV head of this process its own set, int32 [G]."""
        return numbers(0, layer.groups, 1, layer.query.device)


class Pooled(Kascade):
    """The paper's all-heads-pooled variant (method: section 4)."""

    name, summary, rank = "kascade-pooled", "one key set per anchor and tile, pooled over all heads", 2
    pooled, needs_head_maps = True, False


class NoRemap(Kascade):
    """The ablation of the paper's figure 6: the identity head map."""

    name, summary, rank = "kascade-no-remap", "reuse layers read the keys of the anchor head with their own number", 3
    needs_head_maps = False

    def sources(self, layer: int, phase: Phase) -> list[tuple[int, int]]:
        if not self.profile.heads_measured:
            return [(self.profile.layers[layer].anchor, head) for head in range(self.profile.model.kv_heads)]
        return [(anchor, head) for head, (anchor, _) in enumerate(super().sources(layer, phase))]


class DecodeOnly(Kascade):
    """Dense prefill, so that only decoding is approximated."""

    name, summary, rank = "kascade-decode-only", "dense prefill, kascade decode", 4

    def attend(self, layer: Layer) -> Tensor:
        return layer.dense() if layer.phase == "prefill" else super().attend(layer)
