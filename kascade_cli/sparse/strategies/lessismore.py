"""LessIsMore (arXiv 2508.07101): one key set for all heads, ranked across heads, with a window of recent keys."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kascade_cli.sparse.layer import Keys, Layer
from kascade_cli.sparse.strategies.omnikv import SharedSelection
from kascade_cli.sparse.strategy import Option, layer_list


def _share(value: object) -> float:
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError("is not a number") from None
    if not 0 <= share <= 1:
        raise ValueError("is outside [0, 1]")
    return share


class LessIsMore(SharedSelection):
    """A share of the budget (25 %, rounded up) goes to the most recent keys; the rest to the union of every query
    head's own Top-k, filled rank by rank: the best key of every head, then the second best, until it is full
    (method: section 8). Published layers: 2 and 13 of 32 (Llama-3.1-8B); for Qwen3-8B 2 and 12 of 36.
    """

    name, rank = "lessismore", 23
    summary = "two layers choose keys for those after them: every head's best, and recent ones; decode only"
    published = ((2, 13), 32)
    options = {
        "selection_layers": Option(layer_list, None, "layers that choose, such as 2+13"),
        "recent": Option(_share, 0.25, "share of the budget for the most recent keys"),
    }

    @property
    def chosen_layers(self) -> Sequence[int] | None:
        return self.selection_layers

    def choose(self, layer: Layer) -> Keys:
        batch, probability = layer.batch, layer.gathered(layer.probabilities())  # [B, H, S]
        lengths, counts = batch.lengths, batch.counts
        recent = torch.ceil(counts.double() * self.recent - 1e-6).int()
        slot = torch.arange(probability.shape[-1], device=probability.device)
        late = slot >= (lengths.kv_start + lengths.kv_len - recent)[:, None]
        # Recent keys are in already, so heads do not spend their ranks on them.
        score = (probability.shape[-1] - self.best_rank(probability.masked_fill(late[:, None], -1.0))).float()
        score = torch.where(late, 2.0 * probability.shape[-1], score)
        return Keys(layer.top(score[:, None].contiguous()), counts)

    def best_rank(self, probability: Tensor) -> Tensor:
        """The best place that a key has in any head's order, int64 [B, S]; equal ones stand in order of their slot."""
        order = probability.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous()
        return torch.empty_like(order).scatter_(-1, order, place).amin(1)
