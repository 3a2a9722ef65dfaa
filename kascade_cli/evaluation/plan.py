"""Which rows a table will have: strategies at ratios, and kascade with other anchors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kascade_cli.errors import UsageError
from kascade_cli.evaluation.anchors import HeadMaps, random_sets, with_anchors
from kascade_cli.evaluation.run import Run
from kascade_cli.models import ModelInfo
from kascade_cli.sparse import Setting

AnchorSets = Mapping[str, int | list[int]]  # what was asked for -> number of random draws, or layers


def parse_strategies(text: str, base: Setting) -> list[tuple[str, Setting]]:
    """`dense,kascade,streaming-llm:ratio=0.3` -> [(label, setting)] over `base`. Raises UsageError."""
    labels = [name.strip() for name in text.split(",")]
    if len(set(labels)) < len(labels):
        raise UsageError(f"--strategies {text} names a strategy twice")
    defaults = {name: getattr(base, name) for name in ("profile", "min_keys", "backend", "allow_other_weights")}
    return [(label, Setting.parse(label, **defaults)) for label in labels]


def check_strategies(named: Sequence[tuple[str, Setting]], ratios: Sequence[float | None]) -> None:
    """Refuses what cannot work before a model is loaded. Raises UsageError."""
    for _, setting in named:
        for ratio in ratios:
            (setting if setting.ratio is not None else setting.override(ratio=ratio)).check()


def anchors_label(chosen: int | list[int]) -> str:
    """What a row with other anchors is called."""
    return "random" if isinstance(chosen, int) else f"kascade[{','.join(map(str, chosen))}]"


def plan_runs(
    named: Sequence[tuple[str, Setting]],
    ratios: Sequence[float | None],
    sets: AnchorSets,
    capture: Path | None,
    info: ModelInfo,
    base: Setting,
    seed: int,
) -> tuple[list[Run], str]:
    """(what to run for each length, where the head maps of other anchors come from: capture, or none: pooled).

    dense has no budget: one row is enough, and comes first, as the others are compared with it. So does a strategy
    that brings a ratio of its own.
    """
    runs = [Run(label, (setting,)) for label, setting in named if setting.strategy == "dense"]
    # Where the profile reads one set for all heads, other anchors are compared with it as they are read like it.
    maps = HeadMaps(info, capture if sets and not base.profile.pooled else None)
    for number, ratio in enumerate(ratios):
        for label, setting in named:
            if setting.strategy == "dense" or (setting.ratio is not None and number):
                continue
            runs.append(Run(label, (setting if setting.ratio is not None else setting.override(ratio=ratio),)))
        for chosen in sets.values():
            many = isinstance(chosen, int)
            drawn = random_sets(info, base.profile.anchors, chosen, seed) if many else [chosen]
            profiles = [with_anchors(base.profile, info, layers, maps) for layers in drawn]
            settings = tuple(
                Setting("kascade", profile, ratio, base.min_keys, None, base.backend, base.allow_other_weights)
                for profile in profiles
            )
            runs.append(Run(anchors_label(chosen), settings, draws=many))
    return runs, "capture" if maps.sims else "no"  # head maps
