"""A step of vLLM, as its metadata builders see it, cut into rows of one phase each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kascade_cli.integrations.vllm.compat import longest
from kascade_cli.integrations.vllm.ragged import PrefillRows
from kascade_cli.integrations.vllm.rows import DecodeRows, PrefillChunk

Part = DecodeRows | PrefillChunk | PrefillRows


@dataclass
class Step:
    """The metadata of one step: vLLM makes one per step and group of layers, so that what hangs on it cannot go stale.

    counts: what the report adds up. served: who attends. The other fields are there because parts of vLLM look for
    them.
    """

    parts: list[Part]
    counts: dict[str, int]
    num_actual_tokens: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    served: Any = None


@dataclass(frozen=True)
class Reading:
    """How steps are read. page: tokens of a block. drafts: most speculative tokens of a row. graphs: steps of so many
    decode rows alone, or fewer, are made as a CUDA graph is (to warm it up), of any length. ragged: prefill rows go
    together; else each alone, its keys gathered.
    """

    page: int
    tile: int
    drafts: int = 0
    graphs: int = 0
    ragged: bool = True


def read_step(common: Any, how: Reading) -> Step:
    """common: vLLM's CommonAttentionMetadata.

    A row decodes if vLLM says that its prompt is done, whatever its query length. A row whose prompt is done and that
    has more tokens than a decode step can have is computed anew after a preemption: that is prefill.
    """
    starts, ends = common.query_start_loc_cpu[: common.num_reqs + 1].tolist(), longest(common)
    prefilling = [] if common.is_prefilling is None else common.is_prefilling[: common.num_reqs].tolist()
    busy = prefilling + [False] * (common.num_reqs - len(prefilling))  # what is not told of is padding
    decodes, prefills = [], []
    for row in range(common.num_reqs):
        count = starts[row + 1] - starts[row]
        if count:  # else padding
            (decodes if not busy[row] and count <= 1 + how.drafts else prefills).append(row)
    if how.ragged:
        parts = [_prefill_rows(common, run, starts, ends, how.page) for run in _runs(prefills)]
    else:
        parts = [_chunk(common, row, starts, ends) for row in prefills]
    if decodes:
        whole = len(decodes) <= how.graphs and not parts
        blocks = None if whole else -(-max(ends[row] for row in decodes) // how.page)
        parts.insert(0, _decode_rows(common, decodes, starts, blocks))
    return _step(common, parts, _counts(decodes, prefills, starts, ends, how.tile))


def captured_step(common: Any) -> Step:
    """A decode step for a CUDA graph: every row one token, of any length up to what the block table holds."""
    rows = slice(0, common.num_reqs)
    part = DecodeRows(rows, common.seq_lens[rows], common.block_table_tensor[rows], None)
    return _step(common, [part], {})


def _step(common: Any, parts: list[Part], counts: dict[str, int]) -> Step:
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
            slice(tokens[0], tokens[0] + count), _ends(common, here), common.block_table_tensor[here], blocks
        )
    owner = [row for row in rows for _ in range(starts[row], starts[row + 1])]
    behind = [starts[row + 1] - 1 - token for row in rows for token in range(starts[row], starts[row + 1])]
    device = common.seq_lens.device
    token, row, back = (torch.tensor(values, device=device) for values in (tokens, owner, behind))
    return DecodeRows(token, common.seq_lens[row] - back.int(), common.block_table_tensor[row], blocks)


def _ends(common: Any, here: slice) -> Tensor:
    """Keys of rows: vLLM's own tensor from its beginning, else a copy, since kernels expect aligned pointers."""
    return common.seq_lens[here] if here.start == 0 else common.seq_lens[here].clone()


def _runs(rows: list[int]) -> list[range]:
    """Rows that follow each other, together."""
    found: list[range] = []
    for row in rows:
        if found and found[-1].stop == row:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found


def _prefill_rows(common: Any, rows: range, starts: list[int], ends: list[int], page: int) -> PrefillRows:
    here, bounds = slice(rows.start, rows.stop), slice(rows.start, rows.stop + 1)
    begins = common.query_start_loc[bounds]
    table = common.block_table_tensor[here, : -(-max(ends[row] for row in rows) // page)]
    return PrefillRows(
        slice(starts[rows.start], starts[rows.stop]), (begins - begins[:1]).int(), _ends(common, here), table
    )


def _chunk(common: Any, row: int, starts: list[int], ends: list[int]) -> PrefillChunk:
    return PrefillChunk(
        starts[row], starts[row + 1] - starts[row], ends[row], common.block_table_tensor[row : row + 1]
    )


def _counts(decodes: list[int], prefills: list[int], starts: list[int], ends: list[int], tile: int) -> dict[str, int]:
    begins = [ends[row] - (starts[row + 1] - starts[row]) for row in prefills]
    return {
        "steps": 1,
        "decode_rows": sum(starts[row + 1] - starts[row] for row in decodes),
        "prefill_chunks": len(prefills),
        "mixed_steps": int(bool(decodes and prefills)),
        "chunks_inside_a_tile": sum(begin % tile != 0 for begin in begins),
        "speculative_rows": sum(starts[row + 1] - starts[row] > 1 for row in decodes),
    }
