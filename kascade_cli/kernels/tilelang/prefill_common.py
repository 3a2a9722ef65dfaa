"""What the three prefill ops share: argument checks with one clear line each, and views of q, k and v as the kernels read them."""

from dataclasses import dataclass

import tilelang.language as T
import torch
from torch import Tensor

from kascade_cli.errors import KascadeError

LOG2E = 1.4426950408889634
HEAD_DIMS = (64, 128)
TILES = (8, 16, 32, 64, 128)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: B, H, T, D of the queries, G and S of the cache, R = H // G, and the kernels' name of the dtype."""

    batch: int
    heads: int
    queries: int
    head_dim: int
    groups: int
    slots: int
    ratio: int
    dtype: str


def check(op: str, q: Tensor, k: Tensor, v: Tensor | None, lengths: tuple[Tensor, Tensor, Tensor], tile: int | None = None) -> Shape:
    """Sizes of the call, or KascadeError with what is wrong. lengths: query_start, kv_start, kv_len."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None and tensor.dim() != 4:
            raise KascadeError(f"{op}: {name} must be [batch, heads, length, head_dim], not {list(tensor.shape)}")
    batch, heads, queries, head_dim = q.shape
    groups, slots = k.shape[1], k.shape[2]
    if k.shape != (batch, groups, slots, head_dim) or (v is not None and v.shape != k.shape):
        raise KascadeError(f"{op}: k and v must be [{batch}, kv_heads, slots, {head_dim}] like q {list(q.shape)}, not "
                           f"{list(k.shape)}" + ("" if v is None else f" and {list(v.shape)}"))
    if groups == 0 or slots == 0 or heads % groups or not 1 <= heads // groups <= 16:
        raise KascadeError(f"{op}: {heads} query heads over {groups} KV heads of {slots} slots; the kernels take groups of 1 to 16 heads")
    if q.dtype not in DTYPES or k.dtype != q.dtype or (v is not None and v.dtype != q.dtype):
        names = ", ".join(str(t.dtype).removeprefix("torch.") for t in (q, k, v) if t is not None)
        raise KascadeError(f"{op}: q, k and v must all be bfloat16 or all float16, not {names}")
    if head_dim not in HEAD_DIMS:
        raise KascadeError(f"{op}: head_dim {head_dim} is not supported, only {' and '.join(map(str, HEAD_DIMS))}")
    for name, tensor in zip(("query_start", "kv_start", "kv_len"), lengths, strict=True):
        vector(op, name, tensor, (batch,), q.device)
    if any(t is not None and t.device != q.device for t in (k, v)):
        raise KascadeError(f"{op}: q, k and v are on different devices")
    if tile is not None and tile not in TILES:
        raise KascadeError(f"{op}: tile {tile} is not supported, only {', '.join(map(str, TILES))}")
    return Shape(batch, heads, queries, head_dim, groups, slots, heads // groups, DTYPES[q.dtype])


def vector(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32) -> None:
    """KascadeError unless `tensor` is of this shape, dtype and device."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        kind = str(dtype).removeprefix("torch.")
        raise KascadeError(f"{op}: {name} must be {kind} {list(shape)} on {device}, not "
                           f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}")


def queries_view(q: Tensor) -> Tensor:
    """q [B, H, T, D] as contiguous [B, T, H, D]; no copy when that is how it lies in memory."""
    return aligned(q.transpose(1, 2).contiguous())


def cache_view(cache: Tensor) -> Tensor:
    """[B, G, S, D] contiguous. The front of a longer, contiguous cache is widened to it instead of copied: lengths bound what is read."""
    if cache.is_contiguous():
        return aligned(cache)
    batch, groups, slots, size = cache.shape
    slot = cache.stride(2) if slots > 1 else size
    head = cache.stride(1) if groups > 1 else (cache.stride(0) // groups if batch > 1 else slots * size)
    whole = (batch, groups, head // size, size)
    fits = cache.stride(3) == 1 and slot == size and head % size == 0 and head >= slots * size
    if fits and (batch == 1 or cache.stride(0) == groups * head):
        last = cache.storage_offset() + batch * groups * head
        if last * cache.element_size() <= cache.untyped_storage().nbytes():
            return aligned(cache.as_strided(whole, (groups * head, head, size, 1)))
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
        raise KascadeError(f"{op}: no {need:.1f} GiB of GPU memory for {list(shape)} {str(dtype).removeprefix('torch.')}; {advice}") from error


def exp2_fma(x: T.PrimExpr) -> T.PrimExpr:
    """2**x for x <= 0 on the FMA pipe, to 4e-6: relieves the special-function unit, which is as busy as the tensor cores are.

    x is split into an integer, that goes into the exponent's bits, and a rest in [-0.5, 0.5] under a polynomial.
    """
    low = T.max(x, T.float32(-126.0))
    shifted = low + T.float32(12582912.0)  # 1.5 * 2**23: the integer nearest to x is in the low bits
    rest = low - (T.abs(shifted) - T.float32(12582912.0))  # abs keeps the simplifier from cancelling the two constants
    power = T.float32(0.00961812910762848)
    for coefficient in (0.0555041086648216, 0.240226506959101, 0.693147180559945, 1.0):
        power = power * rest + T.float32(coefficient)
    return T.reinterpret(T.reinterpret(power, "int32") + (T.reinterpret(shifted, "int32") << 23), "float32")
