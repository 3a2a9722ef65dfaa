"""Quest (arXiv 2406.10774): bounds per page of keys tell which pages a query may care for."""

import torch
from torch import Tensor

from kascade_cli.kernels.reference import blame, gather_pages, wide
from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.strategy import Option, Strategy, whole_number


class Quest(Strategy):
    """Decode only; the first `dense_layers` layers are dense (method: section 8).

    For every page of `page` consecutive keys and every channel the smallest and the largest key are known; the sum
    over channels of max(q * min, q * max) bounds the logit of any key in the page. Pages with the highest bounds are
    read whole, as many as the budget has room for (rounded up to a page), and always the newest one. With grouped
    heads the bounds are pooled as Kascade pools scores: after a softmax over the pages, summed over the group.
    """

    name, rank = "quest", 21
    summary = "every layer reads the pages of keys whose bounds promise most; decode only"
    options = {
        "page": Option(whole_number(1), 16, "keys of a page"),
        "dense_layers": Option(whole_number(0), 2, "first layers that stay dense"),
    }

    def attend(self, layer: Layer) -> Tensor:
        if layer.phase == "prefill" or layer.index in self.layers[: self.dense_layers]:
            return layer.dense()
        return layer.attend(self.choose(layer))

    def role(self, layer: int) -> str:
        return "dense" if layer in self.layers[: self.dense_layers] else "pages"

    def choose(self, layer: Layer) -> Keys:
        """Whole pages within the budget, and the newest page behind them, which may be partial."""
        batch, page = layer.batch, self.page
        kv_start, kv_len = batch.lengths.kv_start, batch.lengths.kv_len
        whole = (kv_len - 1).clamp_min(0) // page  # [B] pages before the newest
        newest = kv_len - whole * page
        pages = torch.minimum(((batch.counts - newest).clamp_min(0) + page - 1) // page, whole)
        promise = self.promise(layer, whole)
        most = -(-batch.width // page)
        zero = torch.zeros_like(pages, dtype=torch.int32)
        chosen = layer.ops.select_topk(
            promise, pages.int()[:, None], zero[:, None], whole.int()[:, None], max_count=most
        )
        slots = (chosen[..., None] * page + torch.arange(page, device=chosen.device)).flatten(2)  # [B, G, most * page]
        order = torch.arange((most + 1) * page, device=chosen.device)
        behind = (whole * page - pages * page)[:, None] + order
        slots = torch.where(
            (order < pages[:, None] * page)[:, None], torch.nn.functional.pad(slots, (0, page)), behind[:, None]
        )
        counts = layer.state.notes.setdefault(("quest", batch.device), (pages * page + newest).int())
        slots = torch.where((order < counts[:, None])[:, None], slots + kv_start[:, None, None], -1)
        return Keys(slots.int().contiguous(), counts)

    def promise(self, layer: Layer, whole: Tensor) -> Tensor:
        """Share of the bounds that each page has, summed over the group: [B, G, pages]; 0 from `whole` on.

        NaN only for pages that hold a key at fault, so that they are read (kernels.reference).
        """
        low, high = self.bounds(layer)
        query = wide(layer.query[:, :, 0]).unflatten(1, (layer.groups, -1))  # [B, G, R, D]
        bound = query.clamp_min(0) @ high.mT + query.clamp_max(0) @ low.mT  # [B, G, R, pages]
        seen = (torch.arange(bound.shape[-1], device=bound.device) < whole[:, None])[:, None, None]
        bound = (bound * layer.scale).masked_fill(~seen, -torch.inf)
        return blame(bound.softmax(-1), bound).masked_fill(~seen, 0.0).sum(2)

    def bounds(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Per page and channel the smallest and largest key, [B, G, pages, D].

        Pages begin at the row's first token; the last one may hold keys beyond the row's end and is never ranked.
        """
        batch, page = layer.batch, self.page
        key = layer.key if batch.pages is None else gather_pages(layer.key, batch.pages)
        token = torch.arange(-(-key.shape[2] // page) * page, device=key.device)
        slot = (batch.lengths.kv_start[:, None] + token).clamp_max(key.shape[2] - 1).long()
        rows = key.gather(2, slot[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1]))
        rows = wide(rows.unflatten(2, (-1, page)))
        return rows.amin(3), rows.amax(3)
