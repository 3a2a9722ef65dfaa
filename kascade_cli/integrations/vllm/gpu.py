"""What a GPU wants to know before the first step: kernels that must be there, memory that must be left."""

from typing import TYPE_CHECKING

import torch

from kascade_cli.integrations.vllm.ragged import through_ops
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
    """Takes and gives back, while vLLM measures, what the largest step needs beside the cache."""
    if device.type == "cuda":
        torch.empty(room(served, layer._score_bytes(device)), dtype=torch.int8, device=device)


def room(served: "Served", scores: int) -> int:
    """Bytes. scores: what a block of prefill scores may take, and, as an estimate, all that decode scores shall.

    Prefill: scores of a block of tiles, indices of two anchors, one request's keys and values where they are gathered.
    Decode: scores, and logits of all heads in the cache's dtype, of every row as wide as the longest; in CUDA graphs
    as wide as a row may be, which is no estimate.
    """
    most, info, world = served.most, served.info, served.heads.world
    heads, item = info.kv_heads // world, most.dtype.itemsize
    tiles = most.tokens // served.budget.tile + 1
    indices = 2 * 4 * tiles * info.kv_heads * served.budget.most(most.keys)
    gathered = 0 if through_ops(served.strategy) else 2 * heads * most.keys * info.head_dim * item
    prefill = min(scores, 4 * tiles * heads * most.keys) + indices + gathered
    row = most.keys * (4 * heads + item * info.query_heads // world)
    return max(prefill, min(scores, most.rows * row), most.graphs * row)
