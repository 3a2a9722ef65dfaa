"""One forward pass of an attached model: lengths, budgets and the indices that anchors leave for reuse layers."""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from kascade_cli.attention.lengths import lengths_of
from kascade_cli.attention.plan import SINKS, LayerPlan, Plan
from kascade_cli.attention.refresh import Refresh
from kascade_cli.errors import KascadeError
from kascade_cli.kernels import Backend
from kascade_cli.kernels.reference import first_tile, tile_count

_GIB = 1024**3
_QUERY_BLOCK = 1024


@functools.cache
def _score_bytes(device: torch.device) -> int:
    """Room for the scores of one block of tiles: at 128k tokens all tiles together would take 17 GB.

    Larger blocks leave fewer SMs idle at their ends (3 % of an anchor at 128k between 0.5 and 4 GiB on an H200).
    """
    if device.type != "cuda":
        return _GIB // 16
    return min(4 * _GIB, torch.cuda.get_device_properties(device).total_memory // 16)


class Forward:
    """State of one forward pass. It is made anew at the first attention layer, so stale indices cannot be read.

    `refresh` is what survives (kascade-refresh only); it alone decides whether a decode step is `between`, that is,
    reads the keys of an earlier one.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        refresh: Refresh | None = None,
    ):
        self.plan = plan
        self.backend = backend
        self.batch, self.queries, self.slots = query.shape[0], query.shape[2], key.shape[2]
        self.groups = key.shape[1]
        self.plain = mask is None
        self.query_start, self.kv_start, self.kv_len = lengths_of(mask, query, key)
        self.phase = "decode" if self.queries == 1 else "prefill"
        self.indices: dict[int, Tensor] = {}
        self._windows: Tensor | None = None
        self.refresh, self.between = refresh, False
        if refresh is not None and refresh.begin(self, key):
            self.between, self.indices = True, refresh.indices

    def check(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Raises KascadeError if a layer's shapes are not those of this forward pass."""
        if (query.shape[0], query.shape[2], key.shape[2]) != (self.batch, self.queries, self.slots):
            raise KascadeError(
                f"layer {layer} sees {tuple(key.shape)} keys where the first layer saw {self.slots} slots; "
                "full-attention layers with caches of different lengths are not supported"
            )

    @functools.cached_property
    def tile(self) -> int:
        return self.plan.budget.tile

    @functools.cached_property
    def tiles(self) -> int:
        # Without padding every row starts at a tile's edge or, in a chunk, wherever the cache ends.
        return tile_count(self.queries, self.tile, aligned=self.plain and (self.slots - self.queries) % self.tile == 0)

    @functools.cached_property
    def before(self) -> Tensor:
        """Keys before each local tile, int32 [B, NT]; 0 for a tile past the row's end."""
        first = first_tile(self.query_start, self.kv_start, self.tile)
        index = first[:, None] + torch.arange(self.tiles, dtype=torch.int32, device=first.device)
        edge = index * self.tile
        return torch.where(edge < self.kv_len[:, None], edge, 0)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Keys to select: int32 [B] in decode, [B, NT] in prefill; between refreshes, those that are kept."""
        if self.between:
            return self.refresh.counts
        return self.plan.counts(self.kv_len if self.phase == "decode" else self.before)

    @property
    def sets(self) -> int:
        """Key sets per row: one for each KV head, or one for all."""
        return 1 if self.plan.pooled else self.groups

    @functools.cached_property
    def width(self) -> int:
        """The widest selection possible with this many slots; depends on shapes only."""
        bound = self.slots
        if self.phase == "prefill" and self.plain:
            bound = (self.slots - 1) // self.tile * self.tile
        return max(1, self.plan.budget.count(bound))

    def attend(self, layer: int, plan: LayerPlan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [B, H, T, D], key, value [B, G, S, D] -> [B, H, T, Dv]."""
        if plan.attends == "window":
            return self._sparse(query, key, value, self._window(), self._identity(query, 1), scale)
        if plan.attends == "dense":
            writes = plan.writes and not self.between
            out, extra = self._dense(query, key, value, scale, writes=writes)
            if writes:
                self._choose(layer, query, key, extra, scale)
            return out
        logits = None
        if plan.writes:
            if not self.between:
                known = None if plan.norm is None else self._reused_norm(layer, plan.norm, query, key, scale)
                logits = self._choose(layer, query, key, known, scale)
            chosen = self.indices[layer].to(query.device)
            head_map = self._identity(query, chosen.shape[1])
        else:
            chosen, head_map = self._reused(layer, plan, query)
        return self._sparse(query, key, value, chosen, head_map, scale, logits)

    def read_and_visible(self) -> Tensor:
        """float64 [2] on the device: keys that a sparse layer attends to, and keys visible, summed over queries."""
        if self.phase == "decode":
            return torch.stack([self.counts.sum(), self.kv_len.sum()]).double()
        position = (self.query_start - self.kv_start)[:, None] + torch.arange(self.queries, device=self.kv_len.device)
        real = (position >= 0) & (position < self.kv_len[:, None])
        local = position // self.tile - first_tile(self.query_start, self.kv_start, self.tile)[:, None]
        selected = self.counts.gather(1, local.clamp(0, self.tiles - 1).long())
        read = (selected + position % self.tile + 1) * real
        return torch.stack([read.sum(), ((position + 1) * real).sum()]).double()

    def _choose(self, layer: int, query: Tensor, key: Tensor, known: Tensor | None, scale: float) -> Tensor | None:
        """Leaves the indices of an anchor for the layers, and if need be the steps, after it; returns its logits."""
        self.indices[layer], logits = self._select(query, key, known, scale)
        if self.refresh is not None and self.phase == "decode":
            self.refresh.keep(layer, self.indices[layer])
        return logits

    def _identity(self, query: Tensor, sets: int) -> Tensor:
        """Every KV head its own set, or all the one there is."""
        head = torch.arange(self.groups, dtype=torch.int32, device=query.device)
        return head if sets == self.groups else torch.zeros_like(head)

    def _reused(self, layer: int, plan: LayerPlan, query: Tensor) -> tuple[Tensor, Tensor]:
        anchors = {
            anchor: self._anchor_indices(layer, anchor, query) for anchor in sorted({a for a, _ in plan.sources})
        }
        if len(anchors) == 1:
            return anchors.popitem()[1], self.plan.head_map(self.phase, layer, query.device)
        # Free assignment: heads of one layer read keys of several anchors.
        chosen = torch.stack([anchors[anchor][:, head] for anchor, head in plan.sources], 1)
        return chosen, self._identity(query, self.groups)

    def _anchor_indices(self, layer: int, anchor: int, query: Tensor) -> Tensor:
        """What `anchor` left for `layer`. Raises KascadeError if it has not run in this forward pass."""
        if anchor not in self.indices:
            raise KascadeError(f"layer {layer} reuses layer {anchor}, which has not run in this forward pass")
        return self.indices[anchor].to(query.device)

    def _reused_norm(self, layer: int, anchor: int, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """An anchor's log-sum-exp over the keys that `anchor` chose instead of all: float32 [B, H, T]."""
        chosen = self._anchor_indices(layer, anchor, query)
        counts, head_map = self.counts.to(query.device), self._identity(query, chosen.shape[1])
        lengths = [tensor.to(query.device) for tensor in (self.query_start, self.kv_start, self.kv_len)]
        return self.backend.prefill_sparse_lse(
            query, key, chosen, counts, head_map, *lengths, scale=scale, tile=self.tile
        )

    def _sparse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chosen: Tensor,
        head_map: Tensor,
        scale: float,
        logits: Tensor | None = None,
    ) -> Tensor:
        """`logits`: what scoring left of this layer's own (decode only)."""
        counts = self.counts.to(query.device)
        if self.phase == "decode":
            out = self.backend.decode_sparse(
                query[:, :, 0], key, value, chosen, counts, head_map, scale=scale, logits=logits
            )
            return out[:, :, None]
        lengths = [tensor.to(query.device) for tensor in (self.query_start, self.kv_start, self.kv_len)]
        return self.backend.prefill_sparse(
            query, key, value, chosen, counts, head_map, *lengths, scale=scale, tile=self.tile
        )

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, writes: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output, and what selecting can use of it: scores in decode, log-sum-exp in prefill (None: not computed)."""
        lengths = [tensor.to(query.device) for tensor in (self.query_start, self.kv_start, self.kv_len)]
        if self.backend.name == "torch" or (self.plain and not writes and not self.between):
            return self._sdpa(query, key, value, lengths, scale), None
        if self.phase == "decode":
            out, scores = self.backend.decode_dense(
                query[:, :, 0], key, value, *lengths[1:], scale=scale, scores=writes
            )
            return out[:, :, None], scores
        return self.backend.prefill_dense(query, key, value, *lengths, scale=scale)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[Tensor], scale: float) -> Tensor:
        if self.queries == 1:
            return self._sdpa_row(query, key, value, lengths, scale)
        gqa = query.shape[1] != key.shape[1]
        if self.plain and self.queries == self.slots:
            return functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=gqa
            )
        query_start, kv_start, kv_len = (tensor[:, None, None, None] for tensor in lengths)
        slot = torch.arange(self.slots, device=query.device)
        inside = (slot >= kv_start) & (slot < kv_start + kv_len)
        if not self.plain:  # a mask that is added does not silence a NaN, nor does a weight of 0
            key, value = (tensor.masked_fill(~inside.transpose(-1, -2), 0.0) for tensor in (key, value))
        outs = []
        for begin in range(0, self.queries, _QUERY_BLOCK):
            block = query[:, :, begin : begin + _QUERY_BLOCK]
            position = query_start + torch.arange(begin, begin + block.shape[2], device=query.device)[:, None]
            mask = inside & (slot <= position)
            real = (position >= kv_start) & (position < kv_start + kv_len)
            out = functional.scaled_dot_product_attention(
                block, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa
            )
            outs.append(out.masked_fill(~real, 0.0))
        return torch.cat(outs, 2)

    def _sdpa_row(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[Tensor], scale: float) -> Tensor:
        """One query: the heads of a group stand in for queries, so that K and V are not repeated."""
        grouped = query.unflatten(1, (self.groups, -1)).flatten(2, 3)
        mask = None
        if not self.plain:
            slot = torch.arange(self.slots, device=query.device)
            _, kv_start, kv_len = (tensor[:, None, None, None] for tensor in lengths)
            mask = (slot >= kv_start) & (slot < kv_start + kv_len)
            key, value = (tensor.masked_fill(~mask.transpose(-1, -2), 0.0) for tensor in (key, value))
        out = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return out.flatten(1, 2)[:, :, None]

    def _select(self, query: Tensor, key: Tensor, known: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
        """Indices of this layer's Top-k: int32 [B, G, K] or [B, G, NT, K]; one set instead of G when pooled.

        `known` is what dense attention left: pooled scores in decode, the log-sum-exp in prefill. The second result
        is the logits that scoring left, if it did.
        """
        query_start, kv_start, kv_len = (t.to(query.device) for t in (self.query_start, self.kv_start, self.kv_len))
        counts = self.counts.to(query.device)
        if self.phase == "decode":
            scores, logits = known, None
            if scores is None:
                scores, logits = self.backend.decode_score(
                    query[:, :, 0], key, kv_start, kv_len, scale=scale, logits=True
                )
            chosen = self.backend.select_topk(
                self._pool(scores), counts[:, None], kv_start[:, None], kv_len[:, None], max_count=self.width
            )
            return chosen, logits
        lse = known
        if lse is None and self.backend.name != "torch":
            _, lse = self.backend.prefill_dense(query, key, None, query_start, kv_start, kv_len, scale=scale)
        before = self.before.to(query.device)
        block = max(1, _score_bytes(query.device) // (4 * self.batch * self.groups * self.slots))
        parts = []
        for first in range(0, self.tiles, block):
            tiles = min(block, self.tiles - first)
            scores = self.backend.prefill_score(
                query,
                key,
                lse,
                query_start,
                kv_start,
                kv_len,
                scale=scale,
                tile=self.tile,
                first=first,
                tiles=tiles,
            )
            here = slice(first, first + tiles)
            rows = [counts[:, None, here], kv_start[:, None, None], before[:, None, here]]
            parts.append(self.backend.select_topk(self._pool(scores), *rows, max_count=self.width))
        return (torch.cat(parts, 2) if len(parts) > 1 else parts[0]), None

    def _pool(self, scores: Tensor) -> Tensor:
        return scores.sum(1, keepdim=True) if self.plan.pooled else scores

    def _window(self) -> Tensor:
        """Sinks and the most recent keys, as many as the budget: int32 [B, 1, K] or [B, 1, NT, K]."""
        if self._windows is None:
            end = self.kv_len if self.phase == "decode" else self.before
            start = self.kv_start if self.phase == "decode" else self.kv_start[:, None]
            order = torch.arange(self.width, dtype=torch.int32, device=end.device)
            recent = end[..., None] - self.counts[..., None] + order
            # The first SINKS entries are the row's first tokens; the window ends at the last key.
            token = torch.where(order < torch.clamp(self.counts[..., None], max=SINKS), order, recent)
            self._windows = torch.where(order < self.counts[..., None], token + start[..., None], -1).unsqueeze(1)
        return self._windows
