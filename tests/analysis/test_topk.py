import numpy as np
import pytest

from kascade_cli.analysis.topk import to_float32, top_indices


def rows(kind, n):
    rng = np.random.default_rng(n)
    values = rng.random((5, n))
    if kind == "ties":
        values = np.round(values**4 * 6) / 6
    elif kind == "underflow":  # nearly one-hot: most entries are 0 in float16
        values = np.where(rng.random((5, n)) < 0.02, values, 0)
    elif kind == "cluster":
        values[:, n // 2 : n // 2 + 90] += 1
    return values.astype(np.float16)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129, 1023, 1024, 1041, 5000])
@pytest.mark.parametrize("kind", ["plain", "ties", "underflow", "cluster"])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_top_indices_equal_a_full_stable_sort(kind, n, k):
    values = rows(kind, n)
    wanted = np.argsort(-values.astype(np.float64), axis=1, kind="stable")[:, :k]
    found = top_indices(values.view(np.uint16), k)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(wanted, axis=1))


def test_to_float32_is_exact_for_every_float16():
    patterns = np.arange(0x7C00, dtype=np.uint16)
    np.testing.assert_array_equal(to_float32(patterns), patterns.view(np.float16).astype(np.float32))
