"""Which keys score highest."""

import torch
from torch import Tensor

from kascade_cli.kernels.reference.common import may_hold_nan


def select_topk(scores: Tensor, count: Tensor, start: Tensor, length: Tensor, *, max_count: int) -> Tensor:
    """The `count` highest-scoring slots among [start, start + length), NaN before all, ties to the lowest slot.

    scores [..., S], of any sign (`tilelang`: not negative); count, start, length int32, broadcastable to [...]. count
    is clamped to length. Slots that are not the row's may hold anything.
    Returns int32 [..., max_count], ascending; entries past the row's count are -1.
    """
    shape, width = scores.shape[:-1], scores.shape[-1]
    if not min(width, max_count):
        return torch.full((*shape, max_count), -1, dtype=torch.int32, device=scores.device)
    rows = scores.reshape(-1, width)
    start, length, count = (
        value.expand(shape).reshape(-1, 1) if value.dim() else value.expand(len(rows), 1)
        for value in (start, length, count)
    )
    slot = torch.arange(width, device=scores.device)
    inside = (slot >= start) & (slot < start + length)
    wanted = torch.minimum(count, inside.sum(-1, keepdim=True)).clamp_max(max_count)
    values = rows.masked_fill(~inside, float("-inf"))
    if values.is_cuda:  # its sort puts NaN of negative sign last, for rows of more than 1024
        values = values.masked_fill(values.isnan(), float("nan"))
    top = torch.topk(values, min(max_count, width), dim=-1).values  # NaN first
    threshold = top.gather(-1, (wanted - 1).clamp_min(0).long())
    above, equal = values > threshold, values == threshold
    if may_hold_nan(top[..., :1]):
        broken, cut = values.isnan(), threshold.isnan()
        above, equal = above | (broken & ~cut), equal | (broken & cut)
    equal = equal & inside
    taken = above | (equal & (equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True)))
    taken &= wanted > 0
    out = torch.full((len(rows), max_count), -1, dtype=torch.int32, device=scores.device)
    # Rows in order, slots ascending, as many of each row as it wants.
    out.masked_scatter_(torch.arange(max_count, device=out.device) < wanted, taken.nonzero()[:, 1].int())
    return out.reshape(*shape, max_count)
