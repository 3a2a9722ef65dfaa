"""Numerics of ragged prefill over pages, by the rule of `testing.prefill`: every row against the padded op alone.

Slots that are no row's, pages that no row has and queries behind the last row hold NaN; the table names pages that do
not exist where a row has none.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kascade_cli.kernels.ragged import ragged_tiles, tile_base, tile_room
from kascade_cli.kernels.testing import prefill
from kascade_cli.kernels.testing.poison import poisoned

NO_PAGE = 1 << 30


@dataclass(frozen=True)
class RaggedCase:
    """One batch: (queries, keys) of each row, its queries the last of its keys; `padding` tokens behind the rows."""

    dtype: torch.dtype
    group: int
    head_dim: int
    page: int
    rows: tuple[tuple[int, int], ...]
    padding: int = 0
    kv_heads: int = 2
    tile: int = 32
    ratio: float = 0.1
    floor: int = 64

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        heads = f"H{self.group * self.kv_heads}-G{self.kv_heads}-D{self.head_dim}"
        rows = ",".join(f"{queries}of{keys}" for queries, keys in self.rows)
        tile = "" if self.tile == 32 else f"-tile{self.tile}"
        return f"{name}-{heads}-page{self.page}-{rows}" + (f"+{self.padding}" if self.padding else "") + tile

    @property
    def tokens(self) -> int:
        """N: queries of all rows and padding."""
        return sum(queries for queries, _ in self.rows) + self.padding

    @property
    def locations(self) -> list[int]:
        """query_start_loc."""
        found = [0]
        for queries, _ in self.rows:
            found.append(found[-1] + queries)
        return found

    def alone(self, row: int) -> prefill.PrefillCase:
        """That row as a padded batch of one."""
        queries, keys = self.rows[row]
        more = {"kv_heads": self.kv_heads, "tile": self.tile, "ratio": self.ratio, "floor": self.floor}
        return prefill.late(self.dtype, self.group, self.head_dim, keys, queries, **more)


def _cases() -> tuple[RaggedCase, ...]:
    """Page sizes, groups, dtypes, head sizes and tiles, each a few times, over odd lengths and chunks."""
    bf16, fp16 = torch.bfloat16, torch.float16
    short = ((31, 31), (1, 1), (129, 129), (33, 33))
    mixed = ((40, 4097), (1, 33), (0, 0), (200, 200), (64, 1000), (0, 77), (517, 700))
    many = tuple((1 + 7 * i % 41, 1 + 7 * i % 41 + 13 * i) for i in range(70))  # more rows than lanes
    late = ((64, 32768 + 17), (300, 9001))
    return (
        *(RaggedCase(bf16, 4, 128, page, mixed, padding=37) for page in (16, 32, 64, 128, 256)),
        RaggedCase(bf16, 4, 128, 32, short),
        RaggedCase(bf16, 4, 128, 32, ((4097, 4097),), padding=300),
        RaggedCase(bf16, 4, 128, 32, late),
        RaggedCase(bf16, 4, 128, 32, many, padding=5),
        RaggedCase(bf16, 4, 128, 16, mixed, tile=8),
        RaggedCase(bf16, 4, 128, 64, mixed, tile=64),
        RaggedCase(bf16, 4, 128, 128, mixed, tile=128, padding=200),
        RaggedCase(bf16, 1, 128, 32, mixed),
        RaggedCase(bf16, 5, 128, 128, short, kv_heads=3),
        RaggedCase(fp16, 4, 128, 64, mixed, padding=1),
        RaggedCase(fp16, 7, 64, 32, mixed),
        RaggedCase(fp16, 1, 64, 16, short, padding=64),
        RaggedCase(bf16, 16, 64, 128, mixed, padding=9),
        RaggedCase(fp16, 12, 64, 256, mixed),
    )


@dataclass
class Inputs:
    """A batch and its rows alone. `args`: query_start, kv_start, kv_len; `pages`: block_table, query_start_loc."""

    q: Tensor
    k: Tensor
    v: Tensor
    args: tuple[Tensor, Tensor, Tensor]
    pages: dict[str, Tensor]
    head_map: Tensor
    scale: float
    alone: dict[int, prefill.Inputs]


def make_inputs(case: RaggedCase, seed: int, device: str = "cuda") -> Inputs:
    """Rows as `prefill.make_inputs` draws them, their pages shuffled among pages of NaN. Rows without queries are not
    in `alone`."""
    lengths = [keys for _, keys in case.rows]
    most = max(1, *(-(-keys // case.page) for keys in lengths)) + 1
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(case.rows) * most + 1, generator=generator).int().tolist()
    shape = (len(order), case.page, case.kv_heads, case.head_dim)
    k, v = (torch.full(shape, float("nan"), dtype=case.dtype, device=device) for _ in range(2))
    heads = case.group * case.kv_heads
    q = torch.full((case.tokens, heads, case.head_dim), float("nan"), dtype=case.dtype, device=device)
    table = torch.full((len(case.rows), most), NO_PAGE, dtype=torch.int32)
    alone, at = {}, case.locations
    for row, (queries, keys) in enumerate(case.rows):
        if queries and keys:
            alone[row] = made = prefill.make_inputs(case.alone(row), seed + 1000 * row, device)
            q[at[row] : at[row + 1]] = made.q[0].transpose(0, 1)
            for i in range(-(-keys // case.page)):
                table[row, i] = page = order.pop()
                here = slice(i * case.page, min(keys, (i + 1) * case.page))
                for cache, source in ((k, made.k), (v, made.v)):
                    cache[page, : here.stop - here.start] = source[0, :, here].transpose(0, 1)
    starts = [keys - queries for queries, keys in case.rows]
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, [0] * len(starts), lengths, at)]
    head_map = torch.randint(case.kv_heads, (case.kv_heads,), generator=generator).int().to(device)
    for made in alone.values():
        made.head_map = head_map
    pages = {"block_table": table.to(device), "query_start_loc": ints[3]}
    return Inputs(q, k, v, tuple(ints[:3]), pages, head_map, case.head_dim**-0.5, alone)


CASES = _cases()


def without(case: RaggedCase, inputs: Inputs, row: int) -> Inputs:
    """The same batch with NaN for every query, key and value of one row."""
    q, k, v = inputs.q.clone(), inputs.k.clone(), inputs.v.clone()
    q[case.locations[row] : case.locations[row + 1]] = float("nan")
    pages = inputs.pages["block_table"][row, : -(-case.rows[row][1] // case.page)].long()
    k[pages], v[pages] = float("nan"), float("nan")
    return replace(inputs, q=q, k=k, v=v)


Selections = dict[int, tuple[Tensor, Tensor]]


def pack(case: RaggedCase, inputs: Inputs, rows: Selections) -> tuple[Tensor, Tensor]:
    """(indices [G, NT, K], counts [NT]) of the batch from those of its rows, [1, G, tiles, K] and [1, tiles]."""
    room, bases = tile_room(case.tokens, len(case.rows), case.tile), _bases(case, inputs)
    width = max([1, *(indices.shape[-1] for indices, _ in rows.values())])
    shape = (case.kv_heads, room, width)
    indices = torch.full(shape, -1, dtype=torch.int32, device=inputs.q.device)
    counts = torch.zeros(room, dtype=torch.int32, device=inputs.q.device)
    for row, (chosen, wanted) in rows.items():
        tiles = slice(bases[row], bases[row] + _touched(case, row))
        size = tiles.stop - tiles.start  # the padded form has a tile more where a chunk begins on an edge
        indices[:, tiles, : chosen.shape[-1]] = chosen[0, :, :size]
        counts[tiles] = wanted[0, :size]
    return indices, counts


def run_ops(ops: Any, case: RaggedCase, inputs: Inputs, indices: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """The prefill ops of `ops` on these inputs, scores in two blocks of tiles that cut a pair in some cases."""
    q, k, v, args, given = inputs.q, inputs.k, inputs.v, inputs.args, {"scale": inputs.scale, **inputs.pages}
    out, lse = ops.prefill_dense(q, k, v, *args, **given)
    lse_only = ops.prefill_dense(q, k, None, *args, **given)[1]
    room, tile = len(counts), {"tile": case.tile}
    half = room // 3
    norm = lse_only.float()
    parts = [ops.prefill_score(q, k, norm, *args, **given, **tile, first=0, tiles=half)] if half else []
    parts.append(ops.prefill_score(q, k, norm, *args, **given, **tile, first=half))
    where = (indices, counts, inputs.head_map, *args)
    return {
        "prefill_dense": out,
        "log-sum-exp": lse,
        "lse only": lse_only,
        "prefill_score": torch.cat(parts, 1),
        "prefill_sparse": ops.prefill_sparse(q, k, v, *where, **given, **tile),
        "prefill_sparse_lse": ops.prefill_sparse_lse(q, k, *where, **given, **tile),
    }


def rows_of(case: RaggedCase, inputs: Inputs, results: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """A batch's results as those of its rows alone: [1, H, T, D], [1, H, T]; scores [1, G, tiles, keys]."""
    bases, found = _bases(case, inputs), {}
    for row, (begin, end) in enumerate(pairwise(case.locations)):
        if row not in inputs.alone:
            continue
        mine = found[row] = {}
        for op, result in results.items():
            if op == "prefill_score":
                tiles = slice(bases[row], bases[row] + _touched(case, row))
                mine[op] = result[None, :, tiles, : case.rows[row][1]]
            else:
                mine[op] = result[begin:end].transpose(0, 1)[None] if result.dim() == 3 else result[None, :, begin:end]
    return found


def check(ops: Any, case: RaggedCase, seed: int = 0, device: str = "cuda") -> list[dict[str, Any]]:
    """One row per op, as `prefill.check`: the largest error over the rows, and whether padding is zero."""
    inputs = make_inputs(case, seed, device)
    exact = {row: prefill.exact(case.alone(row), made) for row, made in inputs.alone.items()}
    picked = {row: found[1:] for row, found in exact.items()}
    indices, counts = pack(case, inputs, picked)
    with poisoned():
        got = run_ops(ops, case, inputs, indices, counts)
        again = run_ops(ops, case, inputs, indices, counts)
    mine, same = rows_of(case, inputs, got), rows_of(case, inputs, again)
    low = {row: prefill.plain(case.alone(row), made, *picked[row]) for row, made in inputs.alone.items()}
    note = _tiles_note(case, inputs)
    rows = []
    for op in prefill.NAMES:
        errors, plains, sizes, written, equal = [0.0], [0.0], [1.0], True, True
        for row, (truth, *_) in exact.items():
            want, here, twin, rough = truth[op], mine[row][op], same[row][op], low[row][op]
            if op == "prefill_score":
                seen = _before(case, row, want)
                want, rough = (x[:, :, : seen.shape[0]].masked_fill(~seen, 0.0) for x in (want, rough))
                here, twin = (x.masked_fill(~seen, 0.0) for x in (here, twin))
            errors.append(prefill._distance(here, want))
            plains.append(prefill._distance(rough, want))
            sizes.append(float(want.nan_to_num(neginf=0.0).abs().max()))
            written &= not bool(here.isnan().any())
            equal &= torch.equal(here, twin)
        if op != "prefill_score":
            blank = got[op][case.locations[-1] :] if got[op].dim() == 3 else got[op][:, case.locations[-1] :]
            written &= bool((blank == (0.0 if blank.dim() == 3 else float("-inf"))).all())
        bound = max(2 * max(plains), prefill.FLOOR.get(case.dtype, 1e-12) * max(sizes))
        ok = written and equal and max(errors) <= bound and not note
        rows.append(
            {
                "op": f"ragged {op}",
                "case": str(case),
                "error": max(errors),
                "plain": max(plains),
                "written": written,
                "same_bits": equal,
                "note": note,
                "ok": ok,
            }
        )
    return rows


def stress(ops: Any, case: RaggedCase, seeds: int, repeats: int = 3) -> dict[str, Any]:
    """Races, as `prefill.stress`: how often bits changed over `seeds` inputs run `repeats` times each."""
    changed = dict.fromkeys(prefill.NAMES, 0)
    for seed in range(seeds):
        inputs = make_inputs(case, seed)
        chosen = {}
        for row, made in inputs.alone.items():
            scores = ops.prefill_score(made.q, made.k, None, *made.args, scale=made.scale, tile=case.tile)
            chosen[row] = prefill.make_selection(case.alone(row), made, scores)
        selection = pack(case, inputs, chosen)
        runs = [rows_of(case, inputs, run_ops(ops, case, inputs, *selection)) for _ in range(repeats)]
        for op in changed:
            for run in runs[1:]:
                changed[op] += any(not same(op, case, row, runs[0][row][op], run[row][op]) for row in inputs.alone)
    return {"case": str(case), "seeds": seeds, "changed": changed}


def same(op: str, case: RaggedCase, row: int, one: Tensor, other: Tensor) -> bool:
    """Whether two results of a row are equal where they are defined."""
    if op == "prefill_score":
        seen = _before(case, row, one)
        one, other = (x.masked_fill(~seen, 0.0) for x in (one, other))
    return torch.equal(one, other)


def _bases(case: RaggedCase, inputs: Inputs) -> list[int]:
    return tile_base(inputs.pages["query_start_loc"], case.tile).tolist()


def _touched(case: RaggedCase, row: int) -> int:
    """How many tiles a row's queries are in."""
    queries, keys = case.rows[row]
    return (keys - 1) // case.tile - (keys - queries) // case.tile + 1


def _before(case: RaggedCase, row: int, scores: Tensor) -> Tensor:
    """Which slots lie before each tile that the row's queries are in, bool [tiles, keys]."""
    queries, keys = case.rows[row]
    number = torch.arange(_touched(case, row), device=scores.device) + (keys - queries) // case.tile
    return torch.arange(keys, device=scores.device) < (number * case.tile)[:, None]


def _tiles_note(case: RaggedCase, inputs: Inputs) -> str:
    """What is wrong with `ragged_tiles` on this device, or nothing."""
    location, (start, _, length) = inputs.pages["query_start_loc"], inputs.args
    row, before = ragged_tiles(location, start, length, case.tile, case.tokens)
    want = torch.full_like(row, len(case.rows)), torch.zeros_like(before)
    for b in inputs.alone:
        here = slice(_bases(case, inputs)[b], _bases(case, inputs)[b] + _touched(case, b))
        want[0][here] = b
        size = torch.arange(here.stop - here.start, device=row.device, dtype=torch.int32)
        want[1][here] = ((case.rows[b][1] - case.rows[b][0]) // case.tile + size) * case.tile
    return "" if torch.equal(row, want[0]) and torch.equal(before, want[1]) else "ragged_tiles are wrong"
