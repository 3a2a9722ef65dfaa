"""What one forward pass keeps: key sets until their last reader has run, and how many keys were read."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.sparse.batch import Batch

if TYPE_CHECKING:
    from kascade_cli.sparse.layer import Keys


class Pass:
    """Made anew for every pass, so that no pass can read what another one chose.

    last_readers: layer that keeps keys -> the last layer that reads them. memory: what the strategy carries from pass
    to pass (Strategy.memory), or None. notes: anything that the strategy wants to find again in this pass.
    """

    def __init__(self, batch: Batch, last_readers: dict[int, int], memory: Any = None) -> None:
        self.batch, self.memory = batch, memory
        self.keys: dict[int, Keys] = {}
        self.notes: dict[str, Any] = {}
        self._last_readers = last_readers
        self._dense = 0
        self._read: dict[int, tuple[Tensor, int]] = {}
        self._totals: list[Tensor] = []

    def keep(self, layer: int, keys: "Keys", groups: int, gather: bool = True) -> None:
        """What `layer` chose, for the layers that read it; nothing where no layer does.

        groups: KV heads of this process. With the heads spread over processes, the sets of all of them are gathered,
        as head maps may point across processes; not where the caller says that these do not (`gather`).
        """
        if layer not in self._last_readers:
            return
        if gather and self.batch.partition is not None and keys.indices.shape[1] == groups:
            keys = replace(keys, indices=self.batch.partition.gather(keys.indices, 1))
        self.keys[layer] = replace(keys, heads=None, logits=None)

    def kept(self, source: int, reader: int) -> "Keys":
        """What layer `source` keeps. Raises KascadeError if it has not run in this pass."""
        if source not in self.keys:
            raise KascadeError(f"layer {reader} reuses layer {source}, which has not run in this forward pass")
        return self.keys[source]

    def release(self, layer: int) -> None:
        """`layer` has run: drops what no later layer reads."""
        for source in [s for s in self.keys if self._last_readers.get(s, -1) <= layer]:
            del self.keys[source]

    # -- what was read --

    def read_all(self) -> None:
        """A layer attended to every visible key."""
        self._dense += 1

    def read(self, counts: Tensor) -> None:
        """A layer attended to `counts` chosen keys ([B] or [B, NT])."""
        tensor, layers = self._read.get(id(counts), (counts, 0))
        self._read[id(counts)] = tensor, layers + 1

    def read_total(self, keys: Tensor) -> None:
        """A layer attended to `keys` in all (scalar: summed over queries, per head)."""
        self._totals.append(keys)

    def totals(self) -> Tensor:
        """float64 [2] on the batch's device: keys read and keys visible, summed over queries and layers."""
        batch, layers = self.batch, self._dense + len(self._totals)
        read = batch.visible * self._dense
        for counts, times in self._read.values():
            # Counts that were made on another device are those of the same rows.
            read = read + batch.read(counts.to(batch.device)) * times
            layers += times
        for total in self._totals:
            read = read + total.to(batch.device)
        return torch.stack([read, batch.visible * layers])
