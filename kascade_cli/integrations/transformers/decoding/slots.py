"""Keys, values and lengths of rows that decode together, in tensors that stay where they are (for CUDA graphs).

Every row ends at the same slot, so that one number says where the next key goes; rows are padded on the left. What a
step needs to know of lengths and positions is moved on by two additions on the device; no step makes a mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

_BUCKET = 256  # slots are made in multiples of it, so that one graph serves prompts of about one length


def bucket(slots: int) -> int:
    """The number of slots to make room for: multiples of 256, above 4k of a sixteenth of the next power of two."""
    step = max(_BUCKET, (1 << (slots - 1).bit_length()) // 16)
    return -(-slots // step) * step


class SlotLayer(StaticLayer):
    """A layer of a static cache that writes where `slot` says, which all layers share: two kernels a step."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.slot = keys, values, slot
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states [B, G, 1, D] go into `slot`; returns the whole cache."""
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Tensor:
        """On the device; the slot that comes next."""
        return self.slot[0]


class Slots:
    """Room for `slots` tokens of each of `rows` rows, shaped like the layers of a prefilled cache.

    token: int64 [B, 1], what the next step reads. positions: int64 [B, 1], its place in the row. mask: what the
    attention of kascade takes as one, int32 [B, 1, S, 3] (lengths.py). history: int64 [B, S], tokens by slot.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], rows: int, slots: int):
        device = layers[0][0].device
        # Not inference tensors, which a later step outside inference mode could not write to.
        with torch.inference_mode(False):
            # One addition moves query_start, kv_start and kv_len of all rows, another the slot and the positions.
            self.lengths = torch.zeros(3, rows, dtype=torch.int32, device=device)
            self._grow = torch.tensor([[1], [0], [1]], dtype=torch.int32, device=device)
            self._places = torch.zeros(1 + rows, dtype=torch.int64, device=device)
            self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self.history = torch.zeros(rows, slots, dtype=torch.int64, device=device)
            room = [
                # Zeros: attention may read, and then weigh with nothing, what no token has written.
                tuple(t.new_zeros(rows, t.shape[1], slots, t.shape[3]) for t in pair)
                for pair in layers
            ]
        self.rows, self.slots, self.first = rows, slots, 0
        self.slot, self.positions = self._places[:1], self._places[1:, None]
        # The columns of the mask are contiguous, so that taking them apart costs no kernel.
        self.mask = self.lengths.t()[:, None, None].expand(-1, -1, slots, -1)
        self.cache = Cache(layers=[SlotLayer(keys, values, self.slot) for keys, values in room])

    def fits(self, layers: Sequence[tuple[Tensor, Tensor]], rows: int, slots: int) -> bool:
        """Whether these are the tensors that such a cache needs."""
        return (self.rows, self.slots) == (rows, slots) and all(
            (mine.keys.shape[1], mine.keys.shape[3], mine.values.shape[3], mine.dtype, mine.device)
            == (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
            for mine, (keys, values) in zip(self.cache.layers, layers, strict=True)
        )

    @torch.no_grad()
    def load(self, layers: Sequence[tuple[Tensor, Tensor]], token: Tensor, lengths: Tensor | None = None) -> None:
        """Takes over a prefilled cache, keys and values [B, G, width, D] per layer, and the token after it, int64 [B].

        lengths: int [B], how many tokens each row holds; None: all of them, nothing is padded.
        """
        for mine, (keys, values) in zip(self.cache.layers, layers, strict=True):
            mine.keys[:, :, : keys.shape[2]].copy_(keys)
            mine.values[:, :, : values.shape[2]].copy_(values)
        self.token[:, 0].copy_(token)
        self.place(layers[0][0].shape[2], lengths)

    @torch.no_grad()
    def place(self, filled: int, lengths: Tensor | None = None) -> None:
        """The next step writes slot `filled`, and sees that many slots less their padding, and its own."""
        self.first = filled
        held = torch.full_like(self.lengths[2], filled) if lengths is None else lengths.to(self.lengths)
        self.lengths[0].fill_(filled)
        self.lengths[1].copy_(filled - held)
        self.lengths[2].copy_(held + 1)
        self._places[:1].fill_(filled)
        self._places[1:].copy_(held)

    def advance(self) -> None:
        """A step has run: everything moves on by one token."""
        self.lengths.add_(self._grow)
        self._places.add_(1)

    def state(self) -> list[Tensor]:
        """What changes from step to step, keys and values aside."""
        return [self.lengths, self._places, self.token]
