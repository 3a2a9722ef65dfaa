"""What exact Top-k can do at a budget, without reuse: the upper bounds of the paper's figure 2."""

import torch
from torch import Tensor

from kascade_cli.sparse.layer import Layer
from kascade_cli.sparse.strategy import Strategy

_BLOCK_ELEMENTS = 1 << 22  # of the logits that exist at once


class Oracle(Strategy):
    """Every layer chooses for itself as an anchor does, pooled over the tile and the KV head's group."""

    name, rank = "oracle", 10
    summary = "every layer chooses its own keys, pooled over tile and KV group as an anchor's; the first is dense"

    def attend(self, layer: Layer) -> Tensor:
        return layer.dense() if layer.index == self.layers[0] else layer.attend(layer.choose())

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
