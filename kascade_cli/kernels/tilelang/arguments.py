"""What every decode op checks and derives before it launches: shapes, dtypes, layouts and splits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kascade_cli.kernels.contract import HEAD_DIMS, MAX_GROUP, Unsupported

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Decode:
    """A checked decode call: `grouped` is q as [B, G, R, D]; k and v as the kernel reads them; `slots` the width S."""

    grouped: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    slots: int
    page: int
    dtype: str

    @property
    def rows(self) -> int:
        return self.batch * self.kv_heads

    def config(self) -> dict[str, int | str]:
        """What the kernels are compiled for."""
        return {"group": self.group, "head_dim": self.head_dim, "dtype": self.dtype, "page": self.page}


def check_decode(q: Tensor, k: Tensor, v: Tensor | None, block_table: Tensor | None, **ints: Tensor) -> Decode:
    """Checks a decode call and describes it; `ints` are the int32 tensors by name.

    Raises Unsupported, with one line, for a shape, dtype or layout that these kernels do not take.
    """
    v = k if v is None else v
    for name, tensor, dims in (("q", q, 3), ("k", k, 4), ("v", v, 4)):
        if tensor.dim() != dims:
            raise Unsupported(
                f"{name} has {tensor.dim()} dimensions and needs {dims}: [B, H, D] for q, [B, G, S, D] for k, v"
            )
        if tensor.dtype not in DTYPES:
            raise Unsupported(f"{name} is {_name(tensor)}; the kernels take bfloat16 and float16")
        if tensor.dtype != q.dtype:
            raise Unsupported(f"q is {_name(q)} and {name} is {_name(tensor)}: use one dtype")
        if tensor.device != q.device:
            raise Unsupported(f"q is on {q.device} and {name} on {tensor.device}: move them to one device")
    batch, heads, head_dim = q.shape
    kv_heads = k.shape[1] if block_table is None else k.shape[2]
    if k.shape != v.shape:
        raise Unsupported(f"k has shape {list(k.shape)} and v {list(v.shape)}: they must agree")
    if head_dim != k.shape[-1]:
        raise Unsupported(f"q has head size {head_dim} and k {k.shape[-1]}: they must agree")
    if head_dim not in HEAD_DIMS:
        raise Unsupported(f"head size {head_dim} is not built; the kernels take {' and '.join(map(str, HEAD_DIMS))}")
    if kv_heads == 0 or heads % kv_heads or not 1 <= heads // kv_heads <= MAX_GROUP:
        raise Unsupported(
            f"{heads} query heads over {kv_heads} KV heads: the kernels take whole groups of 1 to {MAX_GROUP}"
        )
    page = 0
    if block_table is None:
        if k.shape[0] != batch:
            raise Unsupported(f"q has batch {batch} and k {k.shape[0]}: they must agree")
        table = torch.empty((batch, 1), dtype=torch.int32, device=q.device)
        slots = k.shape[2]
        k, v = cache_view(k, "k"), cache_view(v, "v")
    else:
        page, table = k.shape[1], block_table
        if page < 16 or page > 256 or page & (page - 1):
            raise Unsupported(f"page size {page} is not built; the kernels take powers of two from 16 to 256")
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise Unsupported(f"block_table has shape {list(block_table.shape)} and needs [{batch}, pages]")
        ints = {**ints, "block_table": block_table}
        slots = block_table.shape[1] * page
        for name, tensor in (("k", k), ("v", v)):
            if not tensor.is_contiguous():
                raise Unsupported(
                    f"paged {name} must be contiguous [P, page, G, D]; its strides are {tensor.stride()}"
                )
    for name, tensor in ints.items():
        if tensor.dtype != torch.int32:
            raise Unsupported(f"{name} is {_name(tensor)} and must be int32")
        if tensor.device != q.device:
            raise Unsupported(f"{name} is on {tensor.device} and q on {q.device}: move them to one device")
        if not tensor.is_contiguous():
            raise Unsupported(f"{name} must be contiguous; its strides are {tensor.stride()}")
    for name in ("kv_start", "kv_len", "counts"):
        if name in ints and tuple(ints[name].shape) != (batch,):
            raise Unsupported(f"{name} has shape {list(ints[name].shape)} and needs [{batch}]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.data_ptr() % 16:
            raise Unsupported(f"{name} must start on a 16-byte boundary")
    grouped = q.contiguous().view(batch, kv_heads, heads // kv_heads, head_dim)
    return Decode(grouped, k, v, table, batch, kv_heads, heads // kv_heads, head_dim, slots, page, DTYPES[q.dtype])


def cache_view(cache: Tensor, name: str) -> Tensor:
    """[B, G, S, D] as a contiguous tensor without a copy: a slice of a static cache gives the whole allocation back.

    Slot numbers keep their meaning: the view starts where the slice starts.
    """
    if cache.is_contiguous():
        return cache
    batch, groups, slots, dim = cache.shape
    whole = cache.stride(1) // dim if groups > 1 else (cache.stride(0) // dim if batch > 1 else slots)
    expected = (groups * whole * dim, whole * dim, dim, 1)
    fits = all(
        size == 1 or have == want for size, have, want in zip(cache.shape, cache.stride(), expected, strict=True)
    )
    room = cache.untyped_storage().nbytes() // cache.element_size() - cache.storage_offset()
    if fits and whole >= slots and batch * groups * whole * dim <= room:
        return cache.as_strided((batch, groups, whole, dim), expected)
    raise Unsupported(
        f"{name} must be [B, G, S, D] with [S, D] contiguous, or the first slots of such a cache; its strides are "
        f"{cache.stride()}: call .contiguous()"
    )


@functools.cache
def even_split_count(rows: int, blocks: int, sms: int, *, most: int = 64) -> int:
    """How many CTAs share a row whose keys are read in order: the most that fit two to an SM, a power of two.

    On an H200 powers of two were up to 20 % faster than their neighbours, and one CTA per SM was faster only as long
    as nothing else ran beside it.
    """
    splits = 1
    while 2 * splits * rows <= 2 * sms and 2 * splits <= min(most, blocks):
        splits *= 2
    return splits


@functools.cache
def split_count(rows: int, blocks: int, sms: int, *, thin: float = 1.0, most: int = 64) -> int:
    """How many CTAs share a row of `blocks` blocks, from shapes only.

    The least time, in blocks: what the busiest SM reads, two blocks per CTA to fill and drain, and a little per split
    for merging. `thin` is how much longer that takes with fewer than two CTAs per SM. Fitted to an H200.
    """

    def cost(splits: int) -> float:
        busiest = -(-rows * splits // sms) * (-(-blocks // splits) + 2)
        return busiest * (1.0 if rows * splits > 1.8 * sms else thin) + 0.15 * splits

    choices = range(1, max(1, min(most, blocks)) + 1)
    least = min(map(cost, choices))
    return next(splits for splits in choices if cost(splits) <= 1.03 * least)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
