"""The sequences of one forward pass: where rows begin and end, and how many keys each query may choose."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.kernels.reference import first_tile, tile_count
from kascade_cli.schema import Budget, Phase


class Lengths(NamedTuple):
    """int32 [B] each, on the device, as kernels.reference defines them: row b's keys are the slots
    [kv_start, kv_start + kv_len), its first query sits at slot query_start."""

    query_start: Tensor
    kv_start: Tensor
    kv_len: Tensor

    def to(self, device: torch.device) -> "Lengths":
        return self if self.kv_len.device == device else Lengths(*(tensor.to(device) for tensor in self))


@dataclass(eq=False)
class Batch:
    """Rows of one phase. An engine makes one per pass (two where it mixes prefill and decode); strategies read it.

    phase: what the engine says that the rows do; one query alone does not make a row a decode row.
    queries, slots: the widths T and S. plain: no row is padded and the queries are the last slots.
    pages: block table int32 [B, MP] of a paged cache; KascadeError in prefill, where only ragged rows are read from
    one (kernels.ragged). continues: the engine has proved that these are the last pass's sequences, one token longer.
    partition: which KV heads this process holds (None: all).
    """

    lengths: Lengths
    phase: Phase
    queries: int
    slots: int
    budget: Budget
    plain: bool = False
    pages: Tensor | None = None
    continues: bool = False
    partition: Any = None
    _moved: dict[torch.device, "Batch"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.pages is not None and self.phase == "prefill":
            raise KascadeError(
                "padded rows of prefill read no paged cache: gather its pages first, or see kernels.ragged"
            )

    @property
    def rows(self) -> int:
        return len(self.lengths.kv_len)

    @property
    def device(self) -> torch.device:
        return self.lengths.kv_len.device

    def on(self, device: torch.device) -> "Batch":
        """The same batch on another device (a model spread over several), moved once."""
        if device == self.device:
            return self
        if device not in self._moved:
            pages = None if self.pages is None else self.pages.to(device)
            self._moved[device] = replace(self, lengths=self.lengths.to(device), pages=pages, _moved={})
        return self._moved[device]

    @property
    def tile(self) -> int:
        return self.budget.tile

    @functools.cached_property
    def tiles(self) -> int:
        """How many local tiles the queries can touch."""
        # Without padding every row starts at a tile's edge or, in a chunk, wherever the cache ends.
        aligned = self.plain and (self.slots - self.queries) % self.tile == 0
        return tile_count(self.queries, self.tile, aligned=aligned)

    @functools.cached_property
    def before(self) -> Tensor:
        """Keys before each local tile, int32 [B, NT]; 0 for a tile past the row's end."""
        query_start, kv_start, kv_len = self.lengths
        first = first_tile(query_start, kv_start, self.tile)
        edge = (first[:, None] + torch.arange(self.tiles, dtype=torch.int32, device=first.device)) * self.tile
        return torch.where(edge < kv_len[:, None], edge, 0)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Keys to choose: int32 [B] in decode, [B, NT] in prefill (method: section 3, the budget rolls)."""
        return self.count(self.lengths.kv_len if self.phase == "decode" else self.before)

    def count(self, visible: Tensor) -> Tensor:
        """k(N) for a tensor of N, int32: `Budget.count` without leaving the device."""
        seen, ratio = visible.double(), self.budget.ratio
        if self.budget.ratios is not None:
            lengths, ratios = _table(self.budget, visible.device)
            ratio = ratios[torch.bucketize(seen, lengths, right=True)]
        wanted = torch.ceil(seen * ratio - 1e-6).clamp_min(self.budget.min_keys)
        return torch.minimum(wanted, seen).int()

    @functools.cached_property
    def width(self) -> int:
        """The widest choice possible with this many slots; depends on shapes only."""
        if self.phase == "prefill" and self.plain:
            return max(1, self.budget.most((self.slots - 1) // self.tile * self.tile, self.tile))
        return max(1, self.budget.most(self.slots))

    @functools.cached_property
    def inside(self) -> Tensor:
        """Which slots hold a key of the row: bool [B, S]."""
        _, kv_start, kv_len = self.lengths
        slot = torch.arange(self.slots, device=self.device)
        return (slot >= kv_start[:, None]) & (slot < (kv_start + kv_len)[:, None])

    @functools.cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Of each query: its index among the row's tokens, int64 [B, T], and whether it is one of them, bool."""
        query_start, kv_start, kv_len = self.lengths
        position = (query_start - kv_start)[:, None] + torch.arange(self.queries, device=self.device)
        return position, (position >= 0) & (position < kv_len[:, None])

    @functools.cached_property
    def visible(self) -> Tensor:
        """float64 scalar on the device: keys that all queries of a head see together."""
        if self.phase == "decode":
            return self.lengths.kv_len.sum().double()
        position, real = self.positions
        return ((position + 1) * real).sum().double()

    def read(self, counts: Tensor) -> Tensor:
        """float64 scalar: keys that they read who choose `counts` ([B], or [B, NT] with the own tile on top)."""
        if self.phase == "decode":
            return counts.sum().double()
        query_start, kv_start, _ = self.lengths
        position, real = self.positions
        local = position // self.tile - first_tile(query_start, kv_start, self.tile)[:, None]
        chosen = counts.gather(1, local.clamp(0, self.tiles - 1).long())
        return ((chosen + position % self.tile + 1) * real).sum().double()


@functools.cache
def _table(budget: Budget, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lengths float64 [n] and ratios [n + 1]: the first below the smallest length.

    Made once per device and never dropped: a copy from the host in every step would keep decoding out of CUDA graphs,
    and a graph may still read it.
    """
    lengths, ratios = zip(*budget.ratios.items(), strict=True)
    with torch.inference_mode(False):  # else later steps outside of it could not use them everywhere
        return (
            torch.tensor(lengths, dtype=torch.float64, device=device),
            torch.tensor((budget.ratio, *ratios), dtype=torch.float64, device=device),
        )
