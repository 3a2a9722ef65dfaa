"""Prefill of all requests of a step at once, over vLLM's blocks: nothing is padded, no cache is gathered.

Strategies know batches of rows, [B, H, T, D]. Here they see one row that holds all queries, [1, H, N, D], and all
requests' tiles in the order of `kernels.ragged`; the ops behind it are told where each one's queries and keys are.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kascade_cli.integrations.vllm.views import Pages
from kascade_cli.kernels import Backend
from kascade_cli.kernels.ragged import ragged_tiles, tile_base, tile_room
from kascade_cli.partition import Partition
from kascade_cli.schema import Budget
from kascade_cli.sparse import Batch, Layer, Lengths, Pass, Strategy
from kascade_cli.sparse.strategies.dense import Dense
from kascade_cli.sparse.strategies.kascade import Kascade
from kascade_cli.sparse.strategies.omnikv import SharedSelection
from kascade_cli.sparse.strategies.oracle import Oracle
from kascade_cli.sparse.strategies.quest import Quest
from kascade_cli.sparse.strategies.streaming_llm import StreamingLLM


def through_ops(strategy: Strategy) -> bool:
    """Whether its prefill reads keys through the ops of a layer alone. Others look at the keys themselves."""
    if isinstance(strategy, Oracle):
        return strategy.pool == "probabilities"
    return isinstance(strategy, Dense | Kascade | SharedSelection | Quest | StreamingLLM)


@dataclass(eq=False)
class Rows(Batch):
    """Prefill rows as a strategy sees them. starts: int32 [B + 1], where each row's queries begin among all.

    `lengths` are those of the one row; real: those of the rows, int32 [B] each.
    """

    starts: Tensor = field(kw_only=True)
    real: Lengths = field(kw_only=True)

    @functools.cached_property
    def tiles(self) -> int:
        return tile_room(self.queries, len(self.real.kv_len), self.tile)

    @functools.cached_property
    def before(self) -> Tensor:
        """Keys before each tile, int32 [1, NT]; 0 for tiles that are nobody's."""
        query_start, _, kv_len = self.real
        return ragged_tiles(self.starts, query_start, kv_len, self.tile, self.queries)[1][None]

    @functools.cached_property
    def owners(self) -> Tensor:
        """The row of each query, int64 [N]."""
        token = torch.arange(self.queries, dtype=torch.int32, device=self.device)
        return torch.searchsorted(self.starts[1:], token, right=True)

    @functools.cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        owner, token = self.owners, torch.arange(self.queries, device=self.device)
        position = self.real.query_start[owner] + token - self.starts[owner]
        return position[None].long(), torch.ones_like(position[None], dtype=torch.bool)

    def read(self, counts: Tensor) -> Tensor:
        """counts int32 [1, NT]."""
        position = self.positions[0][0]
        first = self.real.query_start // self.tile - tile_base(self.starts, self.tile)[:-1]
        number = position // self.tile - first[self.owners]
        return (counts[0][number] + position % self.tile + 1).sum().double()


class RowOps:
    """The ops of a layer over the rows of one part and one layer's pages, under the names and shapes of one row."""

    fused = True  # dense attention goes through them too

    def __init__(self, ops: Backend, batch: Rows, table: Tensor, cache: Pages) -> None:
        self.ops, self.batch, self.cache = ops, batch, cache
        self.where = {"block_table": table, "query_start_loc": batch.starts}
        self.select_topk = ops.select_topk

    def prefill_dense(
        self, query: Tensor, key: Tensor, value: Tensor | None, *_: Tensor, scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        if value is None and not self.ops.fused:
            return None, None  # the reference's scores are more exact without
        values = None if value is None else self.cache.value
        out, norm = self.ops.prefill_dense(
            _tokens(query), self.cache.key, values, *self.batch.real, scale=scale, **self.where
        )
        return None if out is None else _row(out), norm[None] if self.ops.fused else None

    def prefill_score(self, query: Tensor, key: Tensor, lse: Tensor | None, *_: Tensor, **more: Any) -> Tensor:
        norm = None if lse is None else lse[0]
        return self.ops.prefill_score(_tokens(query), self.cache.key, norm, *self.batch.real, **more, **self.where)[
            None
        ]

    def prefill_sparse(
        self, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, heads: Tensor, *_: Tensor,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        out = self.ops.prefill_sparse(
            _tokens(query), self.cache.key, self.cache.value, indices[0], counts[0], heads, *self.batch.real,
            **more, **self.where,
        )  # fmt: skip
        return _row(out)

    def prefill_sparse_lse(
        self, query: Tensor, key: Tensor, indices: Tensor, counts: Tensor, heads: Tensor, *_: Tensor, **more: Any
    ) -> Tensor:
        return self.ops.prefill_sparse_lse(
            _tokens(query), self.cache.key, indices[0], counts[0], heads, *self.batch.real, **more, **self.where
        )[None]


def _tokens(query: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D]."""
    return query[0].transpose(0, 1)


def _row(out: Tensor) -> Tensor:
    """[N, H, D] -> [1, H, N, D]."""
    return out.transpose(0, 1)[None]


@dataclass
class PrefillRows:
    """Requests that stand behind each other in a step, with the next tokens of their prompts.

    tokens: where in the step. starts: int32 [B + 1], from 0. ends: int32 [B], keys of each. table: int32 [B, MB], as
    many of vLLM's blocks as the longest needs.
    """

    tokens: slice
    starts: Tensor
    ends: Tensor
    table: Tensor
    state: Pass | None = field(default=None, repr=False)

    def batch(self, cache: Pages, budget: Budget, partition: Partition | None) -> Rows:
        self.pages = (self.table * cache.step).contiguous()
        zero = torch.zeros_like(self.ends)
        one = Lengths(zero[:1], zero[:1], self.ends[:1])
        return Rows(
            one, "prefill", self.tokens.stop - self.tokens.start, self.table.shape[1] * cache.size, budget,
            partition=partition, starts=self.starts, real=Lengths(self.ends - self.starts.diff(), zero, self.ends),
        )  # fmt: skip

    def layer(self, index: int, query: Tensor, cache: Pages, scale: float, ops: Backend) -> Layer:
        """query [N, H, D], all of the step's."""
        here = query[self.tokens].transpose(0, 1)[None]
        # A layer counts its heads in these; what it reads are the pages.
        key, value = (part.transpose(1, 2) for part in (cache.key, cache.value))
        mine = RowOps(ops, self.state.batch, self.pages, cache)
        return Layer(index, here, key, value, scale, self.state, mine)

    def put(self, output: Tensor, out: Tensor) -> None:
        """out [1, H, N, D] to its place in output [N, H, D]."""
        output[self.tokens] = out[0].transpose(0, 1)
