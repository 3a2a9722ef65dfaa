"""A step of vLLM, as its metadata builders see it, cut into rows of one phase each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kascade_cli.integrations.vllm.compat import longest
from kascade_cli.integrations.vllm.rows import DecodeRows, PrefillChunk


@dataclass
class Step:
    """The metadata of one step: vLLM makes one per step and group of layers, so that what hangs on it cannot go stale.

    counts: what the report adds up. The other fields are there because parts of vLLM look for them.
    """

    parts: list[DecodeRows | PrefillChunk]
    counts: dict[str, int]
    num_actual_tokens: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int


def read_step(common: Any, page: int, drafts: int, tile: int, wide: bool = False) -> Step:
    """common: vLLM's CommonAttentionMetadata. page: tokens of a block. drafts: most speculative tokens of a row. wide:
    steps of decode rows alone are made as a CUDA graph is (to warm it up), of any length.

    A row decodes if vLLM says that its prompt is done, whatever its query length. A row whose prompt is done and that
    has more tokens than a decode step can have is computed anew after a preemption: that is prefill.
    """
    starts, ends = common.query_start_loc_cpu[: common.num_reqs + 1].tolist(), longest(common)
    prefilling = [] if common.is_prefilling is None else common.is_prefilling[: common.num_reqs].tolist()
    busy = prefilling + [False] * (common.num_reqs - len(prefilling))  # what is not told of is padding
    decodes, parts = [], []
    for row in range(common.num_reqs):
        count = starts[row + 1] - starts[row]
        if count == 0:  # padding
            continue
        if not busy[row] and count <= 1 + drafts:
            decodes.append(row)
        else:
            table = common.block_table_tensor[row : row + 1]
            parts.append(PrefillChunk(starts[row], count, ends[row], table))
    counts = _counts(decodes, parts, starts, tile)
    if decodes:
        blocks = None if wide and not parts else -(-max(ends[row] for row in decodes) // page)
        parts.insert(0, _decode_rows(common, decodes, starts, blocks))
    return _step(common, parts, counts)


def captured_step(common: Any) -> Step:
    """A decode step for a CUDA graph: every row one token, of any length up to what the block table holds."""
    rows = slice(0, common.num_reqs)
    part = DecodeRows(rows, common.seq_lens[rows], common.block_table_tensor[rows], None)
    return _step(common, [part], {})


def _step(common: Any, parts: list[DecodeRows | PrefillChunk], counts: dict[str, int]) -> Step:
    return Step(
        parts, counts, common.num_actual_tokens, common.slot_mapping, common.block_table_tensor, common.seq_lens,
        common.query_start_loc, common.max_query_len, common.max_seq_len,
    )  # fmt: skip


def _decode_rows(common: Any, rows: list[int], starts: list[int], blocks: int | None) -> DecodeRows:
    first, count = rows[0], len(rows)
    tokens = [token for row in rows for token in range(starts[row], starts[row + 1])]
    if rows == list(range(first, first + count)) and len(tokens) == count:  # the usual case, without a copy
        here = slice(first, first + count)
        return DecodeRows(
            slice(tokens[0], tokens[0] + count), common.seq_lens[here], common.block_table_tensor[here], blocks
        )
    owner = [row for row in rows for _ in range(starts[row], starts[row + 1])]
    behind = [starts[row + 1] - 1 - token for row in rows for token in range(starts[row], starts[row + 1])]
    device = common.seq_lens.device
    token, row, back = (torch.tensor(values, device=device) for values in (tokens, owner, behind))
    return DecodeRows(token, common.seq_lens[row] - back.int(), common.block_table_tensor[row], blocks)


def _counts(decodes: list[int], chunks: list[PrefillChunk], starts: list[int], tile: int) -> dict[str, int]:
    begins = [chunk.end - chunk.count for chunk in chunks]
    return {
        "steps": 1,
        "decode_rows": sum(starts[row + 1] - starts[row] for row in decodes),
        "prefill_chunks": len(chunks),
        "mixed_steps": int(bool(decodes and chunks)),
        "chunks_inside_a_tile": sum(begin % tile != 0 for begin in begins),
        "speculative_rows": sum(starts[row + 1] - starts[row] > 1 for row in decodes),
    }
