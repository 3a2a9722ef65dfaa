"""Scores of strategies on the same questions, with intervals that know that questions of a prompt belong together."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kascade_cli.console import format_size
from kascade_cli.errors import KascadeError
from kascade_cli.evaluation.answering import answer, answer_shared
from kascade_cli.evaluation.cases import Case, score_question
from kascade_cli.processes import Team
from kascade_cli.schema import Budget
from kascade_cli.sparse import Setting
from kascade_cli.sparse.strategy import strategy_class
from kascade_cli.tasks import Interval, cluster_interval, paired_interval

MEAN = "mean"  # the unweighted mean over tasks


@dataclass(frozen=True)
class Run:
    """One row of the table: how attention runs. Several settings are draws that it is averaged over."""

    label: str
    settings: tuple[Setting, ...]
    draws: bool = False

    @property
    def strategy(self) -> str:
        return self.settings[0].strategy

    @property
    def needs_profile(self) -> bool:
        return strategy_class(self.strategy).needs_profile


@dataclass
class Outcome:
    """What a run gave. right: float64 [draws, questions], 0 to 1; density per phase and `all`, mean over draws."""

    run: Run
    right: np.ndarray
    density: dict[str, float]
    budget: dict[str, Any]
    backend: str
    seconds: float
    fallbacks: dict[str, str] = field(default_factory=dict)
    head_maps: str | None = None  # what is to say of them

    @property
    def values(self) -> np.ndarray:
        """Per question the mean over draws."""
        return self.right.mean(0)


def run_cases(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    run: Run,
    *,
    advance: Callable[[int], None] = lambda tokens: None,
    team: Team | None = None,
) -> Outcome:
    """Answers every question of every case under `run`. `advance(tokens)` is called after each case and draw.

    team: processes that share the cases; all but the leader are in `answering.follow_answers`.
    """
    began = time.perf_counter()
    right, densities = [], []
    for setting in run.settings:
        row: list[float] = []
        share = answer if team is None else functools.partial(answer_shared, team)
        written, report = share(model, setting, cases, lambda index: advance(cases[index].tokens))
        for case, answers in zip(cases, written, strict=True):
            pairs = zip(answers, case.questions, strict=True)
            row += [score_question(tokenizer, tokens, question) for tokens, question in pairs]
        right.append(row)
        densities.append({"all": report["density"]} | {p: v["density"] for p, v in report["phases"].items()})
    density = {key: float(np.mean([entry[key] for entry in densities])) for key in densities[0]}
    return Outcome(
        run,
        np.array(right, np.float64),
        density,
        report["budget"],
        report["backend"],
        time.perf_counter() - began,
        report["fallbacks"],
        report.get("head_maps"),
    )


def run_table(
    model: Any,
    tokenizer: Any,
    cases: Mapping[int, Sequence[Case]],
    runs: Sequence[Run],
    progress: Callable[[str, int], None] = lambda what, tokens: None,
    tell: Callable[[str], None] = lambda text: None,
    team: Team | None = None,
) -> list[dict[str, Any]]:
    """One JSON row (`summarise`) per length and run; the first dense run is what the others are compared with.

    `progress(what runs, tokens read since the last call)`. Raises KascadeError, before anything else is run, if dense
    attention answers nothing; `tell` gets one line for a task of several of which that is true.
    """
    rows = []
    for length, part in cases.items():
        dense = None
        for run in runs:
            what = f"{run.label} at {format_size(length)}"
            progress(what, 0)
            outcome = run_cases(
                model, tokenizer, part, run, advance=lambda tokens, what=what: progress(what, tokens), team=team
            )
            if run.strategy == "dense" and dense is None:
                dense = outcome
                check_answered(outcome, part, tell)
            rows.append({"length": length} | summarise(outcome, part, dense))
    return rows


def check_answered(dense: Outcome, cases: Sequence[Case], tell: Callable[[str], None]) -> None:
    """Tables of zeros say nothing: see `run_table`."""
    kinds = [question.task for case in cases for question in case.questions]
    lost = [name for name in dict.fromkeys(kinds) if not _scores_of(dense, kinds, name).any()]
    if lost and len(lost) == len(set(kinds)):
        raise KascadeError(f"dense answers 0 of {len(kinds)}: choose another task or model")
    for name in lost:
        tell(f"{name}: dense answers 0 of {kinds.count(name)}, so its column says nothing")


def _scores_of(outcome: Outcome, kinds: Sequence[str], name: str) -> np.ndarray:
    return outcome.values[np.array([kind == name for kind in kinds])]


def draws_interval(
    right: np.ndarray,
    clusters: Sequence[int],
    *,
    least: float = 0.0,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over draws and questions; percentile bootstrap over draws and prompts, both resampled. Of one prompt it is
    all that is possible: `least` to 1.

    right: float64 [draws, questions]; clusters: the prompt of each question.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    size = np.bincount(index).astype(np.float64)
    if len(size) == 1:
        return Interval(float(right.mean()), least, 1.0, right.shape[1], 1)
    total = np.stack([np.bincount(index, row, len(size)) for row in right])
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        draw = rng.integers(0, len(right), len(right))
        prompt = rng.integers(0, len(size), len(size))
        means[i] = total[np.ix_(draw, prompt)].sum() / (size[prompt].sum() * len(right))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(right.mean()), float(low), float(high), right.shape[1], len(size))


def summarise(outcome: Outcome, cases: Sequence[Case], baseline: Outcome | None) -> dict[str, Any]:
    """One JSON row: scores in points of 100 per task and their mean, with 95 % limits, and differences to `baseline`.

    Scores have cluster intervals (tasks.cluster_interval), differences a paired bootstrap over prompts; with several
    draws both are bootstraps over prompts and draws.
    """
    kinds = np.array([question.task for case in cases for question in case.questions])
    clusters = np.array([index for index, case in enumerate(cases) for _ in case.questions])
    names = list(dict.fromkeys(kinds.tolist()))
    scores = {}
    for name in names:
        part = kinds == name
        reference = baseline.values[part] if baseline else None
        scores[name] = _score(outcome, outcome.right[:, part], reference, clusters[part])
    # Where a short haystack had no room for all questions of a kind, weights keep the mean one over tasks.
    counts = {name: int((kinds == name).sum()) for name in names}
    weights = np.array([len(kinds) / (len(names) * counts[kind]) for kind in kinds.tolist()])
    even = len(set(counts.values())) == 1
    weights = np.ones_like(weights) if even else weights
    reference = baseline.values * weights if baseline else None
    overall = _score(outcome, outcome.right * weights, reference, clusters, plain=even)
    run, budget = outcome.run, Budget(**outcome.budget)
    row = {
        "strategy": run.label,
        "ratio": None if run.strategy == "dense" else budget.ratio_at(max(case.tokens for case in cases)),
        "min_keys": None if run.strategy == "dense" else outcome.budget["min_keys"],
        "density": {key: round(value, 4) for key, value in outcome.density.items()},
        "scores": scores,
        MEAN: overall,
        "seconds": round(outcome.seconds, 2),
        "backend": outcome.backend,
    }
    if budget.ratios is not None and run.strategy != "dense":
        row["ratios"] = budget.ratios  # `ratio` is that of the longest prompt
    if outcome.head_maps is not None:
        row["head_maps"] = outcome.head_maps
    if run.needs_profile:
        anchors = [setting.profile.anchors for setting in run.settings]
        row["anchors"] = anchors if run.draws else anchors[0]
    if options := strategy_class(run.strategy).read_options(run.settings[0].options):
        row["options"] = options
    if run.draws:
        row["draws"] = [round(100 * float((right * weights).mean()), 2) for right in outcome.right]
    return row


def _score(
    outcome: Outcome, right: np.ndarray, reference: np.ndarray | None, clusters: np.ndarray, plain: bool = True
) -> dict[str, Any]:
    difference = None
    if outcome.run.draws:
        score = draws_interval(right, clusters, least=0.0)
        if reference is not None:
            difference = draws_interval(right - reference, clusters, least=-1.0)
    else:
        values = right[0]
        score = cluster_interval(values, clusters) if plain else _mean_interval(values, clusters)
        if reference is not None and outcome.run.strategy != "dense":
            difference = paired_interval(values, reference, clusters)
    document = _points(score) | {"questions": score.count, "prompts": score.clusters}
    return document if difference is None else document | {"vs_dense": _points(difference)}


def _mean_interval(values: np.ndarray, clusters: np.ndarray) -> Interval:
    """Of weighted values: a bootstrap, and where it finds no width (all right, or one prompt) what as many plain
    answers of that mean say.
    """
    found = paired_interval(values, 0 * values, clusters)
    if found.clusters > 1 and found.low < found.high:
        return found
    return cluster_interval(np.full(len(values), min(1.0, max(0.0, found.mean))), clusters)


def _points(interval: Interval) -> dict[str, float]:
    return {
        "score": round(100 * interval.mean, 2),
        "low": round(100 * interval.low, 2),
        "high": round(100 * interval.high, 2),
    }
