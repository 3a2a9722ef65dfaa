"""The rows of one step, phase by phase: which tokens are whose, and what a strategy is told of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kascade_cli.integrations.vllm.views import Pages
from kascade_cli.kernels import Backend
from kascade_cli.partition import Partition
from kascade_cli.schema import Budget
from kascade_cli.sparse import Batch, Layer, Lengths, Pass


@dataclass
class DecodeRows:
    """Every token a row of its own: decode steps, and the drafts of speculative decoding behind one.

    tokens: which of the step's, a slice or int64 [B]. lengths: int32 [B], keys that each sees. table: int32 [B, MB],
    vLLM's blocks. blocks: how many blocks the longest row needs; None where a CUDA graph must take any length.
    """

    tokens: slice | Tensor
    lengths: Tensor
    table: Tensor
    blocks: int | None
    state: Pass | None = field(default=None, repr=False)

    def batch(self, cache: Pages, budget: Budget, partition: Partition | None) -> Batch:
        table = self.table if self.blocks is None else self.table[:, : self.blocks]
        table = (table * cache.step).contiguous()  # persists in a graph's own memory, as all that is made here
        zero = torch.zeros_like(self.lengths)
        lengths = Lengths(self.lengths - 1, zero, self.lengths)
        slots = table.shape[1] * cache.size
        return Batch(lengths, "decode", 1, slots, budget, pages=table, partition=partition)

    def layer(self, index: int, query: Tensor, cache: Pages, scale: float, ops: Backend) -> Layer:
        """query [N, H, D], all of the step's."""
        return Layer(index, query[self.tokens][:, :, None], cache.key, cache.value, scale, self.state, ops)

    def put(self, output: Tensor, out: Tensor) -> None:
        """out [B, H, 1, D] to its places in output [N, H, D]."""
        output[self.tokens] = out[:, :, 0]


@dataclass
class PrefillChunk:
    """One request's next tokens of its prompt, `count` of them from token `first` of the step on; `end` keys in all.

    table: int32 [1, MB], vLLM's blocks. Its pages are gathered for every layer: for strategies whose prefill looks at
    the keys themselves (ragged.py is for the others).
    """

    first: int
    count: int
    end: int
    table: Tensor
    state: Pass | None = field(default=None, repr=False)

    def batch(self, cache: Pages, budget: Budget, partition: Partition | None) -> Batch:
        start, zero, end = (
            torch.full((1,), value, dtype=torch.int32, device=self.table.device)
            for value in (self.end - self.count, 0, self.end)
        )
        return Batch(
            Lengths(start, zero, end), "prefill", self.count, self.end, budget, plain=True, partition=partition
        )

    def layer(self, index: int, query: Tensor, cache: Pages, scale: float, ops: Backend) -> Layer:
        """query [N, H, D], all of the step's."""
        pages = self.table[:, : -(-self.end // cache.size)] * cache.step
        key, value = (_gather(part, pages[0])[:, :, : self.end] for part in (cache.key, cache.value))
        here = query[self.first : self.first + self.count].transpose(0, 1)[None]
        return Layer(index, here, key, value, scale, self.state, ops)

    def put(self, output: Tensor, out: Tensor) -> None:
        """out [1, H, T, D] to its place in output [N, H, D]."""
        output[self.first : self.first + self.count] = out[0].transpose(0, 1)


def _gather(cache: Tensor, pages: Tensor) -> Tensor:
    """cache [P, page, G, D] at pages int32 [MP] as contiguous [1, G, MP * page, D], in one copy."""
    return cache.permute(2, 0, 1, 3).index_select(1, pages).flatten(1, 2)[None]
