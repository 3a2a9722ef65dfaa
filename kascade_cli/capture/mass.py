"""Pooled attention mass of sampled queries, without ever holding all queries times all keys."""

from collections.abc import Callable

import torch

# Bytes of float32 attention that may exist at once: small enough for a CPU's cache, large enough to fill a
# GPU.
SCRATCH_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
KEPT_BITS = 7


def pooled_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    starts: torch.Tensor,
    length: int,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    scratch: int | None = None,
    on_rows: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Mean post-softmax attention of query tiles: f32 [t, G, S].

    query [H, T, D] and key [G, S, D] of one sequence, whose last T keys belong to the queries. `starts` int64
    [t] (CPU, ascending): absolute position of each tile's first query; every tile has `length` queries. Causal; `mask`
    [T, S] (True or 0: attend) narrows it further. Logits and sums are float32 whatever the input. With length
    1, `on_rows` gets P f32 [b, H, n] and positions int64 [b] (CPU) of a few rows at a time. Memory: `scratch`
    bytes plus a float32 copy of the keys plus the result (linear in S).
    """
    heads, _, _ = query.shape
    groups, slots, _ = key.shape
    offset = slots - query.shape[1]
    per_group = heads // groups
    scratch = scratch or SCRATCH_BYTES.get(query.device.type, SCRATCH_BYTES["cuda"])
    result = torch.zeros(len(starts), groups, slots, dtype=torch.float32, device=query.device)
    keys = key.float().transpose(1, 2)
    first = 0
    while first < len(starts):
        # As many tiles at once as fit, with all their groups; if not even one fits, some groups at a time.
        count = 1
        while first + count < len(starts) and scratch >= (count + 1) * heads * length * 4 * (
            int(starts[first + count]) + length
        ):
            count += 1
        batch = starts[first : first + count]
        end = int(batch[-1]) + length
        step = groups if count > 1 or on_rows else max(1, scratch // (per_group * length * end * 4))
        positions = (batch[:, None] + torch.arange(length)).to(query.device)
        rows = query[:, (positions - offset).reshape(-1)].float() * scale
        # [G, t, R * length, D]: the queries that are pooled together lie together.
        rows = rows.view(groups, per_group, count, length, -1).transpose(1, 2).flatten(2, 3)
        hidden = _hidden(positions, int(batch[0]), end)
        extra = None if mask is None else mask[(positions - offset).reshape(-1), :end].view(count, length, end)
        for group in range(0, groups, step):
            chosen = slice(group, group + step)
            weights = torch.bmm(rows[chosen].flatten(1, 2), keys[chosen, :, :end])
            weights = weights.view(-1, count, per_group, length, end)
            if extra is not None:
                _apply(weights, extra)
            weights[..., int(batch[0]) :].masked_fill_(hidden, -torch.inf)
            weights.sub_(weights.amax(-1, keepdim=True)).exp_()
            inverse = weights.sum(-1).reciprocal_()
            if on_rows is not None:
                probabilities = weights * inverse[..., None]
                on_rows(probabilities[..., 0, :].transpose(0, 1).flatten(1, 2), batch)
            flat = weights.flatten(0, 1).flatten(1, 2)  # [groups * t, R * length, end]
            pooled = torch.bmm(inverse.view(len(flat), 1, -1), flat).div_(per_group * length)
            result[first : first + count, chosen, :end] = pooled.view(-1, count, end).transpose(0, 1)
        first += count
    return result


def _hidden(positions: torch.Tensor, low: int, end: int) -> torch.Tensor:
    """True where a query [t, 1, length, end - low] must not see a key of slots [low, end)."""
    slots = torch.arange(low, end, device=positions.device)
    return (slots > positions[..., None])[:, None]


def _apply(weights: torch.Tensor, mask: torch.Tensor) -> None:
    if mask.dtype == torch.bool:
        weights.masked_fill_(~mask[:, None], -torch.inf)
    else:
        weights.add_(mask[:, None].float())


def top_mass(probabilities: torch.Tensor, positions: torch.Tensor, keys: list[str]) -> torch.Tensor:
    """Mass of the largest keys of single queries: f32 [b, H, K] from P f32 [b, H, n] at positions int64 [b]
    (CPU).

    `keys` are counts (`64`) or shares of the visible keys (`5%`, rounded up).
    """
    visible = positions + 1
    counts = torch.stack([_key_count(text, visible) for text in keys], dim=-1)
    largest = probabilities.topk(int(counts.max()), dim=-1).values.cumsum(-1)
    index = (counts - 1)[:, None, :].expand(-1, probabilities.shape[1], -1).to(largest.device)
    return largest.gather(-1, index)


def _key_count(text: str, visible: torch.Tensor) -> torch.Tensor:
    if text.endswith("%"):
        share = float(text[:-1])
        return torch.ceil(visible * share / 100 - 1e-6).long().clamp(min=1)
    return visible.clamp(max=int(text))


def round_mass(mass: torch.Tensor) -> torch.Tensor:
    """float32 >= 0 to float16 with `KEPT_BITS` bits of mantissa, so that it compresses: error <= 0.45 % of a
    value.

    Values below 6.1e-5 (subnormal in float16) keep their absolute precision of 6e-8.
    """
    bits = mass.half().view(torch.int16)
    drop = 10 - KEPT_BITS
    # Half way goes to even: always up would add .04 % to every sum.
    rounded = (bits + (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)) & -(1 << drop)
    return torch.where(bits >= 0x0400, rounded, bits).view(torch.float16)
