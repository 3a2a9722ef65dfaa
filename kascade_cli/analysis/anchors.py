"""Which layers become anchors, and which head of an anchor each reuse head reads (paper, section 3.3).

Layers count within the profiled layers. Gains are 64-bit fixed point (2^-40), so that sums are exact, brute
force and dynamic programme agree to the last bit, and a tie is a tie on every machine: the
lexicographically smallest anchor set wins, and among heads the lowest.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ONE = 1 << 40  # fixed-point 1.0
_NEVER = np.iinfo(np.int64).min // 4


@dataclass(frozen=True)
class AnchorSet:
    """Anchors 0 = a_1 < ... < a_M and the fixed-point objective they reach."""

    anchors: tuple[int, ...]
    value: int

    @property
    def objective(self) -> float:
        return self.value / ONE


def layer_similarity(sim: np.ndarray) -> np.ndarray:
    """S[a,b] = mean_g max_{g'} sim[a,b,g',g]; float64 [L, L] from [L, L, G, G]."""
    return sim.max(axis=2).mean(axis=2, dtype=np.float64)


def head_map(sim: np.ndarray, anchor: int, layer: int) -> list[int]:
    """m[b,g] = argmax_{g'} sim[a,b,g',g], ties to the lowest g'."""
    return sim[anchor, layer].argmax(axis=0).tolist()


def fixed(values: np.ndarray) -> np.ndarray:
    """float64 -> 64-bit fixed point."""
    return np.rint(values * ONE).astype(np.int64)


def layer_gains(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fixed-point w[b] * S[a,b], int64 [L, L]; 0 where a > b."""
    return np.triu(fixed(weights[None, :] * similarity))


def nearest_value(gains: np.ndarray, anchors: tuple[int, ...]) -> int:
    """sum_b gains[anchor(b), b], anchor(b) the nearest anchor at or before b."""
    ends = (*anchors[1:], len(gains))
    return sum(int(gains[a, a:end].sum()) for a, end in zip(anchors, ends, strict=True))


def _segments(gains: np.ndarray) -> np.ndarray:
    """C[i, j] = sum_{b=i..j-1} gains[i, b] as int64 [L, L+1]: layers i..j-1 all reading anchor i."""
    total = len(gains)
    return np.concatenate([np.zeros((total, 1), np.int64), np.cumsum(gains, axis=1)], axis=1)


def best_sets(gains: np.ndarray, max_anchors: int) -> list[AnchorSet]:
    """The best anchor set of every size 1..max_anchors; O(M L^2).

    F[m][i] is the most that layers i.. can give when i is an anchor and m anchors remain, i included;
    walking forward and taking the earliest optimal next anchor gives the lexicographically smallest set.
    """
    total = len(gains)
    segments = _segments(gains)
    inner = np.where(np.triu(np.ones((total, total), bool), 1), segments[:, :total], _NEVER)
    best = [segments[:, total]]
    for _ in range(1, max_anchors):
        best.append(np.maximum((inner + best[-1][None, :]).max(axis=1), _NEVER))
    found = []
    for size in range(1, max_anchors + 1):
        anchors = [0]
        for remaining in range(size - 1, 0, -1):
            anchors.append(int((inner[anchors[-1]] + best[remaining - 1]).argmax()))
        found.append(AnchorSet(tuple(anchors), int(best[size - 1][0])))
    return found


def k_best_sets(gains: np.ndarray, max_anchors: int, count: int) -> list[list[AnchorSet]]:
    """The `count` best anchor sets of every size 1..max_anchors, best first, ties lexicographic; exact.

    The same recursion with the `count` best continuations kept per state.
    """
    total = len(gains)
    segments = _segments(gains)
    # Lists of (-value, anchors from i on), sorted: tuples order by value first, then lexicographically.
    table = [[(-int(segments[i, total]), (i,))] for i in range(total)]
    found = [[AnchorSet(anchors, -value) for value, anchors in table[0]]]
    for _ in range(1, max_anchors):
        fresh = []
        for i in range(total):
            options = (
                (value - int(segments[i, j]), (i, *anchors))
                for j in range(i + 1, total)
                for value, anchors in table[j]
            )
            fresh.append(heapq.nsmallest(count, options))
        table = fresh
        found.append([AnchorSet(anchors, -value) for value, anchors in table[0]])
    return found


@dataclass(frozen=True)
class FreeSet:
    """Anchors under free assignment. `proven` says that the solver closed the gap."""

    anchors: tuple[int, ...]
    value: int
    proven: bool

    @property
    def objective(self) -> float:
        return self.value / ONE


def client_gains(sims: Mapping[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """What each client, a (phase, layer b, head g), gains from anchor layer a: int64 [L, phases * L * G].

    gain = w[b] * max_{g'} sim[a,b,g',g] / (G * phases), 0 where a > b, so that the sum over clients is the
    objective.
    """
    columns = []
    for sim in sims.values():
        layers, _, _, heads = sim.shape
        per_head = sim.max(axis=2) * weights[None, :, None] / (heads * len(sims))
        per_head[np.tril_indices(layers, -1)] = 0
        columns.append(per_head.reshape(layers, -1))
    return fixed(np.concatenate(columns, axis=1))


def free_value(gains: np.ndarray, anchors: tuple[int, ...]) -> int:
    """Each client takes the best anchor open to it: sum of column maxima over `anchors`."""
    return int(gains[list(anchors)].max(axis=0).sum())


def free_set(gains: np.ndarray, layers: int, size: int, start: tuple[int, ...], time_limit: float = 300.0) -> FreeSet:
    """The p-median problem: `size` anchors, layer 0 among them, that maximise `free_value`.

    A MILP for HiGHS with binary x[a] (layer a is an anchor) and y[a, c] <= x[a] (client c reads a), sum_a
    y[a, c] = 1; y needs no integrality, since for integral x each client's best choice is a vertex. `start`
    (the DP's set) is the floor: its value is returned where the solver's is lower by rounding.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    # An anchor only matters to a client where it gives something more than layer 0, which is always open.
    extra = np.maximum(gains - gains[0], 0)
    extra[0] = 0
    anchor_of, client_of = np.nonzero(extra)
    arcs = len(anchor_of)
    rows = np.arange(arcs)
    clients, client_row = np.unique(client_of, return_inverse=True)
    open_only = csr_matrix(
        (np.r_[np.ones(arcs), -np.ones(arcs)], (np.r_[rows, rows], np.r_[layers + rows, anchor_of])),
        shape=(arcs, layers + arcs),
    )
    one_each = csr_matrix((np.ones(arcs), (client_row, layers + rows)), shape=(len(clients), layers + arcs))
    count = csr_matrix(np.r_[np.ones(layers), np.zeros(arcs)][None, :])
    # Scaled so that the solver's absolute tolerance of 1e-6 is 1e-10 of the largest possible objective.
    scale = 1e4 / max(int(gains.max(axis=0).sum()), 1)
    lower = np.r_[1, np.zeros(layers - 1 + arcs)]
    result = milp(
        np.r_[np.zeros(layers), -extra[anchor_of, client_of] * scale],
        constraints=[
            LinearConstraint(open_only, -np.inf, 0),
            LinearConstraint(one_each, -np.inf, 1),
            LinearConstraint(count, size, size),
        ],
        integrality=np.r_[np.ones(layers), np.zeros(arcs)],
        bounds=Bounds(lower, 1),
        options={"mip_rel_gap": 0.0, "time_limit": time_limit},
    )
    floor = FreeSet(start, free_value(gains, start), result.status == 0)
    if result.x is None:
        return floor
    anchors = tuple(int(index) for index in np.flatnonzero(result.x[:layers] > 0.5))
    found = FreeSet(anchors, free_value(gains, anchors), result.status == 0)
    return found if (found.value, floor.anchors) > (floor.value, found.anchors) else floor


def free_head_map(sim: np.ndarray, anchors: tuple[int, ...], layer: int) -> list[tuple[int, int]]:
    """Per head of `layer`, the (anchor, head) that serves it best; ties to the nearest anchor, then the
    lowest head.
    """
    open_to = [anchor for anchor in reversed(anchors) if anchor <= layer]
    flat = sim[open_to, layer].reshape(-1, sim.shape[3])
    heads = sim.shape[2]
    return [(open_to[index // heads], index % heads) for index in flat.argmax(axis=0).tolist()]
