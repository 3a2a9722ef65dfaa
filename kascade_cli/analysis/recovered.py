"""Recovered mass: the share of a layer's attention that a profile's keys keep at its budget, streamed from a capture.

For a tile (or decode row) with N keys to choose among, k(N) is the budget's. A layer keeps what its KV heads give to
the k(N) keys that their anchor heads choose (method: section 4; pooled: those that all heads of the anchor choose
together), and the tile itself, which is always attended. The
first layer is dense and keeps everything, an anchor what its own Top-k holds. Means over heads, tiles, prompts.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kascade_cli.analysis.pool import each_prompt
from kascade_cli.analysis.similarity import PHASES
from kascade_cli.analysis.topk import to_float32, top_indices
from kascade_cli.capture.plausible import check_rows
from kascade_cli.capture.store import CapturedPrompt, open_capture
from kascade_cli.errors import KascadeError
from kascade_cli.schema import Budget

# (layer b, its KV head, anchor layer, anchor head): positions within the profiled layers. The set that an anchor's
# heads choose together counts as that of one more head.
Link = tuple[int, int, int, int]
_BLOCK_BYTES = 32 << 20  # of chosen keys held at a time


@dataclass(frozen=True)
class SetLinks:
    """What one anchor set reads: per phase, for every layer but the first, one link for each KV head.

    The first layer is dense and has none.
    """

    links: Mapping[str, Sequence[Sequence[Link]]]


def set_links(anchors: Sequence[int], maps: Mapping[int, Mapping[str, Sequence]], layers: int, heads: int) -> SetLinks:
    """`maps[b][phase]`: per KV head of reuse layer b (position), an anchor head of the nearest anchor, or a pair
    (anchor position, head)."""
    links: dict[str, list[list[Link]]] = {phase: [] for phase in PHASES}
    for layer in range(1, layers):
        nearest = max(anchor for anchor in anchors if anchor <= layer)
        for phase in PHASES:
            row = range(heads) if layer == nearest else maps[layer][phase]
            pairs = [entry if isinstance(entry, tuple) else (nearest, entry) for entry in row]
            links[phase].append([(layer, head, *pair) for head, pair in enumerate(pairs)])
    return SetLinks(links)


def pooled_links(anchors: Sequence[int], layers: int, heads: int) -> SetLinks:
    """As `set_links`, all heads reading what those of the nearest anchor choose together."""
    nearest = [max(anchor for anchor in anchors if anchor <= layer) for layer in range(1, layers)]
    rows = [[(layer, head, anchor, heads) for head in range(heads)] for layer, anchor in enumerate(nearest, 1)]
    return SetLinks(dict.fromkeys(PHASES, rows))


def measure(
    path: str | Path,
    sets: Sequence[SetLinks],
    budget: Budget,
    *,
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Per set: phase -> float64 [L], for the phases that the capture has. One pass over the capture for all sets.

    `advance(done, total)` is called after each prompt. Raises KascadeError for a capture that is damaged.
    """
    wanted = {
        phase: sorted({link for entry in sets for row in entry.links[phase] for link in row}) for phase in PHASES
    }
    found: dict[str, list[np.ndarray]] = {phase: [] for phase in PHASES}
    try:
        with open_capture(path) as capture:
            results = each_prompt(capture, prompt_recovered, (wanted, budget), workers)
            for done, result in enumerate(results, 1):
                for phase, kept in result.items():
                    found[phase].append(kept)
                if advance:
                    advance(done, len(capture))
            layers = len(capture.profiled_layers)
    except MemoryError as error:
        raise KascadeError(f"{path}: not enough memory to read it") from error
    means: dict[str, dict[Link, float]] = {}
    for phase, rows in found.items():
        if rows:
            # Sorted, so that the order of prompts in the file changes no bit.
            mean = np.sort(np.stack(rows), axis=0).mean(axis=0)
            means[phase] = dict(zip(wanted[phase], mean.tolist(), strict=True))
    return [{phase: _layers(entry.links[phase], means[phase], layers) for phase in means} for entry in sets]


def _layers(links: Sequence[Sequence[Link]], means: Mapping[Link, float], layers: int) -> np.ndarray:
    kept = np.ones(layers)
    for row in links:
        kept[row[0][0]] = np.mean([means[link] for link in row])
    return kept


def prompt_recovered(
    prompt: CapturedPrompt, wanted: Mapping[str, Sequence[Link]], budget: Budget
) -> dict[str, np.ndarray]:
    """Per phase that the prompt has: mean over its tiles of what each wanted link keeps, float64 [links]."""
    layers, _, heads, n_tokens = prompt.mass.shape
    tiles = prompt.tiles.astype(np.int64)
    sums = {phase: np.zeros(len(links)) for phase, links in wanted.items()}
    plans = {phase: _plan(links) for phase, links in wanted.items()}
    anchors = {anchor for links in wanted.values() for _, _, anchor, _ in links}
    together = {anchor for links in wanted.values() for _, _, anchor, head in links if head == heads}
    narrow, wide = (np.empty(heads * n_tokens, dtype) for dtype in (np.uint16, np.uint32))
    most = budget.count(n_tokens)
    per_block = max(1, _BLOCK_BYTES // (max(len(anchors), 1) * heads * most * 8))
    for first in range(0, len(tiles), per_block):
        block = tiles[first : first + per_block]
        chosen: list[dict[int, np.ndarray]] = [{} for _ in block]  # of each anchor layer: int64 [G or G + 1, k]
        for layer in range(layers):
            for position, (start, length) in enumerate(block):
                phase = "decode" if length == 1 else "prefill"
                reads = plans[phase].get(layer, {})
                if not reads and layer not in anchors:
                    continue
                end = int(start + length)
                bits = narrow[: heads * end].reshape(heads, end)
                prompt.read_bits(layer, first + position, bits)
                candidates = int(start) + 1 if length == 1 else int(start)
                k = budget.count(candidates)
                if layer in anchors:
                    keys = top_indices(np.ascontiguousarray(bits[:, :candidates]), k)
                    if layer in together:
                        pooled = to_float32(bits, wide)[:, :candidates].sum(axis=0, dtype=np.float64)
                        keys = np.concatenate([keys, _top(pooled, keys.shape[1])[None]])
                    chosen[position][layer] = keys
                if reads:
                    values = to_float32(bits, wide)
                    whole = values.sum(axis=1)
                    check_rows(whole, end, prompt.where(layer, first + position))
                    diagonal = values[:, candidates:].sum(axis=1)
                    for anchor, (own, theirs, places) in reads.items():
                        keys = chosen[position][anchor][theirs]
                        kept = values[own[:, None], keys].sum(axis=1) + diagonal[own]
                        sums[phase][places] += kept / whole[own]
    counts = {"decode": int((tiles[:, 1] == 1).sum()), "prefill": int((tiles[:, 1] != 1).sum())}
    return {phase: sums[phase] / count for phase, count in counts.items() if count}


def _top(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest of `values`, in no particular order; among equal ones the lowest index wins."""
    if k == 0 or k == len(values):
        return np.arange(k)
    bound = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > bound)
    return np.concatenate([above, np.flatnonzero(values == bound)[: k - len(above)]])


def _plan(links: Sequence[Link]) -> dict[int, dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """layer -> anchor layer -> (heads, anchor heads, places in `links`), int64 each."""
    grouped: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for place, (layer, head, anchor, anchor_head) in enumerate(links):
        grouped[layer, anchor].append((head, anchor_head, place))
    plan: dict[int, dict] = defaultdict(dict)
    for (layer, anchor), rows in grouped.items():
        plan[layer][anchor] = tuple(np.array(rows).T)
    return plan
