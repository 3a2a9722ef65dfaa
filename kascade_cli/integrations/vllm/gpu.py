"""What a GPU wants to know before the first step: kernels that must be there, memory that must be left."""

from typing import TYPE_CHECKING

import torch

from kascade_cli.integrations.vllm.compat import estimates_graphs
from kascade_cli.integrations.vllm.ragged import through_ops
from kascade_cli.models import ModelInfo
from kascade_cli.schema import Budget
from kascade_cli.sparse import layer

if TYPE_CHECKING:
    from kascade_cli.integrations.vllm.served import Served

PAGES = (32, 64, 128, 256)  # tokens of a page that the kernels are built for, the smallest vLLM's default


def compile_kernels(served: "Served", page: int) -> None:
    """Compiles what is not cached: for pages of `page` tokens, and for gathered keys where the strategy needs them."""
    info, budget = served.info, served.budget
    shape = (info.query_heads // info.kv_heads, info.head_dim, served.most.dtype, budget.tile)
    served.ops.compile_ahead(*shape, page=page)
    if not through_ops(served.strategy):
        served.ops.compile_ahead(*shape)


def reserve(served: "Served", device: torch.device) -> None:
    """Takes and gives back, while vLLM measures, what the largest step needs beside the cache.

    Graphs keep what they have, so that it comes on top where vLLM does not set memory aside for them itself.
    """
    if device.type == "cuda":
        size = room(served, layer._score_bytes(device))
        if not estimates_graphs():
            size += served.most.graphs * row_bytes(served)
        torch.empty(size, dtype=torch.int8, device=device)


def room(served: "Served", scores: int) -> int:
    """Bytes. scores: what a block of prefill scores may take, and, as an estimate, all that decode scores shall.

    Prefill: scores of a block of tiles (pooled over processes: those of all of them, and once more joined), indices of
    two anchors, one request's keys and values where they are gathered.
    Decode: `decode_bytes` of every row as long as the longest; in CUDA graphs that is no estimate.
    """
    most, info, world = served.most, served.info, served.heads.world
    heads, item = info.kv_heads // world, most.dtype.itemsize
    tiles = most.tokens // served.budget.tile + 1
    indices = 2 * 4 * tiles * info.kv_heads * served.budget.most(most.keys)
    gathered = 0 if through_ops(served.strategy) else 2 * heads * most.keys * info.head_dim * item
    block = min(scores, 4 * tiles * heads * most.keys)
    if world > 1 and getattr(served.strategy, "pooled", False):
        block *= 1 + 2 * world
    prefill = block + indices + gathered
    row = row_bytes(served)
    return max(prefill, min(scores, most.rows * row), most.graphs * row)


def row_bytes(served: "Served") -> int:
    most = served.most
    return decode_bytes(served.info, served.heads.world, served.budget, most.keys, most.dtype)


def decode_bytes(info: ModelInfo, world: int, budget: Budget, keys: int, dtype: torch.dtype) -> int:
    """Bytes that a decode row of `keys` keys takes on one of `world` processes: scores and logits of its heads, as the
    kernels store them, and indices of two anchors for all heads.
    """
    heads, group = info.kv_heads // world, info.query_heads // info.kv_heads
    item = 2 if dtype == torch.bfloat16 else 4  # of a logit
    slot = max(4, item << (group - 1).bit_length())  # of a group's logits: a power of two of them
    return keys * heads * (4 + slot) + 2 * 4 * info.kv_heads * budget.most(keys)
