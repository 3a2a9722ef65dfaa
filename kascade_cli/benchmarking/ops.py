"""Each of the attention ops by itself, and dense baselines beside them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kascade_cli.benchmarking.baselines import Baseline
from kascade_cli.benchmarking.model import Say, best_dense, dense_rows, failure, timing_fields
from kascade_cli.benchmarking.report import Row, base_row
from kascade_cli.benchmarking.roles import Bench, Inputs, make_inputs, make_sets, workload_of
from kascade_cli.benchmarking.shapes import Shape
from kascade_cli.benchmarking.timing import Call, free_memory, time_calls
from kascade_cli.benchmarking.work import Work, Workload, work_of
from kascade_cli.errors import KascadeError
from kascade_cli.kernels.reference import tile_count

# Scores of one call of prefill_score, in bytes; a whole 128k prefill would take 17 GB.
_SCORE_BYTES = 512 * 1024**2

# (name, work, make): make(inputs) prepares what the op reads and returns the call to time
_Op = tuple[str, Work, Callable[[Inputs], Call]]


def _head_map(case: Workload, device: torch.device) -> torch.Tensor:
    return torch.arange(case.kv_heads - 1, -1, -1, dtype=torch.int32, device=device)


def decode_ops(case: Workload, setting: Bench) -> Iterator[_Op]:
    """The four decode ops, dense attention that leaves scores as well, and an anchor's sparse attention."""
    ops = setting.backend

    def lengths(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.batch.lengths.kv_start, inputs.batch.lengths.kv_len

    def dense(inputs: Inputs, scores: bool) -> Call:
        row, where = inputs.q[:, :, 0], lengths(inputs)
        return lambda: ops.decode_dense(row, inputs.k, inputs.v, *where, scale=inputs.scale, scores=scores)

    def score(inputs: Inputs) -> Call:
        row, where = inputs.q[:, :, 0], lengths(inputs)
        return lambda: ops.decode_score(row, inputs.k, *where, scale=inputs.scale)

    def select(inputs: Inputs) -> Call:
        pooled, (start, length) = score(inputs)(), lengths(inputs)
        rows = (inputs.batch.counts[:, None], start[:, None], length[:, None])
        return lambda: ops.select_topk(pooled, *rows, max_count=inputs.batch.width)

    def sparse(inputs: Inputs, known: bool) -> Call:
        chosen, row = select(inputs)(), inputs.q[:, :, 0]
        where = (chosen, inputs.batch.counts, _head_map(case, setting.device))
        logits = None
        if known:
            _, logits = ops.decode_score(row, inputs.k, *lengths(inputs), scale=inputs.scale, logits=True)
        return lambda: ops.decode_sparse(row, inputs.k, inputs.v, *where, scale=inputs.scale, logits=logits)

    whole = work_of("decode_dense", case)
    with_scores = Work(whole.flops, whole.bytes + 4 * case.batch * case.kv_heads * case.context, "memory")
    yield "decode_dense", whole, lambda inputs: dense(inputs, False)
    yield "decode_dense+scores", with_scores, lambda inputs: dense(inputs, True)
    yield "decode_score", work_of("decode_score", case), score
    yield "select_topk", work_of("select_topk", case), select
    yield "decode_sparse", work_of("decode_sparse", case), lambda inputs: sparse(inputs, False)
    yield "decode_sparse+logits", work_of("decode_sparse+logits", case), lambda inputs: sparse(inputs, True)


def prefill_ops(case: Workload, setting: Bench) -> Iterator[_Op]:
    """The prefill ops, the log-sum-exp pass, and Top-k over the last block of tiles."""
    ops = setting.backend
    tile = setting.budget.tile
    tiles = tile_count(case.context, tile, aligned=True)
    block = max(1, min(tiles, _SCORE_BYTES // (4 * case.batch * case.kv_heads * case.context)))
    last = tiles - block

    def lengths(inputs: Inputs) -> list[torch.Tensor]:
        return list(inputs.batch.lengths)

    def dense(inputs: Inputs, values: bool) -> Call:
        where, v = lengths(inputs), inputs.v if values else None
        return lambda: ops.prefill_dense(inputs.q, inputs.k, v, *where, scale=inputs.scale)

    def scores(inputs: Inputs, lse: torch.Tensor, first: int, count: int) -> torch.Tensor:
        options = {"scale": inputs.scale, "tile": tile, "first": first, "tiles": count}
        return ops.prefill_score(inputs.q, inputs.k, lse, *lengths(inputs), **options)

    def score(inputs: Inputs) -> Call:
        _, lse = dense(inputs, False)()

        def run() -> None:
            for first in range(0, tiles, block):
                scores(inputs, lse, first, min(block, tiles - first))

        return run

    def rows(inputs: Inputs, here: slice) -> list[torch.Tensor]:
        batch = inputs.batch
        return [batch.counts[:, None, here], batch.lengths.kv_start[:, None, None], batch.before[:, None, here]]

    def select(inputs: Inputs) -> Call:
        pooled = scores(inputs, dense(inputs, False)()[1], last, block)
        return lambda: ops.select_topk(pooled, *rows(inputs, slice(last, None)), max_count=inputs.batch.width)

    def selection(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        _, lse = dense(inputs, False)()
        batch, parts = inputs.batch, []
        for first in range(0, tiles, block):
            count = min(block, tiles - first)
            pooled = scores(inputs, lse, first, count)
            here = rows(inputs, slice(first, first + count))
            parts.append(ops.select_topk(pooled, *here, max_count=batch.width))
        return torch.cat(parts, 2), batch.counts, _head_map(case, setting.device), *lengths(inputs)

    def sparse(inputs: Inputs) -> Call:
        where = selection(inputs)
        return lambda: ops.prefill_sparse(inputs.q, inputs.k, inputs.v, *where, scale=inputs.scale, tile=tile)

    def sparse_lse(inputs: Inputs) -> Call:
        where = selection(inputs)
        return lambda: ops.prefill_sparse_lse(inputs.q, inputs.k, *where, scale=inputs.scale, tile=tile)

    whole = work_of("prefill_dense", case)
    yield "prefill_dense", whole, lambda inputs: dense(inputs, True)
    yield "prefill_dense, lse", Work(whole.flops / 2, 0, "compute"), lambda inputs: dense(inputs, False)
    yield "prefill_score", work_of("prefill_score", case), score
    name = "select_topk" if block == tiles else f"select_topk, last {block} of {tiles} tiles"
    yield name, work_of("select_topk", case, tiles=(last, tiles)), select
    chosen = work_of("prefill_sparse", case)
    yield "prefill_sparse", chosen, sparse
    yield "prefill_sparse_lse", Work(chosen.flops / 2, 0, "compute"), sparse_lse


def run_ops(
    shape: Shape,
    phase: str,
    sizes: Sequence[tuple[int, int]],
    setting: Bench,
    baselines: Sequence[Baseline],
    say: Say = lambda text: None,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Rows of every op of one phase over (batch, context) pairs; an op that fails has `error` instead of times.

    done(rows) is called as every size ends. Raises KascadeError if nothing at all could be measured.
    """
    rows: list[Row] = []
    for batch, context in sizes:
        base = base_row(shape, phase, batch, context, setting)
        case = workload_of(shape, phase, batch, context, setting)
        here: list[Row] = []
        try:
            here += dense_rows(baselines, case, setting, base, say)
            here += _op_rows(case, setting, base, say)
        except Exception as error:
            here.append(base | {"kind": "failed", "name": "ops", "error": failure(error)})
        if best := best_dense(here):
            for row in here:
                if row["kind"] == "dense" and "ms_p50" in row:
                    row |= {"baseline": best["name"], "speedup": round(best["ms_p50"] / row["ms_p50"], 3)}
        rows += here
        done(here)
        free_memory(setting.device)
    if rows and not any("ms_p50" in row for row in rows):
        raise KascadeError(next(row["error"] for row in rows if "error" in row))
    return rows


def _op_rows(case: Workload, setting: Bench, base: Row, say: Say) -> list[Row]:
    rows = []
    sets = [make_inputs(case, setting)]
    listed: Iterator[Any] = (decode_ops if case.phase == "decode" else prefill_ops)(case, setting)
    for name, work, make in listed:
        say(f"{case.phase} {base['size']}: {name}")
        row = base | {"kind": "op", "name": name}
        try:
            with torch.no_grad():
                sets = make_sets(case, setting, work.bytes, sets)
                calls = [make(inputs) for inputs in sets]
            timing = time_calls(calls, setting.device, graph=case.phase == "decode", seconds=setting.seconds)
            row |= timing_fields(timing) | work.rates(timing.p50)
            del calls
        except Exception as error:  # one op must not take the others with it
            row["error"] = failure(error)
        rows.append(row)
        free_memory(setting.device)
    return rows
