"""Which decode steps are CUDA graphs as a whole, and what these need beside the cache."""

import logging
from typing import Any

from kascade_cli.integrations.vllm.heads import Heads
from kascade_cli.integrations.vllm.settings import Settings

log = logging.getLogger("kascade")

SHARE = 0.1  # of a GPU's memory that whole graphs may take where nobody asked for them


def rows_of_graphs(settings: Settings, config: Any, heads: Heads, row: int, device: str, memory: int) -> int:
    """Rows of the largest decode step that a CUDA graph holds whole, 0 for none.

    config: vLLM's. row: bytes that a graph needs for each; memory: of the device, bytes. Without a GPU nothing is
    recorded; with `graphs: full` steps are made there as for a graph all the same.
    """
    rows = config.scheduler_config.max_num_seqs
    if device != "cuda":
        return rows if settings.graphs == "full" else 0
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    # vLLM records whole steps of one token a row only.
    if mode is None or mode.decode_mode().name != "FULL" or config.speculative_config is not None:
        return 0
    rows = min(rows, compilation.max_cudagraph_capture_size or 0)
    if not rows or not settings.whole_steps(device):
        return 0
    needed = f"{rows * row / 1e9:.1f} GB beside the cache for decode steps of up to {rows} rows"
    if settings.graphs == "auto" and heads.gathers:
        return _not_whole("processes exchange scores or key sets, which no graph was shown to hold", heads)
    if settings.graphs == "auto" and rows * row > SHARE * memory:
        return _not_whole(f"they would need {needed}: lower --max-num-seqs or --max-model-len", heads)
    if heads.rank == 0:
        log.info("kascade: decode steps run whole in CUDA graphs, %s (--max-num-seqs bounds it)", needed)
    return rows


def _not_whole(why: str, heads: Heads) -> int:
    if heads.rank == 0:
        log.warning("kascade: attention stays outside of CUDA graphs, since %s (graphs: full insists)", why)
    return 0
