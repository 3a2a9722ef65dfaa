"""Which query tiles of a prompt are measured. Depends on its length, its questions, its index and the seed alone."""

from collections.abc import Sequence

import numpy as np

# Of each kind of tile, at most this share is bound to questions: the others show how the rest of the text attends.
_QUESTIONS = 0.75

Spans = Sequence[tuple[int, int]]


def sample_tiles(
    n_tokens: int,
    count: int | None,
    *,
    tile: int,
    seed: int,
    prompt: int,
    questions: Spans = (),
    answers: Spans = (),
) -> np.ndarray:
    """Tiles to measure in a prompt of `n_tokens`: int32 [T, 2], start and length.

    Half of `count` are prefill tiles (`tile` queries, aligned to multiples of `tile`), the rest decode rows
    (one query each); prefill tiles come first, each kind in order of position. Drawn without replacement with
    a weight proportional to the number of keys before the tile: a sparse budget rolls with the context, so a
    late tile decides over more keys than an early one, and decoding happens at the end. The last full tile
    and the last position are always in. The first tile has no key to choose and is never drawn unless there
    is nothing else. Short prompts give fewer tiles. `count` None: every aligned tile, and one decode row out
    of each.

    questions, answers: half-open token spans of questions (with their answers) and of answers. The tiles of questions
    and the rows that predict answers come first, up to three quarters of each kind: what a sparse prefill loses, it
    loses there.
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
        candidates = _prefill_candidates(n_tokens, tile, bool(questions))
        asked = [index for index, (start, length) in enumerate(candidates) if _touches(questions, start, length)]
        prefill = candidates[_draw(rng, candidates[:, 0], count // 2, asked)]
        predicting = [position for start, stop in answers for position in range(start - 1, stop - 1)]
        rows = _draw(rng, np.arange(n_tokens), count - count // 2, predicting)
    decode = np.stack([rows, np.ones_like(rows)], axis=1)
    return np.concatenate([prefill, decode]).astype(np.int32)


def _prefill_candidates(n_tokens: int, tile: int, ragged: bool) -> np.ndarray:
    """Full tiles with keys before them; in a short prompt, or if `ragged`, the ragged last tile too, or the first."""
    full = np.arange(tile, n_tokens - tile + 1, tile)
    found = np.stack([full, np.full_like(full, tile)], axis=1)
    rest = n_tokens % tile
    if len(full) and not (ragged and rest > 1):
        return found
    start = tile * (n_tokens // tile) if len(full) else tile if n_tokens > tile + 1 else 0
    length = min(tile, n_tokens - start)
    last = np.array([[start, length]] if length > 1 else np.empty((0, 2)), int)
    return np.concatenate([found, last]) if len(full) else last


def _touches(spans: Spans, start: int, length: int) -> bool:
    return any(begin < start + length and start < stop for begin, stop in spans)


def _draw(rng: np.random.Generator, weights: np.ndarray, count: int, wanted: Sequence[int] = ()) -> np.ndarray:
    """`count` indices into `weights` in ascending order: the last one, `wanted` ones, and others drawn by weight."""
    if count < 1 or not len(weights):
        return np.empty(0, int)
    last = len(weights) - 1
    first = [last]
    bound = sorted(set(wanted) - {last})
    room = min(len(bound), max(0, int(count * _QUESTIONS) - (last in wanted)))
    if room:
        first += rng.choice(bound, size=room, replace=False).tolist()
    others = np.setdiff1d(np.flatnonzero(weights[:-1] > 0), first)
    count = min(count - len(first), len(others))
    chosen = others[:0]
    if count > 0:
        weight = weights[others] / weights[others].sum()
        chosen = rng.choice(others, size=count, replace=False, p=weight)
    return np.sort(np.concatenate([chosen, first]).astype(int))
