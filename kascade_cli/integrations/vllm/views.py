"""vLLM's blocks as the paged caches of the kernels, without a copy.

vLLM gives a backend [B, H, N, 2 D], each block in one piece, and never looks inside. Stored there as [2, N, H, D], K
and V are both contiguous [P, N, H, D]: the pages of V begin one page on, and block b is page `step * b` of both.
"""

import functools
from typing import NamedTuple

from torch import Tensor

from kascade_cli.errors import KascadeError


class Pages(NamedTuple):
    """key, value [P, page, G, D], contiguous, of one memory; step: pages from one block to the next."""

    key: Tensor
    value: Tensor
    step: int

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]


def pages_of(cache: Tensor) -> Pages:
    """cache [B, G, page, 2 D], a layer's. Raises KascadeError if a block is not one piece of memory.

    Views are made anew each time: one that is kept would hold memory that vLLM has given up.
    """
    shape, strides, one, step = _layout(tuple(cache.shape), cache.stride())
    begin = cache.storage_offset()
    return Pages(cache.as_strided(shape, strides, begin), cache.as_strided(shape, strides, begin + one), step)


@functools.lru_cache(16)
def _layout(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """(shape and strides of K and of V, elements of a page, pages of a block) of a cache of this size and stride."""
    blocks, heads, page, width = size
    dim = width // 2
    one = page * heads * dim
    inside = (page * width, width, 1)
    fits = all(count == 1 or a == b for count, a, b in zip(size[1:], stride[1:], inside, strict=True))
    between = stride[0] if blocks > 1 else 2 * one
    if width % 2 or not fits or between % one or between < 2 * one:
        raise KascadeError(
            f"the KV cache has shape {list(size)} and strides {list(stride)}: its blocks are not in "
            "one piece each, which this backend needs (unset VLLM_KV_CACHE_LAYOUT)"
        )
    step = between // one
    return ((blocks - 1) * step + 1, page, heads, dim), (one, heads * dim, dim, 1), one, step


def write(pages: Pages, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Puts key, value [N, G, D] at `slots` int64 [N]: block * page + place; one below 0 is padding.

    What pads goes to block 0, which vLLM keeps free for that.
    """
    count = len(slots)
    slots = slots.clamp_min(0)
    rows = slots + slots // pages.size * (pages.step - 1) * pages.size
    pages.key.flatten(0, 1).index_copy_(0, rows, key[:count])
    pages.value.flatten(0, 1).index_copy_(0, rows, value[:count])
