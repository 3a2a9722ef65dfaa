"""Head maps for tensor parallelism: KV heads are split evenly and in order, and a head reads its own rank's only.

The search and the maps take a head's best source. Where pairs of different ranks have a similarity below every real
one, they never are the best: so all that is chosen, measured and resampled from it stays within ranks.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kascade_cli.analysis.record import number
from kascade_cli.analysis.similarity import Measured
from kascade_cli.errors import UsageError

if TYPE_CHECKING:
    from kascade_cli.analysis.rows import Row

ELSEWHERE = -1.0  # the similarity of two heads of different ranks; real ones are 0 or more


def check_ranks(ranks: int, heads: int, name: str) -> None:
    """Raises UsageError unless `ranks` divide the KV heads."""
    if ranks < 1 or heads % ranks:
        fits = [str(count) for count in range(1, heads + 1) if heads % count == 0]
        choice = " or ".join(([", ".join(fits[:-1])] if fits[1:] else []) + fits[-1:])
        raise UsageError(f"--tensor-parallel {ranks} does not divide the {heads} KV heads of {name}: take {choice}")


def same_rank(ranks: int, heads: int) -> np.ndarray:
    """bool [G, G]: whether two KV heads are of one rank."""
    rank = np.arange(heads) // (heads // ranks)
    return rank[:, None] == rank[None, :]


def within_ranks(measured: Measured, ranks: int) -> Measured:
    """`measured` as `ranks` ranks see it. Raises UsageError unless they divide the KV heads."""
    heads = measured.meta["kv_heads"]
    check_ranks(ranks, heads, measured.meta["model_name"])
    if ranks == 1:
        return measured
    allowed = same_rank(ranks, heads)
    sim = {phase: np.where(allowed, values, np.float32(ELSEWHERE)) for phase, values in measured.sim.items()}
    return replace(measured, sim=sim)


def ranks_document(ranks: int, row: "Row", free_maps: dict[int, dict[str, list]]) -> dict[str, Any]:
    """For the profile: that its head maps stay within ranks, what that costs, and the free maps beside them."""
    return {
        "ranks": ranks,
        "head_maps": "within ranks",
        "recovered_mass": number(row.recovered_mean),
        "recovered_mass_free": number(row.recovered_free_mean),
        "cost": number(row.recovered_free_mean - row.recovered_mean),
        "free_head_maps": {str(layer): {phase: [_plain(entry) for entry in row] for phase, row in phases.items()}
                           for layer, phases in free_maps.items()},
    }  # fmt: skip


def _plain(entry: Any) -> Any:
    return list(entry) if isinstance(entry, tuple) else entry
