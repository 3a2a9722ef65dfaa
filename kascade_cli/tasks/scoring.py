"""How answers are scored, and the uncertainty of the mean when questions come in prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kascade_cli.errors import KascadeError


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence limits; `count` values in `clusters` prompts."""

    mean: float
    low: float
    high: float
    count: int
    clusters: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def exact_match(prediction: str, answer: str, *, prefix: bool = False) -> bool:
    """Whether all words agree, whitespace aside. `prefix`: words beyond the answer's count are ignored."""
    wanted, got = answer.split(), prediction.split()
    return (got[: len(wanted)] if prefix else got) == wanted


SCORES = ("exact", "all", "any")


def score_answer(prediction: str, answers: Sequence[str], how: str) -> float:
    """Between 0 and 1. `exact`: all words of the first answer and no others. `all`: the share of the answers that the
    prediction holds somewhere, case aside (RULER's string_match_all). `any`: whether it holds one of them
    (string_match_part). White space counts as one blank.
    """
    if how == "exact":
        return float(exact_match(prediction, answers[0]))
    text = " ".join(prediction.lower().split())
    found = [" ".join(answer.lower().split()) in text for answer in answers]
    return float(any(found)) if how == "any" else sum(found) / len(found)


def _by_cluster(values: Sequence[float], clusters: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of values, number of values) per cluster, float64 [C] each."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise KascadeError("no answers to score: ask for at least one prompt and one question")
    if x.shape != np.shape(clusters):
        raise ValueError(f"{x.shape} values and {np.shape(clusters)} cluster labels")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, x), np.bincount(index).astype(np.float64)


def _quantile(clusters: int, level: float) -> float:
    """Two-sided quantile of Student's t with `clusters - 1` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(max(1, clusters - 1), (1 + level) / 2))


def cluster_interval(values: Sequence[float], clusters: Sequence[int], level: float = 0.95) -> Interval:
    """Interval of a proportion when the `values` (0 to 1) of one cluster (prompt) are correlated.

    Wilson's interval at the effective sample size n / deff, `deff` being the variance of the ratio estimator
    over clusters divided by the binomial one (Kish's design effect, floored at 1), with a t quantile for few
    clusters. It stays inside [0, 1] and has a width at 0 and 1, where a bootstrap has none. When all values
    agree there is nothing to estimate `deff` from and 1 is taken; a single cluster counts as one observation.
    """
    total, size = _by_cluster(values, clusters)
    n, c = size.sum(), len(size)
    p = total.sum() / n
    if c == 1:
        effective = 1.0
    elif 0 < p < 1:
        variance = c / (c - 1) * np.sum((total - p * size) ** 2) / n**2
        effective = n / max(1.0, variance / (p * (1 - p) / n))
    else:
        effective = n
    z = _quantile(c, level) if c > 1 else _quantile(10**6, level)
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(float(p), min(float(low), float(p)), max(float(high), float(p)), int(n), c)


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[int],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(first) - mean(second) on the same questions: percentile bootstrap over clusters.

    One cluster says nothing about others: its interval is all that is possible, -1 to 1.
    """
    difference, size = _by_cluster(np.subtract(first, second), clusters)
    if len(size) == 1:
        return Interval(float(difference.sum() / size.sum()), -1.0, 1.0, int(size.sum()), 1)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(size), (resamples, len(size)))
    means = difference[draws].sum(1) / size[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = difference.sum() / size.sum()
    return Interval(float(mean), float(low), float(high), int(size.sum()), len(size))
