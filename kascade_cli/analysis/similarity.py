"""Cross-layer similarity of attention, streamed from a capture (method: paper, section 3.3;
docs/select-anchors.md).

For prompt p, tile t, KV heads g' of layer a and g of layer b >= a, with I[a,g'] the exact Top-k keys of the
pooled scores and d[b,g] the mass on the always-kept diagonal tile (0 for a decode row):

    sim[p,t,a,b,g',g] = (sum_{j in I[a,g']} s[b,g,j] + d[b,g]) / (sum_{j in I[b,g]} s[b,g,j] + d[b,g])

Over tiles the minimum (or the mean) is kept per prompt, for decode rows and prefill tiles apart. Layers `a`
and `b` count within the profiled layers. Memory holds one block of tiles and the result, whatever the size
of the capture.

Sums are exact: float16 masses are multiples of 2^-24, and a sum of them up to 1 fits float32's mantissa. So
neither the order of keys nor the number of workers changes a bit of the result.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kascade_cli.analysis.pool import each_prompt
from kascade_cli.analysis.topk import to_float32, top_indices
from kascade_cli.capture.plausible import check_rows
from kascade_cli.capture.store import CapturedPrompt, open_capture
from kascade_cli.errors import KascadeError

PHASES = ("decode", "prefill")
REDUCTIONS = ("min", "mean")
_BLOCK_BYTES = 32 << 20  # of chosen keys held at a time


@dataclass
class PromptSimilarity:
    """One prompt's figures. `sim[phase]` float32 [Lp, Lp, G, G] indexed [a, b, g', g], 0 where a > b."""

    sha256: str
    tiles: dict[str, int]
    sim: dict[str, np.ndarray]
    importance: np.ndarray  # float32 [Lp]
    top_mass: np.ndarray  # float32 [Lp, H, K]

    def order(self) -> tuple[str, str]:
        """A key that depends on content only, so that the order of prompts in the file cannot matter."""
        digest = hashlib.sha256(self.importance.tobytes())
        for phase in sorted(self.sim):
            digest.update(self.sim[phase].tobytes())
        return self.sha256, digest.hexdigest()


@dataclass
class Measured:
    """What a capture says about sharing, prompts in a canonical order.

    `sim[phase]` float32 [P, Lp, Lp, G, G] over the prompts that have tiles of that phase; `importance`
    float64 [Lp] and `top_mass` float64 [Lp, H, K] are means over prompts, `importance_per_prompt` float32
    [P, Lp].
    """

    path: Path
    meta: dict[str, Any]
    profiled_layers: list[int]
    prompts: int
    top_k: int
    reduce: str
    tiles: dict[str, int]
    sim: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    importance: np.ndarray
    importance_per_prompt: np.ndarray
    top_mass: np.ndarray
    top_mass_keys: list[str] = field(default_factory=list)

    def mean(self, phase: str) -> np.ndarray:
        """Mean over prompts, float64 [Lp, Lp, G, G]."""
        return self.sim[phase].mean(axis=0, dtype=np.float64)


class _Accumulator:
    """Minimum or sum over tiles, laid out [b, g, a * G + g'] so that a tile updates a prefix of each row."""

    def __init__(self, layers: int, heads: int, reduce: str) -> None:
        self.reduce, self.count = reduce, 0
        shape = (layers, heads, layers * heads)
        self.values = np.full(shape, np.inf, np.float32) if reduce == "min" else np.zeros(shape, np.float64)

    def add(self, layer: int, ratio: np.ndarray) -> None:
        part = self.values[layer, :, : ratio.shape[1]]
        if self.reduce == "min":
            np.minimum(part, ratio, out=part)
        else:
            part += ratio

    def result(self) -> np.ndarray:
        layers, heads, _ = self.values.shape
        values = self.values if self.reduce == "min" else self.values / self.count
        values = values.reshape(layers, heads, layers, heads).transpose(2, 0, 3, 1).astype(np.float32)
        values[np.tril_indices(layers, -1)] = 0
        return values


def prompt_similarity(prompt: CapturedPrompt, top_k: int, reduce: str) -> PromptSimilarity:
    """Streams one prompt. Raises KascadeError if its mass is damaged, or cannot be attention."""
    layers, _, heads, n_tokens = prompt.mass.shape
    tiles = prompt.tiles.astype(np.int64)
    accumulators = {phase: _Accumulator(layers, heads, reduce) for phase in PHASES}
    narrow, wide = (np.empty(heads * n_tokens, dtype) for dtype in (np.uint16, np.uint32))
    # Layer by layer over a block of tiles, as they lie in the file.
    per_block = max(1, _BLOCK_BYTES // (layers * heads * min(top_k, n_tokens) * 8))
    for first in range(0, len(tiles), per_block):
        block = tiles[first : first + per_block]
        chosen: list[list[np.ndarray]] = [[] for _ in block]
        for layer in range(layers):
            for position, (start, length) in enumerate(block):
                bits = narrow[: heads * (start + length)].reshape(heads, start + length)
                prompt.read_bits(layer, first + position, bits)
                where = prompt.where(layer, first + position)
                ratio = _tile_ratio(bits, int(start), int(length), chosen[position], top_k, where, wide)
                accumulators["decode" if length == 1 else "prefill"].add(layer, ratio)
    counts = {"decode": int((tiles[:, 1] == 1).sum()), "prefill": int((tiles[:, 1] != 1).sum())}
    for phase in PHASES:
        accumulators[phase].count = counts[phase]
    return PromptSimilarity(
        sha256=prompt.token_ids_sha256,
        tiles=counts,
        sim={phase: accumulators[phase].result() for phase in PHASES if counts[phase]},
        importance=prompt.importance.astype(np.float32),
        top_mass=prompt.top_mass.astype(np.float32),
    )


def _tile_ratio(
    bits: np.ndarray, start: int, length: int, chosen: list[np.ndarray], top_k: int, where: str, scratch: np.ndarray
) -> np.ndarray:
    """sim of one tile and layer b against every layer a <= b: float32 [G, (b + 1) * G], column a * G + g'.

    bits: uint16 [G, start + length]. Appends this layer's own choice to `chosen` (one flat index array per layer).
    Raises KascadeError, naming `where`, if a row does not sum to 1.
    """
    heads = bits.shape[0]
    candidates = start + 1 if length == 1 else start
    values = to_float32(bits, scratch)
    check_rows(values.sum(axis=1), start + length, where)
    diagonal = np.float32(0) if length == 1 else values[:, start:].sum(axis=1, keepdims=True)
    own_choice = top_indices(np.ascontiguousarray(bits[:, :candidates]), top_k)
    k = own_choice.shape[1]
    chosen.append(own_choice.ravel())
    if k == 0:  # the first tile of a prompt: the diagonal is all there is
        return np.ones((heads, len(chosen) * heads), np.float32)
    keys = np.concatenate(chosen)
    gathered = values.take(keys, axis=1, mode="wrap").reshape(heads, -1, k)
    kept = gathered @ np.ones(k, np.float32) + diagonal
    own = kept[np.arange(heads), (len(chosen) - 1) * heads + np.arange(heads)][:, None]
    return kept / own  # own > 0: a row has mass, and its largest key is chosen or on the diagonal


def measure(
    path: str | Path,
    *,
    top_k: int = 64,
    reduce: str = "min",
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Measured:
    """Streams a whole capture. `advance(done, total)` is called after each prompt.

    Raises KascadeError if the file is missing, foreign, damaged or truncated, has no complete prompt, or holds
    numbers that cannot be; or if memory is short.
    """
    try:
        return _measure(Path(path), top_k, reduce, workers, advance)
    except MemoryError as error:
        raise KascadeError(f"{path}: not enough memory to compare its layers") from error


def _measure(
    path: Path, top_k: int, reduce: str, workers: int | None, advance: Callable[[int, int], None] | None
) -> Measured:
    results = []
    with open_capture(path) as capture:
        if not capture.prompts:
            raise KascadeError(f"{path}: no complete prompt; finish the capture with `kascade profile ... --resume`")
        for result in each_prompt(capture, prompt_similarity, (top_k, reduce), workers):
            results.append(result)
            if advance:
                advance(len(results), len(capture))
        return _merge(path, capture.meta, capture.profiled_layers, results, top_k, reduce)


def _merge(
    path: Path, meta: dict, layers: list[int], results: list[PromptSimilarity], top_k: int, reduce: str
) -> Measured:
    results.sort(key=PromptSimilarity.order)
    sim, present = {}, {}
    for phase in PHASES:
        having = [index for index, result in enumerate(results) if phase in result.sim]
        if having:
            present[phase] = np.array(having)
            sim[phase] = np.stack([results[index].sim[phase] for index in having])
    if not sim:
        raise KascadeError(f"{path}: no tile was captured, neither prefill tiles nor decode rows")
    importance = np.stack([result.importance for result in results])
    top_mass = np.stack([result.top_mass for result in results]).mean(axis=0, dtype=np.float64)
    return Measured(
        path=path,
        meta=meta,
        profiled_layers=layers,
        prompts=len(results),
        top_k=top_k,
        reduce=reduce,
        tiles={phase: sum(result.tiles[phase] for result in results) for phase in PHASES},
        sim=sim,
        present=present,
        importance=importance.mean(axis=0, dtype=np.float64),
        importance_per_prompt=importance,
        top_mass=top_mass,
        top_mass_keys=meta["top_mass_keys"],
    )
