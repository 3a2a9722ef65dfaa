"""Which query tiles of a prompt are measured. Depends on the prompt's length, its index and the seed
alone."""

import numpy as np


def sample_tiles(n_tokens: int, count: int | None, *, tile: int, seed: int, prompt: int) -> np.ndarray:
    """Tiles to measure in a prompt of `n_tokens`: int32 [T, 2], start and length.

    Half of `count` are prefill tiles (`tile` queries, aligned to multiples of `tile`), the rest decode rows
    (one query each); prefill tiles come first, each kind in order of position. Drawn without replacement with
    a weight proportional to the number of keys before the tile: a sparse budget rolls with the context, so a
    late tile decides over more keys than an early one, and decoding happens at the end. The last full tile
    and the last position are always in. The first tile has no key to choose and is never drawn unless there
    is nothing else. Short prompts give fewer tiles. `count` None: every aligned tile, and one decode row out
    of each.
    """
    rng = np.random.default_rng([seed, prompt])
    if count is None:
        starts = np.arange(0, n_tokens, tile)
        ends = np.minimum(starts + tile, n_tokens)
        long_enough = ends - starts > 1  # a single query is a decode row
        prefill = np.stack([starts, ends - starts], axis=1)[long_enough]
        rows = starts + (rng.random(len(starts)) * (ends - starts)).astype(int)
        rows[-1] = n_tokens - 1
    else:
        candidates = _prefill_candidates(n_tokens, tile)
        prefill = candidates[_draw(rng, candidates[:, 0], count // 2)]
        rows = _draw(rng, np.arange(n_tokens), count - count // 2)
    decode = np.stack([rows, np.ones_like(rows)], axis=1)
    return np.concatenate([prefill, decode]).astype(np.int32)


def _prefill_candidates(n_tokens: int, tile: int) -> np.ndarray:
    """Full tiles with keys before them; in a short prompt the ragged last tile, or the first one."""
    full = np.arange(tile, n_tokens - tile + 1, tile)
    if len(full):
        return np.stack([full, np.full_like(full, tile)], axis=1)
    start = tile if n_tokens > tile + 1 else 0
    length = min(tile, n_tokens - start)
    return np.array([[start, length]] if length > 1 else np.empty((0, 2)), int)


def _draw(rng: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """`count` indices into `weights` in ascending order: the last one, and others drawn by weight."""
    if count < 1 or not len(weights):
        return np.empty(0, int)
    others = np.flatnonzero(weights[:-1] > 0)
    count = min(count - 1, len(others))
    chosen = others[:0]
    if count:
        weight = weights[others] / weights[others].sum()
        chosen = rng.choice(others, size=count, replace=False, p=weight)
    return np.sort(np.append(chosen, len(weights) - 1))
