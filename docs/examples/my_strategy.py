"""A strategy outside of the package: keys at even distances. docs/strategies.md explains it line by line."""

import torch

from kascade_cli.sparse import Keys, Option, Strategy
from kascade_cli.sparse.strategy import whole_number


class Comb(Strategy):
    """As many keys as the budget has, spread evenly over the text: what a choice that knows nothing of it is worth."""

    name, summary = "comb", "keys at even distances over the whole text; the first layers are dense"
    options = {"dense_layers": Option(whole_number(0), 1, "first layers that stay dense")}

    def attend(self, layer):
        if layer.index in self.layers[: self.dense_layers]:
            return layer.dense()
        batch = layer.batch
        visible = batch.lengths.kv_len if layer.phase == "decode" else batch.before  # [B] or [B, tiles]
        order = torch.arange(1, batch.width + 1, device=visible.device)
        counts, visible = batch.counts[..., None], visible[..., None]  # k(N) and N
        token = torch.ceil(order.double() * visible / counts.clamp_min(1)).long() - 1  # the k-th is the newest
        first = batch.lengths.kv_start.reshape(-1, *[1] * (token.dim() - 1))  # a left-padded row begins later
        slots = torch.where(order <= counts, token + first, -1)
        return layer.attend(Keys(slots.unsqueeze(1).int(), batch.counts))  # one set for all heads
