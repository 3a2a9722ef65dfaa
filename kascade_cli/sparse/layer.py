"""What a strategy may do with one layer's q, k and v: attend densely, choose keys, attend to chosen keys."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kascade_cli.kernels import Backend
from kascade_cli.kernels.reference import wide
from kascade_cli.sparse.batch import Batch
from kascade_cli.sparse.sdpa import dense_sdpa
from kascade_cli.sparse.state import Pass

_GIB = 1024**3


@dataclass(frozen=True)
class Keys:
    """Slots to read: indices int32 [B, G or 1, K] or [B, G or 1, NT, K], the first `counts` ([B] or [B, NT]) valid.

    heads: int32 [G], the set that each KV head reads (None: its own, or the only one). logits: what scoring left of
    this layer's own (decode).
    """

    indices: Tensor
    counts: Tensor
    heads: Tensor | None = None
    logits: Tensor | None = None

    def to(self, device: torch.device) -> "Keys":
        """On another device, without heads and logits, which are a layer's own."""
        if self.indices.device == device:
            return self
        return Keys(self.indices.to(device), self.counts.to(device))


@dataclass(frozen=True)
class Layer:
    """query [B, H, T, D]; key, value [B, G, S, D], or pages [P, page, G, D] where the batch has a block table.

    H and G count this process's heads. `state` is the pass that the layer belongs to.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    state: Pass
    ops: Backend

    @functools.cached_property
    def batch(self) -> Batch:
        return self.state.batch.on(self.query.device)

    @property
    def phase(self) -> str:
        return self.state.batch.phase

    @property
    def groups(self) -> int:
        """KV heads that this process holds."""
        return self.key.shape[1 if self.batch.pages is None else 2]

    @property
    def first_group(self) -> int:
        """The number of the first of them among the model's."""
        partition = self.batch.partition
        return 0 if partition is None else partition.rank * self.groups

    @property
    def _pages(self) -> dict[str, Tensor]:
        return {} if self.batch.pages is None else {"block_table": self.batch.pages}

    # -- dense --

    def dense(self) -> Tensor:
        """Attention over every visible key: [B, H, T, Dv]."""
        if self._pages or (self.ops.fused and not self.batch.plain):
            return self.dense_and_hint(hint=False)[0]
        self.state.read_all()
        return dense_sdpa(self.query, self.key, self.value, self.batch, self.scale)

    def dense_and_hint(self, hint: bool = True) -> tuple[Tensor, Tensor | None]:
        """Output, and what `choose` can use of it: pooled scores in decode, the log-sum-exp in prefill."""
        self.state.read_all()
        lengths = self.batch.lengths
        if not self.ops.fused and not self._pages:
            return dense_sdpa(self.query, self.key, self.value, self.batch, self.scale), None
        if self.phase == "decode":
            out, scores = self.ops.decode_dense(
                self.query[:, :, 0], self.key, self.value, lengths.kv_start, lengths.kv_len,
                scale=self.scale, scores=hint, **self._pages,
            )  # fmt: skip
            return out[:, :, None], scores
        return self.ops.prefill_dense(self.query, self.key, self.value, *lengths, scale=self.scale)

    # -- choosing --

    def choose(self, hint: Tensor | None = None, pooled: bool = False) -> Keys:
        """This layer's own Top-k (method: section 4); with `pooled` one set for all heads.

        hint: what `dense_and_hint` left, or another log-sum-exp for the scores of prefill.
        """
        return self._choose_decode(hint, pooled) if self.phase == "decode" else self._choose_prefill(hint, pooled)

    def top(self, scores: Tensor, counts: Tensor | None = None, end: Tensor | None = None) -> Tensor:
        """Slots with the highest `scores` (decode): int32 [B, G or 1, width], ascending, -1 past the count.

        scores float32 [B, G or 1, S], not negative; counts int32 [B], the batch's by default; end int32 [B]: how many
        of a row's keys to choose among, all by default.
        """
        lengths = self.batch.lengths
        counts = self.batch.counts if counts is None else counts
        rows = (x[:, None] for x in (counts, lengths.kv_start, lengths.kv_len if end is None else end))
        return self.ops.select_topk(scores, *rows, max_count=self.batch.width)

    def _choose_decode(self, scores: Tensor | None, pooled: bool) -> Keys:
        logits = None
        if scores is None:
            # The heads of other processes are added after this one's have been gathered.
            alone = pooled and self.batch.partition is None
            scores, logits = self._scores(alone)
            pooled = pooled and not alone
        return Keys(self.top(self._pool(scores, pooled)), self.batch.counts, logits=logits)

    def _scores(self, pooled: bool = False) -> tuple[Tensor, Tensor]:
        lengths = self.batch.lengths
        return self.ops.decode_score(
            self.query[:, :, 0], self.key, lengths.kv_start, lengths.kv_len,
            scale=self.scale, logits=True, **({"pooled": True} if pooled else {}), **self._pages,
        )  # fmt: skip

    def probabilities(self) -> Tensor:
        """Post-softmax attention of every query head (decode): [B, H, S], zero outside of the row's keys."""
        scores, logits = self._scores()  # logits [B, G, S', R'], in log2 units
        slots, heads = scores.shape[-1], self.query.shape[1] // self.groups
        raw = wide(logits[:, :, :slots, :heads].transpose(2, 3).flatten(1, 2))
        lengths, slot = self.batch.lengths, numbers(0, slots, 1, raw.device)
        inside = (slot >= lengths.kv_start[:, None]) & (slot < (lengths.kv_start + lengths.kv_len)[:, None])
        outside = ~inside[:, None]
        raw = raw.masked_fill(outside, -torch.inf)
        weights = torch.exp2(raw - raw.amax(-1, keepdim=True).clamp_min(torch.finfo(raw.dtype).min))
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(raw.dtype).tiny)
        return weights.masked_fill(outside, 0.0)

    def _choose_prefill(self, lse: Tensor | None, pooled: bool) -> Keys:
        batch, parts = self.batch, []
        if lse is None and self.ops.fused:
            _, lse = self.ops.prefill_dense(self.query, self.key, None, *batch.lengths, scale=self.scale)
        # At 128k tokens the scores of all tiles together would take 17 GB.
        block = max(1, _score_bytes(self.query.device) // (4 * batch.rows * self.groups * batch.slots))
        for first in range(0, batch.tiles, block):
            here = slice(first, min(first + block, batch.tiles))
            scores = self.ops.prefill_score(
                self.query, self.key, lse, *batch.lengths,
                scale=self.scale, tile=batch.tile, first=first, tiles=here.stop - first,
            )  # fmt: skip
            rows = (batch.counts[:, None, here], batch.lengths.kv_start[:, None, None], batch.before[:, None, here])
            parts.append(self.ops.select_topk(self._pool(scores, pooled), *rows, max_count=batch.width))
        return Keys(torch.cat(parts, 2) if len(parts) > 1 else parts[0], batch.counts)

    def _pool(self, scores: Tensor, pooled: bool) -> Tensor:
        """[B, G, ...] -> [B, 1, ...], over the heads of all processes."""
        if not pooled:
            return scores
        return self.gathered(scores).sum(1, keepdim=True)

    def gathered(self, per_head: Tensor) -> Tensor:
        """[B, heads, ...] of this process -> of all, in the model's order."""
        partition = self.batch.partition
        return per_head if partition is None else partition.gather(per_head, 1)

    def sparse_norm(self, keys: Keys) -> Tensor:
        """Log-sum-exp over `keys` and the query's own tile, float32 [B, H, T] (prefill)."""
        return self.ops.prefill_sparse_lse(
            self.query, self.key, keys.indices, keys.counts, self._heads(keys), *self.batch.lengths,
            scale=self.scale, tile=self.batch.tile,
        )  # fmt: skip

    # -- reading --

    def attend(self, keys: Keys) -> Tensor:
        """Attention over chosen keys (and, in prefill, the query's own tile): [B, H, T, Dv] (method: section 5)."""
        batch, where = self.batch, (keys.indices, keys.counts, self._heads(keys))
        self.state.read(keys.counts)
        if self.phase == "decode":
            out = self.ops.decode_sparse(
                self.query[:, :, 0], self.key, self.value, *where, scale=self.scale, logits=keys.logits, **self._pages
            )
            return out[:, :, None]
        return self.ops.prefill_sparse(
            self.query, self.key, self.value, *where, *batch.lengths, scale=self.scale, tile=batch.tile
        )

    def _heads(self, keys: Keys) -> Tensor:
        """Which of the sets each KV head of this process reads, int32 [G]."""
        if keys.heads is not None:
            return keys.heads
        sets, device = keys.indices.shape[1], self.query.device
        if sets == 1:
            return numbers(0, self.groups, 0, device)
        return numbers(0 if sets == self.groups else self.first_group, self.groups, 1, device)


@functools.cache
def numbers(first: int, count: int, step: int, device: torch.device) -> Tensor:
    """first, first + step, ...: int32 [count].

    Made once per device and never dropped: no step makes it anew, and a CUDA graph may still read it.
    """
    with torch.inference_mode(False):  # else later steps outside of it could not use it everywhere
        return torch.arange(count, dtype=torch.int32, device=device) * step + first


@functools.cache
def _score_bytes(device: torch.device) -> int:
    """Room for the scores of one block of tiles.

    Larger blocks leave fewer SMs idle at their ends (3 % of an anchor at 128k between 0.5 and 4 GiB on an H200).
    """
    if device.type != "cuda":
        return _GIB // 16
    return min(4 * _GIB, torch.cuda.get_device_properties(device).total_memory // 16)
