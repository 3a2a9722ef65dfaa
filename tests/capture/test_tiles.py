"""Which tiles are sampled: valid, late ones more often, questions always."""

import numpy as np
import pytest

from kascade_cli.capture.tiles import sample_tiles


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 34, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("count", [1, 2, 7, 32, None])
def test_sampled_tiles_are_valid(length, count):
    tiles = sample_tiles(length, count, tile=32, seed=0, prompt=0)
    assert tiles.dtype == np.int32
    assert tiles.shape[1] == 2
    prefill, decode = tiles[tiles[:, 1] > 1], tiles[tiles[:, 1] == 1]
    assert (tiles.sum(axis=1) <= length).all()
    assert not (prefill[:, 0] % 32).any()
    assert len({tuple(tile) for tile in tiles}) == len(tiles)
    assert [length - 1, 1] in tiles.tolist()
    assert (tiles == np.concatenate([prefill, decode])).all()
    assert (np.diff(prefill[:, 0]) > 0).all()
    assert (np.diff(decode[:, 0]) > 0).all()
    if count is None:
        assert len(prefill) == length // 32 + (length % 32 > 1)
        assert len(decode) == -(-length // 32)
    else:
        assert len(prefill) == min(count // 2, max(length // 32 - 1, min(length - 1, 1)))
        assert len(decode) == min(count - count // 2, max(length - 1, 1))  # position 0 sees itself only
        if length >= 64:
            assert (prefill[:, 1] == 32).all()
            assert (prefill[:, 0] >= 32).all()


def test_sampling_favours_late_tiles_and_repeats():
    first = sample_tiles(8192, 32, tile=32, seed=5, prompt=7)
    assert (first == sample_tiles(8192, 32, tile=32, seed=5, prompt=7)).all()
    assert (first != sample_tiles(8192, 32, tile=32, seed=5, prompt=8)).any()
    assert (first != sample_tiles(8192, 32, tile=32, seed=6, prompt=7)).any()
    means = [sample_tiles(8192, 32, tile=32, seed=0, prompt=p)[:, 0].mean() / 8192 for p in range(50)]
    assert 0.62 < np.mean(means) < 0.74  # 2/3: proportional to the keys before it


def test_tiles_of_questions_and_rows_of_answers_are_always_sampled():
    """Up to three quarters of each kind; the rest is drawn as without questions."""
    questions, answers = [(3000, 3060), (3100, 3150), (4060, 4090)], [(3050, 3060), (3140, 3150), (4080, 4090)]
    for prompt in range(8):
        tiles = sample_tiles(4090, 32, tile=32, seed=0, prompt=prompt, questions=questions, answers=answers)
        prefill, rows = tiles[tiles[:, 1] > 1], tiles[tiles[:, 1] == 1][:, 0]
        assert (len(prefill), len(rows)) == (16, 16)
        for start, stop in questions:
            wanted = set(range(start // 32 * 32, stop, 32))
            assert wanted <= set(prefill[:, 0].tolist())  # the ragged last tile too
        predicting = {p for start, stop in answers for p in range(start - 1, stop - 1)}
        assert sum(int(row) in predicting for row in rows) >= 12
    many = sample_tiles(4096, 8, tile=32, seed=0, prompt=0, questions=[(1000, 4000)], answers=[(1000, 4000)])
    inside = [1000 - 32 < start < 4000 for start in many[many[:, 1] > 1][:, 0]]
    assert sum(inside) >= 3
    plain = sample_tiles(4096, 32, tile=32, seed=5, prompt=7)
    assert (plain == sample_tiles(4096, 32, tile=32, seed=5, prompt=7, questions=(), answers=())).all()
