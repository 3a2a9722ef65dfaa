"""Operations and bytes that each op must do and move: what achieved rates are computed from.

A multiply-add counts as two operations. Bytes are the fewest that an op can move (inputs once, outputs once); q and
the output of a decode step are left out (they are thousands of times smaller than K and V).
"""

from dataclasses import dataclass

from kascade_cli.schema import Budget


@dataclass(frozen=True)
class Work:
    """`flops` operations, `bytes` of memory traffic, and which of the two binds (`memory` or `compute`)."""

    flops: float
    bytes: float
    bound: str

    def rates(self, ms: float) -> dict[str, float | None]:
        """`gb_s` for a memory-bound op, `tflop_s` for a compute-bound one."""
        memory = self.bound == "memory"
        return {
            "gb_s": self.bytes / ms / 1e6 if memory else None,
            "tflop_s": None if memory else self.flops / ms / 1e9,
        }


@dataclass(frozen=True)
class Workload:
    """Sizes of one measurement: batch, context (keys; in prefill also queries), heads, head size, element bytes."""

    phase: str
    batch: int
    context: int
    query_heads: int
    kv_heads: int
    head_dim: int
    element: int
    budget: Budget

    @property
    def kv_bytes(self) -> int:
        """K and V."""
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim * self.element

    @property
    def selected(self) -> int:
        """Keys chosen for the last query."""
        return self.budget.count(self.context)

    def befores(self) -> list[int]:
        """Keys before each tile."""
        return list(range(0, self.context, self.budget.tile))

    def diagonal(self) -> int:
        """(query, key) pairs inside the diagonal tiles."""
        tile = self.budget.tile
        whole, rest = divmod(self.context, tile)
        return whole * tile * (tile + 1) // 2 + rest * (rest + 1) // 2

    def _queries(self, before: int) -> int:
        return min(self.budget.tile, self.context - before)

    def dense_pairs(self) -> int:
        """(query, key) pairs of causal attention over the whole context."""
        return self.context * (self.context + 1) // 2

    def before_pairs(self) -> int:
        """(query, key) pairs strictly before the query's tile."""
        return sum(before * self._queries(before) for before in self.befores())

    def sparse_pairs(self) -> int:
        """(query, key) pairs that sparse prefill computes: the rolling budget and the diagonal tile."""
        chosen = sum(self.budget.count(before) * self._queries(before) for before in self.befores())
        return chosen + self.diagonal()


def work_of(op: str, case: Workload, *, tiles: tuple[int, int] | None = None) -> Work:
    """Work of one call of `op`. tiles: for `select_topk` in prefill, the tiles [first, last) of the call."""
    batch, groups, element = case.batch, case.kv_heads, case.element
    pair = 2 * case.batch * case.query_heads * case.head_dim  # operations of one GEMM per (query, key) pair
    cache = case.kv_bytes
    io = 2 * batch * case.query_heads * case.context * case.head_dim * element  # q and the output in prefill
    if op == "decode_dense":
        return Work(2 * pair * case.context, cache, "memory")
    if op == "decode_score":
        return Work(pair * case.context, cache / 2 + 4 * batch * groups * case.context, "memory")
    if op == "decode_sparse":
        share = case.selected / case.context
        return Work(2 * pair * case.selected, cache * share + 4 * batch * groups * case.selected, "memory")
    if op == "decode_sparse+logits":  # V and the indices; the logits are a few bytes a key
        share = case.selected / case.context / 2
        return Work(pair * case.selected, cache * share + 4 * batch * groups * case.selected, "memory")
    if op == "select_topk":
        if case.phase == "decode":
            return Work(0, 4 * batch * groups * (case.context + case.selected), "memory")
        befores = case.befores()[slice(*(tiles or (0, None)))]
        return Work(0, 4 * batch * groups * sum(b + case.budget.count(b) for b in befores), "memory")
    if op == "prefill_dense":
        return Work(2 * pair * case.dense_pairs(), cache + io, "compute")
    if op == "prefill_score":
        moved = cache / 2 + io / 2 + 4 * batch * groups * sum(case.befores())
        return Work(pair * case.before_pairs(), moved, "compute")
    if op == "prefill_sparse":
        indices = 4 * batch * groups * sum(case.budget.count(before) for before in case.befores())
        return Work(2 * pair * case.sparse_pairs(), cache + io + indices, "compute")
    raise ValueError(f"no op is called {op}")
