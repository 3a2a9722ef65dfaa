"""What the prefill ops share: argument checks of one line each, and their tensors as the kernels read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.kernels.contract import HEAD_DIMS, MAX_GROUP, TILES, Unsupported
from kascade_cli.kernels.ragged import check_ragged, check_tiles, is_ragged
from kascade_cli.kernels.tilelang import arguments
from kascade_cli.kernels.tilelang.arguments import DTYPES

PAGES = (16, 32, 64, 128, 256)  # page sizes that are built


@dataclass(frozen=True)
class PrefillShape:
    """Sizes of a checked call; `group` is the query heads of a KV head, `dtype` the kernels' name of q's.

    Ragged queries are one row of a batch of 1 to the kernels; `rows` counts those of the lengths. page: 0 contiguous.
    """

    batch: int
    heads: int
    queries: int
    head_dim: int
    kv_heads: int
    slots: int
    group: int
    dtype: str
    rows: int
    page: int = 0

    def config(self) -> dict[str, int | str]:
        """What every kernel is compiled for; others of these sizes do not matter to some."""
        paged = {"page": self.page} if self.page else {}
        return {"dtype": self.dtype, "head_dim": self.head_dim} | paged


@dataclass(frozen=True)
class Views:
    """Tensors as the kernels read them: q [B, T, H, D], the caches, table and locations (of no use where there are no
    pages), and query_start, kv_start, kv_len."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    where: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: tuple[Tensor, Tensor, Tensor],
    tile: int | None = None,
    block_table: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> PrefillShape:
    """Sizes of the call. lengths: query_start, kv_start, kv_len.

    Raises KascadeError, with one line, where the arguments contradict each other, and Unsupported where they make
    sense but the kernels do not take them.
    """
    page = 0
    if is_ragged(op, block_table, query_start_loc):
        check_ragged(op, q, k, v, lengths, block_table, query_start_loc)
        (queries, heads, head_dim), (page, kv_heads) = q.shape, k.shape[1:3]
        batch, rows, slots = 1, len(block_table), block_table.shape[1] * page
        _check_pages(op, k, v)
    else:
        _check_padded(op, q, k, v, lengths)
        batch, heads, queries, head_dim = q.shape
        rows, (kv_heads, slots) = batch, k.shape[1:3]
    if not 1 <= heads // kv_heads <= MAX_GROUP:
        raise Unsupported(f"{op}: {heads // kv_heads} query heads per KV head; the kernels take 1 to {MAX_GROUP}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or (v is not None and v.dtype != q.dtype):
        names = ", ".join(_name(t.dtype) for t in (q, k, v) if t is not None)
        raise Unsupported(f"{op}: q, k and v are {names}; the kernels take all bfloat16 or all float16")
    if head_dim not in HEAD_DIMS:
        raise Unsupported(
            f"{op}: head size {head_dim} is not built; the kernels take {' and '.join(map(str, HEAD_DIMS))}"
        )
    if tile is not None and tile not in TILES:
        raise Unsupported(f"{op}: tile {tile} is not built; the kernels take {', '.join(map(str, TILES))}")
    group, dtype = heads // kv_heads, DTYPES[q.dtype]
    return PrefillShape(batch, heads, queries, head_dim, kv_heads, slots, group, dtype, rows, page)


def _check_padded(op: str, q: Tensor, k: Tensor, v: Tensor | None, lengths: tuple[Tensor, Tensor, Tensor]) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None and tensor.dim() != 4:
            raise KascadeError(f"{op}: {name} must be [batch, heads, length, head_dim], not {list(tensor.shape)}")
    batch, heads, _, head_dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    if k.shape != (batch, kv_heads, slots, head_dim) or (v is not None and v.shape != k.shape):
        found = f"{list(k.shape)}" + ("" if v is None else f" and {list(v.shape)}")
        raise KascadeError(
            f"{op}: k and v must be [{batch}, kv_heads, slots, {head_dim}] to fit q {list(q.shape)}, not {found}"
        )
    if any(t is not None and t.device != q.device for t in (k, v)):
        raise KascadeError(f"{op}: q, k and v must be on one device")
    for name, tensor in zip(("query_start", "kv_start", "kv_len"), lengths, strict=True):
        require(op, name, tensor, (batch,), q.device)
    if kv_heads == 0 or slots == 0 or heads % kv_heads:
        raise KascadeError(f"{op}: {heads} query heads cannot share {kv_heads} KV heads of {slots} slots")


def _check_pages(op: str, k: Tensor, v: Tensor | None) -> None:
    """Unsupported for pages that would have to be copied, and for sizes that are not built."""
    page = k.shape[1]
    if page not in PAGES:
        raise Unsupported(f"{op}: page size {page} is not built; the kernels take {', '.join(map(str, PAGES))}")
    for name, cache in (("k", k), ("v", v)):
        if cache is not None and not (cache.is_contiguous() and cache.data_ptr() % 16 == 0):
            raise Unsupported(
                f"{op}: paged {name} must be contiguous [P, page, G, D] from a 16-byte boundary on; its strides are "
                f"{cache.stride()}"
            )


def require(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32
) -> None:
    """KascadeError unless `tensor` has this shape, dtype and device."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
        raise KascadeError(f"{op}: {name} must be {_name(dtype)} {list(shape)} on {device}, not {found}")


def check_selection(
    op: str, shape: PrefillShape, tile: int, indices: Tensor, counts: Tensor, head_map: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(indices, counts) of a selection that fits the call, at least one entry wide; KascadeError where it does not.

    Those of ragged rows get the batch of 1 that the kernels want.
    """
    if shape.page:
        check_tiles(op, shape.queries, shape.rows, tile, indices, counts)
        indices, counts = indices[None], counts[None]
    if indices.dim() != 4 or indices.shape[0] != shape.batch or indices.shape[1] == 0:
        raise KascadeError(f"{op}: indices must be [{shape.batch}, kv_heads, tiles, keys], not {list(indices.shape)}")
    sources, tiles, width = indices.shape[1:]
    if tiles * tile < shape.queries:
        raise KascadeError(f"{op}: indices for {tiles} tiles of {tile} do not cover {shape.queries} queries")
    require(op, "indices", indices, (shape.batch, sources, tiles, width), device)
    require(op, "counts", counts, (shape.batch, tiles), device)
    require(op, "head_map", head_map, (shape.kv_heads,), device)
    if width == 0:  # the kernels read one entry ahead of every count
        return torch.zeros_like(indices.new_empty(*indices.shape[:3], 1)), torch.zeros_like(counts)
    return indices, counts


def views(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: tuple[Tensor, Tensor, Tensor],
    block_table: Tensor | None,
    query_start_loc: Tensor | None,
) -> Views:
    """What a checked call gives to its kernel."""
    lengths = tuple(x.contiguous() for x in lengths)
    if block_table is None:
        table, loc = lengths[2].view(1, -1), lengths[2]  # the kernel has no such arguments
        return Views(queries_view(q), cache_view(k), None if v is None else cache_view(v), (table, loc, *lengths))
    where = (block_table.contiguous(), query_start_loc.contiguous(), *lengths)
    return Views(tokens_view(q), k, v, where)


def tokens_view(q: Tensor) -> Tensor:
    """q [N, H, D] as contiguous [1, N, H' >= H, D]: no copy where tokens are strided by whole heads, as in a view of a
    projection to q, k and v."""
    tokens, heads, dim = q.shape
    step = q.stride(0)
    wide = q.stride()[1:] == (dim, 1) and step % dim == 0 and step >= heads * dim
    room = q.untyped_storage().nbytes() // q.element_size() - q.storage_offset()
    if wide and tokens * step <= room and q.data_ptr() % 16 == 0:
        return q.as_strided((1, tokens, step // dim, dim), (tokens * step, step, dim, 1))
    return aligned(q.contiguous())[None]


def queries_view(q: Tensor) -> Tensor:
    """q [B, H, T, D] as contiguous [B, T, H, D]; no copy when that is how it lies in memory."""
    return aligned(q.transpose(1, 2).contiguous())


def cache_view(cache: Tensor) -> Tensor:
    """[B, G, S, D], contiguous: without a copy also for the front of a longer cache (lengths bound what is read)."""
    try:
        return aligned(arguments.cache_view(cache, "cache"))
    except Unsupported:
        return aligned(cache.contiguous())


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not begin on the 16 bytes that TMA and cp.async need."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def allocate(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, advice: str) -> Tensor:
    """torch.empty, or KascadeError that says how much memory is missing and what lowers it."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        need = torch.Size(shape).numel() * dtype.itemsize / 2**30
        raise KascadeError(f"{op}: {need:.1f} GiB of GPU memory are not free for {list(shape)}; {advice}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
