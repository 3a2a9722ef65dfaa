"""Where the paged prefill kernels see rows, blocks and tiles: the generated CUDA's own lines, run on the CPU.

Everything before a kernel's first load is plain integer C, but for one sum over a warp. It is cut out, compiled with
g++ and run for every CTA of random batches; brute force over the tokens says what must come out.
"""

import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("tilelang")

from kascade_cli.kernels.ragged import tile_room
from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("g++") is None, reason="needs nvcc and g++"
)
TILE, PAGE, BLOCK, KEYS = 32, 32, 256, 128
SPECS = {spec.name: spec for spec in prefill_specs(4, 128, "bfloat16", TILE, PAGE)}
# kernel -> (first line, what comes behind the last, CTAs, what is printed)
PARTS = {
    "lse_kernel": ("  row = 0;", "  if (512 <=", f"NQ / {BLOCK} + B + 1", "row q0 end token length last n"),
    "sparse_lse_kernel": ("  t = ((NT", "  hm = head_map", "NT", "t source edge q0 begin end behind"),
    "score_kernel": ("  t = (((", "  base = ", "(tiles + (first & 1) + 1) / 2", "t row edge q0 before second n"),
}
PROGRAM = """
#include <cstdio>
#include <cstdint>
#include <vector>
struct Index { int x, y, z; };
Index blockIdx, threadIdx;
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> auto max(A a, B b) { return a > b ? a : b; }
int main() {
  int B, NQ, NT, first, tiles, H = 32, G = 8;
  while (scanf("%d %d %d %d %d", &B, &NQ, &NT, &first, &tiles) == 5) {
    std::vector<int> loc(B + 1), query_start(B), kv_len(B);
    for (auto* list : {&loc, &query_start, &kv_len}) for (int& value : *list) scanf("%d", &value);
    for (int cta = 0; cta < CTAS; ++cta) {
      blockIdx = {cta, 0, 0};
      int t, h0, lo = 0, row = 0, source = 0, kv, q0 = 0, qb, hb, head = 0, token = 0, length = 0, last = 0, n = 0;
      int edge = 0, begin = 0, end = 0, behind = 0, before = 0, second = 0;
      LINES
      printf(FORMAT, VALUES);
    }
    puts("");
  }
}
"""


class Batch(NamedTuple):
    """Random rows: locations, query_start and kv_len; N tokens; which block of tiles is scored."""

    loc: list[int]
    starts: list[int]
    lengths: list[int]
    tokens: int
    first: int
    tiles: int

    def owner(self, token: int) -> int | None:
        """The row of a token that is a real query."""
        row = next((b for b in range(len(self.starts)) if self.loc[b] <= token < self.loc[b + 1]), None)
        return row if row is not None and self.position(token, row) < self.lengths[row] else None

    def position(self, token: int, row: int) -> int:
        return self.starts[row] + token - self.loc[row]


def draw(rng: random.Random) -> Batch:
    rows = rng.choice([1, 2, 3, 5, 33, 70])
    queries = [rng.choice([0, 1, rng.randint(0, 40), rng.randint(0, 500)]) for _ in range(rows)]
    starts = [rng.choice([0, rng.randint(0, 500)]) for _ in range(rows)]
    lengths = [a + b for a, b in zip(starts, queries, strict=True)]
    lengths = [rng.choice([0, max(0, n - 5)]) if rng.random() < 0.1 else n for n in lengths]
    loc = [0]
    for count in queries:
        loc.append(loc[-1] + count)
    tokens = loc[-1] + rng.choice([0, 1, rng.randint(0, 300)])
    first = rng.randint(0, tile_room(tokens, rows, TILE) - 1)
    return Batch(loc, starts, lengths, tokens, first, rng.randint(1, tile_room(tokens, rows, TILE) - first))


BATCHES = [draw(random.Random(seed)) for seed in range(60)]


def run(name: str, folder: Path) -> list[list[dict[str, int]]]:
    """What every CTA of a kernel finds, per batch."""
    begin, stop, ctas, values = PARTS[name]
    source = SPECS[name].kernel.report(**SPECS[name].config).source
    lines = source[source.index(begin) : source.index(stop, source.index(begin))]
    # The loop's body once for every lane, summed up: what a warp does at once.
    lines, count = re.subn(
        r"int (condval\w*);\s+if (.*?) \{\s+\1 = 1;.*?(\w+) = \(\3 \+ tl::warp_reduce_sum\(\1\)\);",
        r"for (int lane = 0; lane < 32; ++lane) { threadIdx.x = lane; if \2 ++\3; }",
        lines,
        flags=re.S,
    )
    assert count == 1
    names = values.split()
    text = PROGRAM.replace("CTAS", ctas).replace("LINES", lines).replace("VALUES", ", ".join(names))
    path = folder / f"{name}.cpp"
    path.write_text(text.replace("FORMAT", '"' + " ".join(["%d"] * len(names)) + '\\n"'))
    subprocess.run(["g++", "-std=c++17", "-w", "-o", str(path.with_suffix("")), str(path)], check=True)
    given = []
    for b in BATCHES:
        rows = len(b.starts)
        given += [rows, b.tokens, tile_room(b.tokens, rows, TILE), b.first, b.tiles, *b.loc, *b.starts, *b.lengths]
    out = subprocess.run(
        [str(path.with_suffix(""))], input=" ".join(map(str, given)), capture_output=True, text=True, check=True
    ).stdout
    batches = out.split("\n\n")[: len(BATCHES)]
    assert len(batches) == len(BATCHES)
    return [
        [dict(zip(names, map(int, line.split()), strict=True)) for line in batch.strip().splitlines()]
        for batch in batches
    ]


def test_blocks_of_queries(tmp_path):
    for batch, ctas in zip(BATCHES, run("lse_kernel", tmp_path), strict=True):
        written = [0] * batch.tokens
        for at in ctas:
            for token in range(at["q0"], min(at["q0"] + BLOCK, at["end"])):
                position, row = at["token"] + token - at["q0"], batch.owner(token)
                written[token] += 1
                assert (position < at["length"]) == (row is not None)
                if row is not None:
                    assert (row, batch.position(token, row)) == (at["row"], position)
                    # Blocks up to the query's own, and none that the row does not have.
                    assert position < at["n"] * KEYS < batch.lengths[row] + KEYS
                    assert at["last"] == (batch.lengths[row] - 1) // PAGE
        assert set(written) <= {1}


def test_tiles(tmp_path):
    for batch, ctas in zip(BATCHES, run("sparse_lse_kernel", tmp_path), strict=True):
        written = [0] * batch.tokens
        for at in ctas:
            for i in range(TILE):
                token = at["q0"] + i
                if at["begin"] <= token < at["end"]:
                    written[token] += 1
                    assert batch.owner(token) == at["source"]
                    assert batch.position(token, at["source"]) == at["edge"] + i
                elif max(at["begin"], at["end"]) <= token < at["behind"]:  # padding
                    written[token] += 1
                    assert batch.owner(token) is None
            assert at["edge"] % TILE == 0
            # Otherwise it would load queries and keys that may not exist.
            if not any(at["begin"] <= at["q0"] + i < at["end"] for i in range(TILE)):
                assert at["q0"] >= at["end"]
        assert set(written) <= {1}
        assert sorted(at["t"] for at in ctas) == list(range(tile_room(batch.tokens, len(batch.starts), TILE)))


def test_pairs_of_tiles(tmp_path):
    """Scores: what lies before each tile that some query is in, whichever tile the block begins with."""
    tiles = [
        {at["t"]: (at["source"], at["edge"]) for at in ctas if at["begin"] <= max(at["q0"], at["begin"]) < at["end"]}
        for ctas in run("sparse_lse_kernel", tmp_path)
    ]
    for batch, ctas, known in zip(BATCHES, run("score_kernel", tmp_path), tiles, strict=True):
        scored = {}
        for at in ctas:
            for i, before in enumerate((at["before"], at["second"])):
                number = batch.first + at["t"] + i
                row, edge = known.get(number, (None, 0))
                if batch.first <= number < batch.first + batch.tiles:
                    scored[number] = before
                    assert before == edge <= at["n"] * 2 * KEYS
                    assert row in (None, at["row"])
                else:
                    assert not before
        assert sorted(scored) == list(range(batch.first, batch.first + batch.tiles))
