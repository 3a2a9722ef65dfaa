"""vLLM's blocks as the paged caches of the kernels, without a copy.

vLLM gives a backend [B, H, N, 2 D], each block in one piece, and never looks inside. Stored there as [2, N, H, D], K
and V are both contiguous [P, N, H, D]: the pages of V begin one page on, and block b is page `step * b` of both.
"""

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
    """cache [B, G, page, 2 D], a layer's. Raises KascadeError if a block is not one piece of memory."""
    blocks, heads, page, width = cache.shape
    dim = width // 2
    one = page * heads * dim
    inside = (page * width, width, 1)
    have = cache.stride()[1:]
    fits = all(size == 1 or a == b for size, a, b in zip(cache.shape[1:], have, inside, strict=True))
    between = cache.stride(0) if blocks > 1 else 2 * one
    if width % 2 or not fits or between % one or between < 2 * one:
        raise KascadeError(
            f"the KV cache has shape {list(cache.shape)} and strides {list(cache.stride())}: its blocks are not in "
            "one piece each, which this backend needs (unset VLLM_KV_CACHE_LAYOUT)"
        )
    step = between // one
    shape, strides = ((blocks - 1) * step + 1, page, heads, dim), (one, heads * dim, dim, 1)
    begin = cache.storage_offset()
    return Pages(cache.as_strided(shape, strides, begin), cache.as_strided(shape, strides, begin + one), step)


def write(pages: Pages, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Puts key, value [N, G, D] at `slots` int64 [N]: block * page + place; one below 0 is padding.

    What pads goes to block 0, which vLLM keeps free for that.
    """
    count = len(slots)
    slots = slots.clamp_min(0)
    rows = slots + slots // pages.size * (pages.step - 1) * pages.size
    pages.key.flatten(0, 1).index_copy_(0, rows, key[:count])
    pages.value.flatten(0, 1).index_copy_(0, rows, value[:count])
