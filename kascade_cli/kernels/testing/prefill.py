"""Numerics of the prefill kernels on a GPU, by FlashAttention's rule: rows for a table, for tests and benchmarks.

The rule: the largest error against a float64 reference is at most twice that of the same computation in plain PyTorch
in the inputs' own precision. Also: every element is written (outputs start as NaN), and the same input gives the same
bits twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kascade_cli.kernels import reference
from kascade_cli.kernels.reference.common import causal
from kascade_cli.kernels.testing.poison import poisoned

FLOOR = {torch.bfloat16: 1e-5, torch.float16: 1e-5}  # errors below this are float32 noise, whatever plain PyTorch has

NAMES = ("prefill_dense", "log-sum-exp", "lse only", "prefill_score", "prefill_sparse", "prefill_sparse_lse")


@dataclass(frozen=True)
class PrefillCase:
    """One call of every op. starts, begins, lengths: query_start, kv_start, kv_len of each row."""

    dtype: torch.dtype
    group: int
    head_dim: int
    queries: int
    slots: int
    starts: tuple[int, ...]
    begins: tuple[int, ...]
    lengths: tuple[int, ...]
    kv_heads: int = 2
    tile: int = 32
    ratio: float = 0.1
    floor: int = 64

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        heads = f"H{self.group * self.kv_heads}-G{self.kv_heads}-D{self.head_dim}"
        tile = "" if self.tile == 32 else f"-tile{self.tile}"
        return f"{name}-B{len(self.starts)}-{heads}-T{self.queries}-S{self.slots}{tile}"


@dataclass
class Inputs:
    """Random tensors of a case; `args` are query_start, kv_start and kv_len."""

    q: Tensor
    k: Tensor
    v: Tensor
    args: tuple[Tensor, Tensor, Tensor]
    head_map: Tensor
    scale: float


def single(dtype: torch.dtype, group: int, head_dim: int, length: int, **kwargs: Any) -> PrefillCase:
    """A whole prompt of `length` tokens, alone."""
    return PrefillCase(dtype, group, head_dim, length, length, (0,), (0,), (length,), **kwargs)


def late(dtype: torch.dtype, group: int, head_dim: int, length: int, queries: int, **kwargs: Any) -> PrefillCase:
    """The last `queries` tokens of a prompt of `length`: a chunk."""
    return PrefillCase(dtype, group, head_dim, queries, length, (length - queries,), (0,), (length,), **kwargs)


def ragged(dtype: torch.dtype, group: int, head_dim: int, queries: int, **kwargs: Any) -> PrefillCase:
    """Four rows: left-padded, right-padded, a chunk that begins inside a tile, and one that is padding altogether."""
    slots = queries + 150
    return PrefillCase(
        dtype,
        group,
        head_dim,
        queries,
        slots,
        (0, 0, 101, 20),
        (45, 0, 7, queries + 60),
        (queries - 45, max(queries - 33, 1), queries + 94, 1),
        **kwargs,
    )


def make_inputs(case: PrefillCase, seed: int, device: str = "cuda") -> Inputs:
    """Normal q (memory [B, T, H, D]), k, v; some keys are scaled up so that attention is not flat. Slots that are no
    row's hold NaN."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads = len(case.starts), case.group * case.kv_heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    q = draw(batch, case.queries, heads, case.head_dim).to(case.dtype).transpose(1, 2)
    k = draw(batch, case.kv_heads, case.slots, case.head_dim)
    k = (k * (1 + 2 * (draw(batch, case.kv_heads, case.slots, 1) > 1.5))).to(case.dtype)
    v = draw(batch, case.kv_heads, case.slots, case.head_dim).to(case.dtype)
    slot, begins, lengths = torch.arange(case.slots, device=device), *map(torch.tensor, (case.begins, case.lengths))
    begins, lengths = begins.to(device)[:, None], lengths.to(device)[:, None]
    outside = ((slot < begins) | (slot >= begins + lengths))[:, None, :, None]
    k, v = k.masked_fill(outside, float("nan")), v.masked_fill(outside, float("nan"))
    args = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (case.starts, case.begins, case.lengths))
    head_map = torch.randint(case.kv_heads, (case.kv_heads,), generator=generator, device=device).int()
    return Inputs(q, k, v, args, head_map, case.head_dim**-0.5)


def make_selection(case: PrefillCase, inputs: Inputs, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(indices, counts) of the top keys of `scores` [B, G, NT, S]; every seventh tile selects nothing."""
    start, begin, _ = inputs.args
    tiles = scores.shape[2]
    before = (
        reference.first_tile(start, begin, case.tile)[:, None] + torch.arange(tiles, device=start.device)
    ) * case.tile
    before = torch.minimum(before, (case.slots - begin).clamp_min(0)[:, None])
    counts = torch.minimum(before, (before * case.ratio).int().clamp_min(case.floor)).int()
    counts[:, 6::7] = 0
    shape = (-1, case.kv_heads, -1)
    indices = reference.select_topk(
        scores,
        counts[:, None].expand(*shape),
        begin[:, None, None].expand(-1, case.kv_heads, tiles),
        before[:, None].expand(*shape),
        max_count=max(int(counts.max()), 1),
    )
    return indices, counts


def plain(case: PrefillCase, inputs: Inputs, indices: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Every op in the inputs' own precision with nothing but matmul, softmax and sum, over the whole [T, S] matrix."""
    start, begin, length = inputs.args
    slot = start[:, None] + torch.arange(case.queries, device=start.device)
    seen = causal(slot, begin, length, case.slots)[:, None]  # [B, 1, T, S]
    token = slot - begin[:, None]
    local = torch.div(token, case.tile, rounding_mode="floor") - reference.first_tile(start, begin, case.tile)[:, None]
    local = local.clamp(0, counts.shape[1] - 1)
    edge = begin[:, None] + torch.div(token, case.tile, rounding_mode="floor") * case.tile
    key = torch.arange(case.slots, device=start.device)
    diagonal = key >= edge[..., None]  # [B, T, S]
    logits = (inputs.q @ inputs.k.repeat_interleave(case.group, 1).transpose(-1, -2)) * inputs.scale
    values = inputs.v.nan_to_num(0.0).repeat_interleave(case.group, 1)
    masked = logits.masked_fill(~seen, float("-inf"))
    probability = masked.softmax(-1).nan_to_num(0.0)
    pooled = torch.zeros(len(start), case.kv_heads, *counts.shape[1:], case.slots, device=start.device)
    mass = (probability * ~diagonal[:, None]).unflatten(1, (case.kv_heads, case.group)).sum(2).float()
    pooled.scatter_add_(2, local.long()[:, None, :, None].expand_as(mass), mass)
    used = torch.arange(indices.shape[-1], device=start.device) < counts[:, None, :, None]
    chosen = torch.zeros(*indices.shape[:3], case.slots + 1, dtype=torch.bool, device=start.device)
    chosen.scatter_(3, torch.where(used & (indices >= 0), indices, case.slots).long(), True)
    chosen = chosen[:, inputs.head_map.long(), :, : case.slots].repeat_interleave(case.group, 1)
    chosen = chosen.gather(2, local.long()[:, None, :, None].expand(-1, chosen.shape[1], -1, case.slots))
    sparse = logits.masked_fill(~(seen & (chosen | diagonal[:, None])), float("-inf"))
    return {
        "prefill_dense": probability @ values,
        "log-sum-exp": torch.logsumexp(masked.float(), -1),
        "lse only": torch.logsumexp(masked.float(), -1),
        "prefill_score": pooled,
        "prefill_sparse": sparse.softmax(-1).nan_to_num(0.0) @ values,
        "prefill_sparse_lse": torch.logsumexp(sparse.float(), -1),
    }


def run_ops(ops: Any, case: PrefillCase, inputs: Inputs, indices: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """The prefill ops of `ops` (a backend, or the reference module) on these inputs."""
    q, k, v, args, scale = inputs.q, inputs.k, inputs.v, inputs.args, inputs.scale
    out, lse = ops.prefill_dense(q, k, v, *args, scale=scale)
    lse_only = ops.prefill_dense(q, k, None, *args, scale=scale)[1]
    score = ops.prefill_score(q, k, lse_only.float(), *args, scale=scale, tile=case.tile)
    selection = (indices, counts, inputs.head_map, *args)
    sparse = ops.prefill_sparse(q, k, v, *selection, scale=scale, tile=case.tile)
    sparse_lse = ops.prefill_sparse_lse(q, k, *selection, scale=scale, tile=case.tile)
    return {
        "prefill_dense": out,
        "log-sum-exp": lse,
        "lse only": lse_only,
        "prefill_score": score,
        "prefill_sparse": sparse,
        "prefill_sparse_lse": sparse_lse,
    }


def exact(case: PrefillCase, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(float64 results of the reference, indices, counts); the selection comes from the float64 scores."""
    wide = Inputs(inputs.q.double(), inputs.k.double(), inputs.v.double(), inputs.args, inputs.head_map, inputs.scale)
    scores = reference.prefill_score(wide.q, wide.k, None, *wide.args, scale=wide.scale, tile=case.tile)
    indices, counts = make_selection(case, inputs, scores)
    truth = run_ops(reference, case, wide, indices, counts)
    truth["prefill_score"] = scores
    return truth, indices, counts


def check(ops: Any, case: PrefillCase, seed: int = 0, device: str = "cuda") -> list[dict[str, Any]]:
    """One row per op: case, error, plain PyTorch's error, whether all was written, same bits twice, within rule."""
    inputs = make_inputs(case, seed, device)
    truth, indices, counts = exact(case, inputs)
    with poisoned():
        got = run_ops(ops, case, inputs, indices, counts)
        again = run_ops(ops, case, inputs, indices, counts)
    low = plain(case, inputs, indices, counts)
    rows = []
    for op, want in truth.items():
        error, plain_error = _distance(got[op], want), _distance(low[op], want)
        written = not bool(got[op].isnan().any())
        same = torch.equal(got[op], again[op])
        bound = max(2 * plain_error, FLOOR[case.dtype] * max(1.0, float(want.nan_to_num(neginf=0.0).abs().max())))
        rows.append(
            {
                "op": op,
                "case": str(case),
                "error": error,
                "plain": plain_error,
                "written": written,
                "same_bits": same,
                "ok": written and same and error <= bound,
            }
        )
    return rows


def _distance(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference; infinite where one is -inf and the other is not."""
    got = got.to(want.dtype)
    both = (got == float("-inf")) & (want == float("-inf"))
    gap = (got - want).abs().masked_fill(both, 0.0)
    return float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0


def stress(
    ops: Any, case: PrefillCase, seeds: int, repeats: int = 3, report: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Races: `seeds` inputs, each run `repeats` times: how often bits changed, and the distance to plain PyTorch."""
    changed = dict.fromkeys(NAMES, 0)
    worst = dict.fromkeys(changed, 0.0)
    for seed in range(seeds):
        inputs = make_inputs(case, seed)
        scores = ops.prefill_score(inputs.q, inputs.k, None, *inputs.args, scale=inputs.scale, tile=case.tile)
        indices, counts = make_selection(case, inputs, scores)
        runs = [run_ops(ops, case, inputs, indices, counts) for _ in range(repeats)]
        low = plain(case, inputs, indices, counts)
        for op in changed:
            changed[op] += sum(not torch.equal(runs[0][op], run[op]) for run in runs[1:])
            worst[op] = max(worst[op], _distance(runs[0][op].float(), low[op].float()))
        if report:
            report(seed)
    return {"case": str(case), "seeds": seeds, "changed": changed, "worst_against_plain": worst}
