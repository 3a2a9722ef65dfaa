"""vLLM's blocks as pages: every key and value is found where a loop over blocks puts it, and nothing is copied."""

import pytest
import torch

from kascade_cli.errors import KascadeError
from kascade_cli.integrations.vllm.views import pages_of, write
from kascade_cli.kernels.reference import decode_dense, gather_pages


def cache_of(blocks, heads, page, dim, room=0, offset=0):
    """As vLLM makes it; with `room` behind every block and `offset` before all (caches that layers share)."""
    between = heads * page * 2 * dim + room
    memory = torch.full((offset + blocks * between,), 99.0, dtype=torch.float64)
    shape, strides = (blocks, heads, page, 2 * dim), (between, page * 2 * dim, 2 * dim, 1)
    return memory.as_strided(shape, strides, offset)


CASES = [(7, 3, 16, 4, 0, 0), (1, 2, 32, 8, 0, 0), (5, 1, 16, 8, 0, 0), (6, 2, 16, 4, 128, 256), (4, 2, 8, 4, 192, 64)]


@pytest.mark.parametrize(("blocks", "heads", "page", "dim", "room", "offset"), CASES)
def test_what_is_written_is_found(blocks, heads, page, dim, room, offset):
    cache = cache_of(blocks, heads, page, dim, room, offset)
    pages = pages_of(cache)
    assert pages.key.is_contiguous()
    assert pages.value.is_contiguous()
    assert pages.key.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    generator = torch.Generator().manual_seed(0)
    count = min(11, blocks * page - 1)
    slots = torch.randperm(blocks * page - 1, generator=generator)[:count] + 1
    key, value = torch.rand(2, count + 3, heads, dim, generator=generator, dtype=torch.float64)
    write(pages, key, value, slots)
    for place, slot in enumerate(slots.tolist()):
        block, row = divmod(slot, page)
        inside = cache[block].as_strided((2, page, heads, dim), (page * heads * dim, heads * dim, dim, 1))
        assert torch.equal(inside[0, row], key[place])
        assert torch.equal(inside[1, row], value[place])
    # Nothing but the tokens given was touched: 2 D numbers for each, of each head.
    assert int((cache != 99).sum()) == 2 * count * heads * dim


def test_padding_goes_to_the_block_that_is_nobodys():
    cache = cache_of(4, 2, 8, 4)
    write(pages_of(cache), *torch.zeros(2, 3, 2, 4, dtype=torch.float64), torch.tensor([-1, 9, -1]))
    assert bool((cache[2:] == 99).all())
    assert int((cache[1] == 0).sum()) == 16


def test_decode_over_the_pages_is_decode_over_a_contiguous_cache():
    blocks, heads, page, dim, tokens = 9, 2, 8, 4, 43
    pages = pages_of(cache_of(blocks, heads, page, dim))
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, tokens, heads, dim, generator=generator, dtype=torch.float64)
    table = torch.tensor([[3, 1, 8, 5, 2, 7]], dtype=torch.int32)
    slots = torch.tensor([int(table[0, at // page]) * page + at % page for at in range(tokens)])
    write(pages, key, value, slots)
    assert torch.equal(gather_pages(pages.key, table * pages.step)[0, :, :tokens], key.transpose(0, 1))
    query = torch.randn(1, 6, dim, generator=generator, dtype=torch.float64)
    start, length = torch.zeros(1, dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    got, _ = decode_dense(
        query, pages.key, pages.value, start, length, scale=0.5, block_table=(table * pages.step).contiguous()
    )
    for head in range(6):
        weight = torch.softmax(key[:, head // 3] @ query[0, head] * 0.5, 0)
        torch.testing.assert_close(got[0, head], weight @ value[:, head // 3])


def test_blocks_in_pieces_are_refused():
    tokens_first = torch.zeros(5, 8, 2, 8).transpose(1, 2)
    with pytest.raises(KascadeError, match="not in one piece"):
        pages_of(tokens_first)
    with pytest.raises(KascadeError, match="not in one piece"):
        pages_of(cache_of(5, 2, 8, 4, room=8))  # pages would begin in the middle of one
