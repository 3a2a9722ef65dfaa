"""Rows that hold NaN or inf: a key or a query of one KV head, in every op and from scores to choice to output.

NaN must be where the reference has it and nowhere else, what is finite near the reference's, and every other row and
KV head as without the fault, bit for bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kascade_cli.kernels import reference
from kascade_cli.kernels.testing import decode, prefill, ragged
from kascade_cli.kernels.testing.poison import poisoned

ROW, HEAD, DIM = 1, 1, 3  # where the fault is: row of the batch, KV head, element of the key or query
NEAR = 0.05  # numerics have their own checks
Row = dict[str, Any]

DECODE_CASES = (
    decode.DecodeCase((333, 700, 0), 1100, heads=8, kv_heads=2, starts=(0, 101, 50)),
    decode.DecodeCase((900, 2500, 31), 2560, heads=8, kv_heads=2, dim=64, dtype=torch.float16),
    decode.DecodeCase((129, 1000, 64), 1024, heads=8, kv_heads=2, page=64, starts=(3, 20, 0)),
    decode.DecodeCase((9000, 8000, 0), 9216, heads=8, kv_heads=2, page=16),
)
PREFILL_CASES = (
    prefill.PrefillCase(torch.bfloat16, 4, 128, 300, 450, (0, 101, 20), (45, 7, 360), (255, 394, 1)),
    prefill.PrefillCase(torch.bfloat16, 16, 64, 200, 260, (0, 0), (0, 33), (180, 167)),
)
# Neighbours within a block of queries and within a tile; the last has padding behind it.
RAGGED_CASES = (ragged.RaggedCase(torch.bfloat16, 4, 128, 32, ((40, 300), (1, 33), (200, 200), (70, 900)), padding=3),)


def check_decode(ops: Any, device: torch.device, cases: tuple[decode.DecodeCase, ...] = DECODE_CASES) -> list[Row]:
    """Every decode op with a fault at the first, a middle and the last key, and in the query."""
    rows = []
    for number, case in enumerate(cases):
        healthy = decode.make_inputs(case, device, 300 + number, decode._dead(ops))
        healthy["map"] = torch.arange(case.kv_heads, dtype=torch.int32, device=device)
        length, begin = case.lengths[ROW], case.starts[ROW] if case.starts else 0
        for name, given in _faults(healthy, (begin, begin + length // 2, begin + length - 1), None, case.heads):
            rows += _judge(f"{case} {name}", lambda at: _decode(ops, at), _decode_truth, healthy, given)
    return rows


def check_prefill(ops: Any, device: torch.device, cases: tuple[prefill.PrefillCase, ...] = PREFILL_CASES) -> list[Row]:
    """Every prefill op likewise; the row is a chunk, or padded."""
    rows = []
    for number, case in enumerate(cases):
        made = prefill.make_inputs(case, 300 + number, str(device))
        healthy = {"q": made.q, "k": made.k, "v": made.v, "args": made.args, "scale": made.scale, "case": case}
        begin, length = case.begins[ROW], case.lengths[ROW]
        query = begin + length // 2 - case.starts[ROW]
        slots = (begin, begin + length // 3, begin + length - 1)
        for name, given in _faults(healthy, slots, query, case.group * case.kv_heads):
            rows += _judge(f"{case} {name}", lambda at: _prefill(ops, at), _prefill_truth, healthy, given)
    return rows


def check_ragged(ops: Any, device: torch.device, cases: tuple[ragged.RaggedCase, ...] = RAGGED_CASES) -> list[Row]:
    """Rows of nothing but NaN, one after the other: the others', bit for bit, are as without."""
    rows = []
    for number, case in enumerate(cases):
        made = ragged.make_inputs(case, 300 + number, str(device))
        picked = {row: prefill.exact(case.alone(row), alone)[1:] for row, alone in made.alone.items()}
        chosen = ragged.pack(case, made, picked)
        healthy = ragged.rows_of(case, made, ragged.run_ops(ops, case, made, *chosen))
        for bad in made.alone:
            given = ragged.without(case, made, bad)
            try:
                with poisoned():
                    found = ragged.rows_of(case, given, ragged.run_ops(ops, case, given, *chosen))
            except Exception as error:  # one broken case must not hide the others
                line = " ".join(str(error).split())[:300]
                rows.append(decode._row("ragged rows", f"{case} row {bad}", note=line, ok=False))
                continue
            reached = [
                f"{op} of row {row}"
                for op in prefill.NAMES
                for row in made.alone
                if row != bad and not ragged.same(op, case, row, healthy[row][op], found[row][op])
            ]
            rows.append(decode._row("ragged rows", f"{case} row {bad}", note=", ".join(reached[:4]), ok=not reached))
    return rows


def _faults(
    healthy: dict[str, Any], slots: tuple[int, ...], query: int | None, heads: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, inputs) with one element of a key NaN or inf, or of a query of the same KV head NaN."""
    for kind in ("nan", "inf"):
        for slot in slots:
            k, table = healthy["k"].clone(), healthy.get("table")
            if table is None:
                k[ROW, HEAD, slot, DIM] = float(kind)
            else:
                page = k.shape[1]
                k[table[ROW, slot // page].long(), slot % page, HEAD, DIM] = float(kind)
            yield f"{kind} key {slot}", {**healthy, "k": k}
    q, head = healthy["q"].clone(), heads // 2 + 1  # of two KV heads, the second's
    (q[ROW, head] if query is None else q[ROW, head, query])[DIM] = float("nan")
    yield "nan query", {**healthy, "q": q}


def _judge(
    case: str,
    run: Callable[[dict[str, Any]], dict[str, Tensor]],
    truth: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Tensor]],
    healthy: dict[str, Any],
    given: dict[str, Any],
) -> list[Row]:
    try:
        with poisoned():
            before, found, again = run(healthy), run(given), run(given)
        expected = truth(given, found)
    except Exception as error:  # one broken case must not hide the others
        return [decode._row("all", case, note=f"{type(error).__name__}: {str(error)[:300]}", ok=False)]
    rows = []
    for op, got in found.items():
        want, notes = expected[op].to(got.dtype), []
        # A log-sum-exp over a logit of +inf is +inf; an online one, which subtracts its maximum, gets NaN.
        bad, expect = (
            (x.isnan() | (x == torch.inf) for x in (got, want))
            if "lse" in op or "log" in op
            else (got.isnan(), want.isnan())
        )
        if not torch.equal(bad, expect):
            notes.append(f"{int(bad.sum())} NaN of {int(expect.sum())}")
        same = (got == want) | bad | expect  # both -inf
        error = float((got.double() - want.double()).abs().masked_fill(same, 0.0).max())
        if not error <= (0.0 if op == "select_topk" else NEAR):
            notes.append("differs from the reference")
        if not torch.equal(_others(before[op]), _others(got)):
            notes.append("reaches other rows or heads")
        if not torch.equal(got.nan_to_num(7.0), again[op].nan_to_num(7.0)):
            notes.append("two calls differ")
        rows.append(decode._row(op, case, error=error, bound=NEAR, note=", ".join(notes), ok=not notes))
    return rows


def _others(result: Tensor) -> Tensor:
    """A result [B, H or G, ...] of two KV heads, or [B, 1, ...] of both, without what may be broken."""
    if result.shape[1] == 1:
        return torch.cat([result[:ROW], result[ROW + 1 :]])
    split = result.unflatten(1, (2, -1)).clone()
    split[ROW, HEAD] = 0
    return split


def _decode(ops: Any, at: dict[str, Any]) -> dict[str, Tensor]:
    names = ("dense", "scores", "plain", "pooled", "select_topk", "sparse", "known", "joined")
    return dict(zip(names, decode._outputs(ops, at), strict=True))


def _decode_truth(at: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference, over the keys that were found: they must be those that it would choose from the same scores."""
    q, k, v, start, length, scale = (at[name] for name in ("q", "k", "v", "start", "length", "scale"))
    if at["table"] is not None:
        pages = at["table"].clamp(0, k.shape[0] - 1)
        k, v = reference.gather_pages(k, pages), reference.gather_pages(v, pages)
    q, k, v = q.double(), k.double(), v.double()
    dense, scores = reference.decode_dense(q, k, v, start, length, scale=scale, scores=True)
    limits = (at["count"][:, None], start[:, None], length[:, None])
    picked = reference.select_topk(found["pooled"], *limits, max_count=at["most"])
    sparse = reference.decode_sparse(q, k, v, picked, at["count"], at["map"], scale=scale)
    # What a fault makes NaN in dense attention, it makes NaN over the chosen keys.
    sparse = sparse.masked_fill(dense.isnan(), float("nan"))
    return {
        "dense": dense, "scores": scores, "plain": dense, "pooled": scores, "select_topk": picked, "sparse": sparse,
        "known": sparse, "joined": scores.sum(1, keepdim=True),
    }  # fmt: skip


def _prefill(ops: Any, at: dict[str, Any]) -> dict[str, Tensor]:
    case, (start, begin, _), scale = at["case"], at["args"], at["scale"]
    q, k, v, args, tile = at["q"], at["k"], at["v"], at["args"], case.tile
    dense, lse = ops.prefill_dense(q, k, v, *args, scale=scale)
    alone = ops.prefill_dense(q, k, None, *args, scale=scale)[1]
    pooled = ops.prefill_score(q, k, alone.float(), *args, scale=scale, tile=tile)
    before, counts = _wanted(case, start, begin, pooled.shape[2])
    spread = pooled.shape[:3]
    picked = ops.select_topk(
        pooled,
        counts[:, None].expand(spread),
        begin[:, None, None].expand(spread),
        before[:, None].expand(spread),
        max_count=case.floor,
    )
    where = (picked, counts, torch.arange(case.kv_heads, dtype=torch.int32, device=q.device), *args)
    return {
        "dense": dense,
        "log-sum-exp": lse,
        "lse only": alone,
        "pooled": pooled,
        "select_topk": picked,
        "sparse": ops.prefill_sparse(q, k, v, *where, scale=scale, tile=tile),
        "sparse_lse": ops.prefill_sparse_lse(q, k, *where, scale=scale, tile=tile),
    }


def _wanted(case: prefill.PrefillCase, start: Tensor, begin: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """(keys before each tile, how many of them to select), int32 [B, NT]."""
    before = (
        reference.first_tile(start, begin, case.tile)[:, None] + torch.arange(tiles, device=start.device)
    ) * case.tile
    before = torch.minimum(before, (case.slots - begin).clamp_min(0)[:, None]).int()
    return before, before.clamp_max(case.floor)


def _prefill_truth(at: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference, over the keys that it would choose from the scores that were found."""

    class Chosen:
        """Its ops in float64, and that choice."""

        prefill_dense = staticmethod(reference.prefill_dense)
        prefill_score = staticmethod(reference.prefill_score)
        prefill_sparse = staticmethod(reference.prefill_sparse)
        prefill_sparse_lse = staticmethod(reference.prefill_sparse_lse)

        @staticmethod
        def select_topk(_: Tensor, *limits: Tensor, max_count: int) -> Tensor:
            return reference.select_topk(found["pooled"], *limits, max_count=max_count)

    truth = _prefill(Chosen, {**at, **{name: at[name].double() for name in "qkv"}})
    broken = truth["dense"].isnan()
    truth["sparse"] = truth["sparse"].masked_fill(broken, float("nan"))
    return truth
