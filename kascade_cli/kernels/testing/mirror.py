"""A backend that runs anywhere, takes the paths of a fused one, and holds callers to the contract.

Its ops are the reference's. Before each, it checks what no fast kernel can: that lengths fit the cache (a query_start
given for a kv_start does not), that selections name keys of their row that lie before their tile, that a log-sum-exp
is one of these queries, that scores to rank are not negative. What is wrong raises AssertionError.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kascade_cli.kernels import reference
from kascade_cli.kernels.backend import register_backend
from kascade_cli.kernels.contract import OPS, first_tile
from kascade_cli.kernels.ragged import ragged_tiles


def register_mirror(name: str = "mirror", seen: list[str] | None = None) -> None:
    """Makes `get_backend(name, device)` the checked reference; `seen` collects the names of the ops that ran."""
    register_backend(name, {op: _mirror(op, [] if seen is None else seen) for op in OPS})


def _mirror(op: str, seen: list[str]) -> Callable[..., Any]:
    plain = getattr(reference, op)
    signature = inspect.signature(plain)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_check_selection if op == "select_topk" else _check_attention)(op, bound.arguments)
        seen.append(op)
        return plain(*args, **kwargs)

    return call


def _check_selection(op: str, given: dict[str, Any]) -> None:
    scores = given["scores"]
    shape = scores.shape[:-1]
    for name in ("count", "start", "length"):
        _require(given[name].dtype == torch.int32, f"{op}: {name} is {given[name].dtype}, not int32")
    start, length = (given[name].expand(shape)[..., None] for name in ("start", "length"))
    slot = torch.arange(scores.shape[-1], device=scores.device)
    inside = (slot >= start) & (slot < start + length)
    _require(not (inside & (scores < 0)).any(), f"{op}: tilelang ranks no negative scores")


def _check_attention(op: str, given: dict[str, Any]) -> None:
    q, k, table = given["q"], given["k"], given.get("block_table")
    batch = q.shape[0] if table is None else len(table)
    slots = k.shape[2] if table is None else table.shape[1] * k.shape[1]
    lengths = {name: given[name] for name in ("query_start", "kv_start", "kv_len") if name in given}
    for name, value in lengths.items():
        _int32(op, name, value, (batch,))
    if lengths:
        start, length = lengths["kv_start"], lengths["kv_len"]
        fits = (start >= 0) & (length >= 0) & (start + length <= slots)
        _require(fits.all(), f"{op}: rows from {start.tolist()} of {length.tolist()} keys in {slots} slots")
    if "query_start" in lengths:
        _require((lengths["query_start"] >= 0).all(), f"{op}: query_start {lengths['query_start'].tolist()}")
    if "indices" in given:
        _check_indices(op, given, batch, slots)
    if given.get("lse") is not None:
        _check_lse(op, given, lengths)
    if given.get("query_start_loc") is not None:
        queries = given["query_start_loc"].diff()
        good = (lengths["query_start"] + queries <= lengths["kv_len"]) | (queries == 0)
        _require(good.all(), f"{op}: rows of {queries.tolist()} queries are not the last of their keys")


def _check_indices(op: str, given: dict[str, Any], batch: int, slots: int) -> None:
    """Used entries are different keys of the row: any slot in decode, slots before the tile in prefill."""
    indices, counts, head_map = given["indices"], given["counts"], given["head_map"]
    prefill, ragged = "tile" in given, given.get("query_start_loc") is not None
    if ragged:  # as one row of all tiles
        indices, counts = indices[None], counts[None]
    tiles = indices.shape[2:-1]
    _int32(op, "indices", indices, (1 if ragged else batch, *indices.shape[1:]))
    _int32(op, "counts", counts, (1 if ragged else batch, *tiles))
    _int32(op, "head_map", head_map, (given["k"].shape[1 if given.get("block_table") is None else 2],))
    sources = indices.shape[1]
    _require(((head_map >= 0) & (head_map < sources)).all(), f"{op}: head_map {head_map.tolist()} of {sources} heads")
    _require(((counts >= 0) & (counts <= indices.shape[-1])).all(), f"{op}: counts past {indices.shape[-1]} entries")
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    low = torch.zeros_like(counts)
    high = torch.full_like(counts, slots)
    if ragged:
        where = (given["query_start_loc"], given["query_start"], given["kv_len"])
        row, high = (x[None] for x in ragged_tiles(*where, given["tile"], given["q"].shape[0]))
        nobody = row == batch
        _require(not (counts > 0)[nobody].any(), f"{op}: tiles that are nobody's have counts")
    elif prefill:
        start, query, tile = given["kv_start"][:, None], given["query_start"][:, None], given["tile"]
        local = torch.arange(*tiles, device=counts.device)
        high = start + (first_tile(given["query_start"], given["kv_start"], tile)[:, None] + local) * tile
        low = start.expand_as(high)
        # Tiles without queries are not attended to, whatever their counts.
        used &= ((high < start + given["kv_len"][:, None]) & (high < query + given["q"].shape[2]))[..., None]
    used = used[:, None].expand_as(indices)
    good = (indices >= low[:, None, ..., None]) & (indices < high[:, None, ..., None])
    _require((good | ~used).all(), f"{op}: a selection names slots that are not keys of its row before its tile")
    unused = -1 - torch.arange(indices.shape[-1], device=indices.device)
    ordered = torch.where(used, indices, unused).sort(-1).values
    _require((ordered.diff(dim=-1) != 0).all(), f"{op}: a selection names a key twice")


def _check_lse(op: str, given: dict[str, Any], lengths: dict[str, Tensor]) -> None:
    """Of the same queries: finite (or NaN) where they are real, and never above that of all keys that they see."""
    q, lse = given["q"], given["lse"]
    pages = {name: given[name] for name in ("block_table", "query_start_loc")}
    shape = q.shape[:3] if pages["block_table"] is None else (q.shape[1], q.shape[0])
    _require(lse.shape == shape, f"{op}: lse is {list(lse.shape)}, not {list(shape)}")
    exact = reference.prefill_dense(q, given["k"], None, *lengths.values(), scale=given["scale"], **pages)[1]
    _require(
        torch.equal(lse == float("-inf"), exact == float("-inf")), f"{op}: lse has other padding than the queries"
    )
    _require(not (lse > exact + 1e-3).any(), f"{op}: lse is above that of all keys")


def _int32(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    found = f"{value.dtype} {list(value.shape)}"
    _require(value.dtype == torch.int32 and value.shape == shape, f"{op}: {name} is {found}, not int32 {list(shape)}")
    _require(value.is_contiguous(), f"{op}: {name} is not contiguous")


def _require(good: Any, message: str) -> None:
    if not bool(good):
        raise AssertionError(message)
