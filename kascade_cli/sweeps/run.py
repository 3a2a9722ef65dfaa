"""Runs a sweep's points: the score on the tasks and the KL at the answers of each."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kascade_cli.evaluation.cases import Case
from kascade_cli.evaluation.run import Outcome, Run, run_cases, summarise
from kascade_cli.sweeps.document import Result
from kascade_cli.sweeps.kl import AnswerKL, spread
from kascade_cli.sweeps.plan import Point
from kascade_cli.tasks import paired_interval

Advance = Callable[[str, int], None]


def tokens_to_read(cases: Sequence[Case], kl_prompts: int, points: int) -> int:
    """How many tokens a sweep reads, as `advance` counts them (an answer's few tokens aside)."""
    for_kl = sum(case.tokens for case in spread(cases, kl_prompts))
    return points * (sum(case.tokens for case in cases) + for_kl) + for_kl


def run_sweep(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    points: Sequence[Point],
    result: Result,
    *,
    kl_prompts: int,
    advance: Advance = lambda what, tokens: None,
    done: Callable[[Point, dict[str, Any]], None] = lambda point, row: None,
) -> None:
    """Measures the points that `result` lacks, one after the other; `points[0]` is dense.

    `advance(what runs, tokens read since the last call)`; `done(point, row)` after each.
    """
    missing = [point for point in points if not result.has(point)]
    if not missing:
        return
    kl = AnswerKL(model, cases, kl_prompts, advance=lambda tokens: advance("dense answers", tokens))
    dense = None
    for point in points:
        what, is_dense = point.describe(), point.setting.strategy == "dense"
        if result.has(point):
            if is_dense:
                dense = _outcome(point, result.rows[point.key])
            continue
        outcome = run_cases(
            model,
            tokenizer,
            cases,
            Run(point.label, (point.setting,)),
            advance=lambda tokens, what=what: advance(what, tokens),
        )
        dense = outcome if is_dense else dense
        row = _row(point, outcome, cases, dense)
        if kl.prompts:
            values = (
                [0.0] * len(kl.prompts)
                if is_dense
                else kl.measure(point.setting, advance=lambda tokens, what=what: advance(what, tokens))
            )
            row["kl"] = kl_summary(values) | {"positions": kl.positions}
        result.add(point, row)
        done(point, row)


def _row(point: Point, outcome: Outcome, cases: Sequence[Case], dense: Outcome | None) -> dict[str, Any]:
    row = summarise(outcome, cases, dense)
    for name in ("ratio", "anchors", "options"):
        row.pop(name, None)
    # Which answers were right: what a later run compares its new rows with.
    return row | point.at | {"right": outcome.right[0].tolist()}


def _outcome(point: Point, row: dict[str, Any]) -> Outcome:
    """A row of an earlier run as what it was made from."""
    return Outcome(
        Run(point.label, (point.setting,)), np.array([row["right"]], np.float64), row["density"], {}, row["backend"],
        row["seconds"],
    )  # fmt: skip


def kl_summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over prompts in nats, with the percentile bootstrap's 95 % limits over prompts."""
    finite = bool(np.isfinite(values).all())
    interval = paired_interval(values, np.zeros(len(values)), range(len(values))) if finite else None
    return {
        "mean": round(interval.mean, 6) if interval else None,
        "low": round(interval.low, 6) if interval else None,
        "high": round(interval.high, 6) if interval else None,
        "prompts": len(values),
        "per_prompt": [round(value, 6) if np.isfinite(value) else None for value in values],
    }
