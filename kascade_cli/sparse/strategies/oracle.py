"""What exact Top-k can do at a budget, without reuse: the upper bounds of the paper's figure 2."""

from typing import Any

import torch
from torch import Tensor

from kascade_cli.kernels.reference import first_tile, select_topk, wide
from kascade_cli.sparse.batch import Batch
from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.strategy import Option, Strategy

_BLOCK_ELEMENTS = 1 << 22  # of the logits that exist at once
POOLS = ("probabilities", "logits")


def _pool(value: Any) -> str:
    if value not in POOLS:
        raise ValueError(f"must be {' or '.join(POOLS)}")
    return value


class Oracle(Strategy):
    """Every layer chooses for itself as an anchor does, pooled over the tile and the KV head's group.

    `pool=logits` sums before the softmax instead of after it, in plain PyTorch: the ablation of the paper's figure 5.
    """

    name, rank = "oracle", 10
    summary = "every layer chooses its own keys, pooled over tile and KV group as an anchor's; the first is dense"
    options = {"pool": Option(_pool, POOLS[0], "what is summed over tile and group: `probabilities` or `logits`")}

    def attend(self, layer: Layer) -> Tensor:
        if layer.index == self.layers[0]:
            return layer.dense()
        return layer.attend(layer.choose() if self.pool == POOLS[0] else _choose_by_logits(layer))

    def role(self, layer: int) -> str:
        return "dense" if layer == self.layers[0] else "anchor"


class OraclePerQuery(Strategy):
    """Every query and query head reads its own exact Top-k of the keys that it sees, itself included (figure 2).

    k(N) keys of N visible ones, no tile on top. Written for exactness: it computes every logit, on PyTorch.
    """

    name, rank = "oracle-per-query", 11
    summary = "every query and head reads its own exact Top-k, unpooled; the first layer is dense"

    def attend(self, layer: Layer) -> Tensor:
        if layer.index == self.layers[0]:
            return layer.dense()
        key, value = _contiguous(layer, layer.key), _contiguous(layer, layer.value)
        layer.state.read_total(self._read(layer))
        query = layer.query.unflatten(1, (key.shape[1], -1))  # [B, G, R, T, D]
        step = max(1, _BLOCK_ELEMENTS // (layer.query.shape[1] * key.shape[2] * layer.batch.rows))
        outs = [
            _block(layer, query[:, :, :, begin : begin + step], key, value, begin)
            for begin in range(0, query.shape[3], step)
        ]
        return torch.cat(outs, 3).flatten(1, 2)

    def _read(self, layer: Layer) -> Tensor:
        batch = layer.batch
        if batch.phase == "decode":
            return batch.counts.sum().double()
        position, real = batch.positions
        return (batch.count((position + 1).clamp_min(0)) * real).sum().double()

    def role(self, layer: int) -> str:
        return "dense" if layer == self.layers[0] else "own keys"


def _choose_by_logits(layer: Layer) -> Keys:
    """Keys with the highest sum of logits over the tile's queries and the group's heads.

    The sum is that of one query, the sum of them all: every key before a tile is seen by all of its queries.
    """
    batch, key = layer.batch, wide(_contiguous(layer, layer.key))
    kv_start, kv_len, counts = batch.lengths.kv_start, batch.lengths.kv_len, batch.counts
    query = wide(layer.query).unflatten(1, (key.shape[1], -1)).sum(2)  # [B, G, T, D]; the scale changes no order
    if batch.phase == "decode":
        rows = (value[:, None] for value in (counts, kv_start, kv_len))
        scores = (query @ key.transpose(-1, -2))[:, :, 0]
        return Keys(select_topk(scores, *rows, max_count=batch.width), counts)
    tiles, parts = _sum_tiles(query, batch), []
    step = max(1, _BLOCK_ELEMENTS // (batch.rows * key.shape[1] * key.shape[2]))
    for begin in range(0, batch.tiles, step):
        here = slice(begin, begin + step)
        scores = tiles[:, :, here] @ key.transpose(-1, -2)  # [B, G, tiles, S]
        rows = (counts[:, None, here], kv_start[:, None, None], batch.before[:, None, here])
        parts.append(select_topk(scores, *rows, max_count=batch.width))
    return Keys(torch.cat(parts, 2), counts)


def _sum_tiles(query: Tensor, batch: Batch) -> Tensor:
    """[B, G, T, D] -> [B, G, NT, D], summed over the real queries of each local tile."""
    position, real = batch.positions
    query_start, kv_start, _ = batch.lengths
    local = position // batch.tile - first_tile(query_start, kv_start, batch.tile)[:, None]
    local = torch.where(real, local, 0).long()[:, None, :, None].expand_as(query)
    out = query.new_zeros(*query.shape[:2], batch.tiles, query.shape[3])
    return out.scatter_add_(2, local, query.masked_fill(~real[:, None, :, None], 0.0))


def _contiguous(layer: Layer, cache: Tensor) -> Tensor:
    from kascade_cli.kernels.reference import gather_pages

    return cache if layer.batch.pages is None else gather_pages(cache, layer.batch.pages)


def _block(layer: Layer, query: Tensor, key: Tensor, value: Tensor, begin: int) -> Tensor:
    """query [B, G, R, t, D] -> [B, G, R, t, Dv]: queries `begin` to `begin + t` of the batch."""
    batch, wide = layer.batch, torch.float64 if query.dtype == torch.float64 else torch.float32
    slot = torch.arange(key.shape[2], device=key.device)
    kv_start, kv_len = batch.lengths.kv_start[:, None, None], batch.lengths.kv_len[:, None, None]
    inside = (slot >= kv_start) & (slot < kv_start + kv_len)  # [B, 1, S]
    position, real = (tensor[:, begin : begin + query.shape[3]] for tensor in batch.positions)
    seen = inside & (slot - kv_start <= position[..., None]) & real[..., None]  # [B, t, S]
    seen = seen[:, None, None]
    logits = query.to(wide) @ key.to(wide)[:, :, None].transpose(-1, -2) * layer.scale
    logits = logits.masked_fill(~seen, -torch.inf)
    wanted = batch.count((position + 1).clamp_min(0))[:, None, None]  # [B, 1, 1, t]
    order = logits.argsort(dim=-1, descending=True, stable=True)  # ties to the lowest slot
    rank = torch.empty_like(order).scatter_(-1, order, slot.expand_as(order).contiguous())
    taken = (rank < wanted[..., None]) & seen
    weights = torch.softmax(logits.masked_fill(~taken, -torch.inf), -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    values = value.masked_fill(~inside[:, None].transpose(-1, -2), 0.0).to(wide)[:, :, None]
    return (weights @ values).to(query.dtype)
