"""What the prefill ops share: argument checks of one line each, and q, k, v as the kernels read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError
from kascade_cli.kernels.contract import HEAD_DIMS, MAX_GROUP, TILES, Unsupported
from kascade_cli.kernels.tilelang import arguments
from kascade_cli.kernels.tilelang.arguments import DTYPES


@dataclass(frozen=True)
class PrefillShape:
    """Sizes of a checked call; `group` is the query heads of a KV head, `dtype` the kernels' name of q's."""

    batch: int
    heads: int
    queries: int
    head_dim: int
    kv_heads: int
    slots: int
    group: int
    dtype: str


def check(
    op: str, q: Tensor, k: Tensor, v: Tensor | None, lengths: tuple[Tensor, Tensor, Tensor], tile: int | None = None
) -> PrefillShape:
    """Sizes of the call. lengths: query_start, kv_start, kv_len.

    Raises KascadeError, with one line, where the arguments contradict each other, and Unsupported where they make
    sense but the kernels do not take them.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None and tensor.dim() != 4:
            raise KascadeError(f"{op}: {name} must be [batch, heads, length, head_dim], not {list(tensor.shape)}")
    batch, heads, queries, head_dim = q.shape
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
    return PrefillShape(batch, heads, queries, head_dim, kv_heads, slots, heads // kv_heads, DTYPES[q.dtype])


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
    """(indices, counts) of a selection that fits the call, at least one entry wide; KascadeError where it does not."""
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
