"""Check the paged, ragged prefill kernels on a Hopper GPU and time them against the contiguous ones.

    PYTHONPATH=. python benchmarks/paged_prefill.py -o rows.json     under five minutes on an H100
    PYTHONPATH=. python benchmarks/paged_prefill.py --dry-run        the same code on a CPU, tiny sizes, PyTorch

First every case of `kernels/testing/ragged.py` against float64 (the rule is FlashAttention's: at most twice the error
of plain PyTorch), rows of NaN, races, and that no op waits for the device. Then a Llama-3.1-8B shape (32 query heads,
8 KV heads of 128, bfloat16, Top-k 10 %): whole prompts of 32k, 64k and 128k tokens, the last 8k of 128k (a chunk), and
four rows of 16k, each op on a contiguous cache and over shuffled pages, in turn; what they give must agree. Writes one
JSON document with the machine's description; exit code 1 if a check failed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kascade_cli.benchmarking.report import machine
from kascade_cli.benchmarking.timing import free_memory, time_calls
from kascade_cli.kernels import get_backend
from kascade_cli.kernels.contract import tile_count
from kascade_cli.kernels.ragged import ragged_tiles, tile_room
from kascade_cli.kernels.testing import broken, ragged

GROUP, KV_HEADS, DIM, TILE, RATIO, FLOOR = 4, 8, 128, 32, 0.10, 128
# (name, rows, queries of each, keys of each): what is timed
SIZES = (
    ("1 x 32k", 1, 32768, 32768),
    ("1 x 64k", 1, 65536, 65536),
    ("1 x 128k", 1, 131072, 131072),
    ("last 8k of 128k", 1, 8192, 131072),
    ("4 x 16k", 4, 16384, 16384),
)
PAGES = (16, 32, 128)  # of the contiguous caches' copies; the longest prompt takes the middle one alone
SCORE_BYTES = 1 << 30
OPS = ("dense", "lse", "score", "select", "sparse", "sparse_lse")
NEAR = 0.02  # of outputs of one op in two layouts; the blocks are the same, so they should agree to the bit


class Step:
    """One layer's inputs: rows of equal length, contiguous and, the same numbers, in shuffled pages."""

    def __init__(self, ops: Any, device: torch.device, dtype: torch.dtype, rows: int, queries: int, keys: int):
        self.ops, self.rows, self.queries, self.keys, self.scale = ops, rows, queries, keys, DIM**-0.5
        make = {"device": device, "dtype": dtype}
        self.q = torch.randn(rows, queries, GROUP * KV_HEADS, DIM, **make)
        self.k, self.v = (torch.randn(rows, KV_HEADS, keys, DIM, **make) for _ in range(2))
        ints = {"device": device, "dtype": torch.int32}
        self.lengths = tuple(torch.full((rows,), x, **ints) for x in (keys - queries, 0, keys))
        self.loc = torch.arange(rows + 1, **ints) * queries
        self.head_map = torch.arange(KV_HEADS - 1, -1, -1, **ints)
        self.pages: dict[str, Tensor] = {}
        self.paged: tuple[Tensor, Tensor, Tensor] | None = None
        first, tiles = (keys - queries) // TILE, tile_count(queries, TILE, aligned=queries % TILE == 0)
        before = (first + torch.arange(tiles, **ints)) * TILE
        self.before = torch.where(before < keys, before, 0).expand(rows, tiles).contiguous()
        self.most = max(1, int(_count(torch.tensor(keys - 1))))

    def page(self, size: int) -> None:
        """Lays the caches out in pages of `size` slots, in random order."""
        pages = self.keys // size
        order = torch.randperm(self.rows * pages, device=self.q.device)
        caches = []
        for cache in (self.k, self.v):
            cut = cache.transpose(1, 2).reshape(self.rows * pages, size, KV_HEADS, DIM)
            caches.append(torch.empty_like(cut, memory_format=torch.contiguous_format))
            caches[-1][order] = cut
        self.pages = {"block_table": order.view(self.rows, pages).int(), "query_start_loc": self.loc}
        self.paged = (self.q.flatten(0, 1), *caches)

    def inputs(self, paged: bool) -> tuple[Tensor, Tensor, Tensor]:
        return self.paged if paged else (self.q.transpose(1, 2), self.k, self.v)

    def given(self, paged: bool) -> dict[str, Any]:
        return {"scale": self.scale, **(self.pages if paged else {})}

    def tiles(self, paged: bool) -> Tensor:
        """Keys before each tile: [B, NT] or, packed, [NT]."""
        if not paged:
            return self.before
        start, _, length = self.lengths
        return ragged_tiles(self.loc, start, length, TILE, self.rows * self.queries)[1]

    def dense(self, paged: bool) -> tuple[Tensor, Tensor]:
        return self.ops.prefill_dense(*self.inputs(paged), *self.lengths, **self.given(paged))

    def norm(self, paged: bool) -> Tensor:
        q, k, _ = self.inputs(paged)
        return self.ops.prefill_dense(q, k, None, *self.lengths, **self.given(paged))[1]

    def blocks(self, paged: bool) -> list[slice]:
        """Blocks of tiles whose scores fit SCORE_BYTES, an even number of tiles each."""
        batch, tiles = (1, self.tiles(True).shape[0]) if paged else self.before.shape
        step = max(2, SCORE_BYTES // (4 * batch * KV_HEADS * self.keys) // 2 * 2)
        return [slice(first, min(first + step, tiles)) for first in range(0, tiles, step)]

    def scores(self, paged: bool, lse: Tensor, here: slice) -> Tensor:
        q, k, _ = self.inputs(paged)
        more = {"tile": TILE, "first": here.start, "tiles": here.stop - here.start}
        return self.ops.prefill_score(q, k, lse, *self.lengths, **self.given(paged), **more)

    def all_scores(self, paged: bool, lse: Tensor, blocks: list[slice]) -> None:
        for here in blocks:
            self.scores(paged, lse, here)

    def choose(self, paged: bool, scores: Tensor, before: Tensor, here: slice) -> Tensor:
        before = before[..., here] if paged else before[:, None, here]
        zero = torch.zeros((), dtype=torch.int32, device=before.device)
        return self.ops.select_topk(scores, _count(before), zero, before, max_count=self.most)

    def selection(self, paged: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(indices, counts, head map) of the layer's own Top-k."""
        before, lse = self.tiles(paged), self.norm(paged)
        parts = [self.choose(paged, self.scores(paged, lse, here), before, here) for here in self.blocks(paged)]
        return torch.cat(parts, 1 if paged else 2), _count(before), self.head_map

    def sparse(self, paged: bool, where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.ops.prefill_sparse(*self.inputs(paged), *where, *self.lengths, **self.given(paged), tile=TILE)

    def sparse_lse(self, paged: bool, where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, _ = self.inputs(paged)
        return self.ops.prefill_sparse_lse(q, k, *where, *self.lengths, **self.given(paged), tile=TILE)

    def outputs(self, paged: bool) -> dict[str, Tensor]:
        """What the ops give, in the padded form: [B, H, T, D] and [B, H, T]."""
        where = self.selection(paged)
        found = dict(zip(("dense", "lse"), self.dense(paged), strict=True))
        found |= {"sparse": self.sparse(paged, where), "sparse_lse": self.sparse_lse(paged, where)}
        if paged:
            shape = (self.rows, self.queries)
            found = {
                op: x.unflatten(0, shape).transpose(1, 2) if x.dim() == 3 else x.unflatten(1, shape).transpose(0, 1)
                for op, x in found.items()
            }
        return found

    def calls(self, paged: bool) -> dict[str, Callable[[], Any]]:
        """Each op by name, what it reads made beforehand."""
        lse, where, blocks, before = self.norm(paged), self.selection(paged), self.blocks(paged), self.tiles(paged)
        last = blocks[-1]
        scores = self.scores(paged, lse, last)
        return {
            "dense": lambda: self.dense(paged),
            "lse": lambda: self.norm(paged),
            "score": lambda: self.all_scores(paged, lse, blocks),
            "select": lambda: self.choose(paged, scores, before, last),
            "sparse": lambda: self.sparse(paged, where),
            "sparse_lse": lambda: self.sparse_lse(paged, where),
        }


def _count(before: Tensor) -> Tensor:
    """k(N): at least FLOOR, at most N."""
    return torch.minimum(torch.ceil(before.double() * RATIO - 1e-6).clamp_min(FLOOR), before.double()).int()


def specs(cases: tuple[ragged.RaggedCase, ...]) -> list[Any]:
    """Every kernel that the cases and the timings use, once; the slowest to compile come first."""
    from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs
    from kascade_cli.kernels.tilelang.specs import select_specs

    shapes = [(GROUP, DIM, "bfloat16", TILE, page) for page in (0, *PAGES)]
    shapes += [(case.group, case.head_dim, str(case.dtype)[6:], case.tile, case.page) for case in cases]
    found = {str(spec): spec for shape in shapes for spec in prefill_specs(*shape)}
    ordered = sorted(found.values(), key=lambda spec: spec.name not in ("dense_kernel", "sparse_kernel"))
    return ordered + select_specs()


def compile_all(cases: tuple[ragged.RaggedCase, ...]) -> list[str]:
    """Builds the kernels in parallel processes; what failed, a line each."""
    from kascade_cli.kernels.tilelang.compile import prebuild

    begin, found = time.monotonic(), specs(cases)
    failed = prebuild(found, jobs=max(2, (os.cpu_count() or 4) - 1))
    print(f"{len(found) - len(failed)} of {len(found)} kernels after {time.monotonic() - begin:.0f} s", flush=True)
    return [f"{spec}: {error}" for spec, error in failed.items()]


def check(ops: Any, cases: tuple[ragged.RaggedCase, ...], device: str) -> list[dict[str, Any]]:
    """The numerics' rows, and a line per case."""
    rows = []
    for number, case in enumerate(cases):
        try:
            found = ragged.check(ops, case, seed=number, device=device)
        except Exception as error:  # one broken case must not hide the others
            line = " ".join(str(error).split())[:300]
            found = [{"op": "all", "case": str(case), "ok": False, "note": f"{type(error).__name__}: {line}"}]
        rows += found
        good = sum(row["ok"] for row in found)
        print(f"{good} of {len(found)} within the rule: {case}", flush=True)
        for row in found:
            if not row["ok"]:
                print("FAILED", {name: value for name, value in row.items() if name != "case"}, flush=True)
        free_memory(torch.device(device))
    return rows


def check_more(ops: Any) -> list[dict[str, Any]]:
    """Rows of NaN, races over a few seeds, and one pass in which any wait for the device is an error."""
    rows = broken.check_ragged(ops, torch.device("cuda"))
    found = ragged.stress(ops, ragged.CASES[1], seeds=6, repeats=4)
    changed = {op: times for op, times in found["changed"].items() if times}
    rows += [{"op": "stress", "case": found["case"], "ok": not changed, "note": str(changed or "")}]
    case = ragged.CASES[1]
    made = ragged.make_inputs(case, 5)
    room = tile_room(case.tokens, len(case.rows), case.tile)
    counts = torch.zeros(room, dtype=torch.int32, device="cuda")
    indices = torch.full((case.kv_heads, room, 1), -1, dtype=torch.int32, device="cuda")
    ragged.run_ops(ops, case, made, indices, counts)
    note = ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        location, (start, _, length) = made.pages["query_start_loc"], made.args
        ragged_tiles(location, start, length, case.tile, case.tokens)
        ragged.run_ops(ops, case, made, indices, counts)
    except RuntimeError as error:
        note = " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows.append({"op": "no wait", "case": str(case), "ok": not note, "note": note})
    for row in rows:
        print(("ok" if row["ok"] else "FAILED"), row["op"], row["note"], flush=True)
    return rows


def compare(size: str, page: int, truth: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """How far the paged ops are from the contiguous ones, at a timed size."""
    gaps = {op: float((found[op].float() - truth[op].float()).abs().max()) for op in truth}
    same = {op: torch.equal(found[op], truth[op]) for op in truth}
    ok = all(gap <= NEAR for gap in gaps.values())
    if not ok:
        print(f"FAILED {size}, page {page}: {gaps}", flush=True)
    return {"kind": "agree", "size": size, "page": page, "largest_gap": gaps, "same_bits": same, "ok": ok}


def measure(ops: Any, device: torch.device, dry: bool, deadline: float, seconds: float) -> list[dict[str, Any]]:
    """A row per size, op and layout: medians, and paged over contiguous."""
    rows: list[dict[str, Any]] = []
    sizes, effort = ((("2 x last 20 of 32", 2, 20, 32),), (1, 1)) if dry else (SIZES, (3, 20))
    for name, batch, queries, keys in sizes:
        if time.monotonic() > deadline:
            rows.append({"kind": "skipped", "size": name})
            print(f"no time for {name}", flush=True)
            continue
        step = Step(ops, device, torch.float32 if dry else torch.bfloat16, batch, queries, keys)
        layouts = [0, *(PAGES[:1] if dry else PAGES[1:2] if keys * batch > 1 << 16 else PAGES)]
        base: dict[str, float] = {}
        truth = step.outputs(False)
        for page in layouts:
            if page:
                step.page(page)
                rows.append(compare(name, page, truth, step.outputs(True)))
            calls = step.calls(bool(page))
            for op in OPS:
                timing = time_calls([calls[op]], device, seconds=seconds, fewest=effort[0], most=effort[1])
                row = {"kind": "op", "size": name, "rows": batch, "queries": queries, "keys": keys, "page": page}
                row |= {"name": op, "ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80}
                row |= {"repeats": timing.repeats}
                if page:
                    row["over_contiguous"] = round(timing.p50 / base[op], 4)
                else:
                    base[op] = timing.p50
                rows.append(row)
            del calls
            if not page:  # timed again behind the paged ones, a warm GPU drifts
                continue
            shown = " ".join(f"{r['name']} {r['ms_p50']:.3f} ({r['over_contiguous']:.3f})" for r in rows[-len(OPS) :])
            print(f"{name}, page {page}: {shown}", flush=True)
        again = step.calls(False)
        for op in OPS:
            timing = time_calls([again[op]], device, seconds=seconds, fewest=effort[0], most=effort[1])
            rows.append({"kind": "drift", "size": name, "name": op, "ms_p50": timing.p50, "first_ms_p50": base[op]})
        del again, step, truth
        free_memory(device)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path, help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=4.7, help="after these no further size is begun")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU with the PyTorch backend")
    parser.add_argument("--no-checks", action="store_true", help="only measure")
    parser.add_argument("--no-speed", action="store_true", help="only check")
    parser.add_argument("--commit", help="what to record where the tree has no git history")
    options = parser.parse_args(arguments)
    begin, dry = time.monotonic(), options.dry_run
    if not dry and (not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)):
        print("paged_prefill: needs a Hopper GPU (H100, H200); --dry-run runs the same code on a CPU", file=sys.stderr)
        return 1
    if options.commit:
        os.environ["KASCADE_COMMIT"] = options.commit
    device = torch.device("cpu" if dry else "cuda")
    ops = get_backend("torch" if dry else "tilelang", device)
    small = (ragged.RaggedCase(torch.bfloat16, 2, 64, 16, ((33, 50), (1, 9), (0, 4)), padding=3),)
    cases = small if dry else ragged.CASES
    result: dict[str, Any] = {"schema": "kascade-paged-prefill/v1", **machine(device), "failures": [], "rows": []}
    result["shape"] = {"group": GROUP, "kv_heads": KV_HEADS, "head_dim": DIM, "tile": TILE, "ratio": RATIO}
    checks: list[dict[str, Any]] = []
    if not dry:
        result["failures"] += compile_all(() if options.no_checks else cases)
    if not options.no_checks:
        checks = check(ops, cases, str(device)) + ([] if dry else check_more(ops))
    result["checks"] = checks
    result["failures"] += [f"{row['op']} {row['case']} {row.get('note', '')}" for row in checks if not row["ok"]]
    if not options.no_speed:
        deadline = begin + 60 * options.minutes - 30
        result["rows"] = measure(ops, device, dry, deadline, 0.01 if dry else 0.15)
        wrong = [row for row in result["rows"] if not row.get("ok", True)]
        result["failures"] += [f"{row['size']} page {row['page']}: {row['largest_gap']}" for row in wrong]
    result["seconds"] = round(time.monotonic() - begin, 1)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{sum(row['ok'] for row in checks)} of {len(checks)} checks, {result['seconds']:.0f} s", flush=True)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
