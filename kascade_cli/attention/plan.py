"""Who does what: the role of every layer under a strategy, fixed when a model is attached."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.models import ModelInfo
from kascade_cli.schema import PHASES, Budget, Profile

# name -> what it does, as the help and the docs print it
STRATEGIES = {
    "dense": "the model's own attention",
    "kascade": "anchors choose keys, reuse layers read them through the head map",
    "kascade-pooled": "one key set per anchor and tile, pooled over all heads",
    "kascade-no-remap": "reuse layers read the keys of the anchor head with their own number",
    "kascade-decode-only": "dense prefill, kascade decode",
    "kascade-reused-norm": "anchors normalise their prefill scores over the keys of the anchor before",
    "kascade-refresh": "kascade that chooses keys every N decode steps; between, those and all newer ones",
    "oracle": "every layer chooses its own keys; the first layer is dense",
    "streaming-llm": "4 sink tokens and a sliding window of the same budget, in every layer",
}
REUSED_NORM = "kascade-reused-norm"
REFRESH = "kascade-refresh"
REFRESH_EVERY = 8
SINKS = 4


@dataclass(frozen=True)
class LayerPlan:
    """One full-attention layer in one phase.

    attends: `dense`, `selected` (keys it or an anchor chose) or `window` (sinks and the most recent keys).
    writes: it selects keys from its own scores. sources: per KV head (anchor layer, anchor head), for reuse.
    norm: the anchor over whose keys prefill scores are normalised; None: over the whole causal row.
    """

    attends: str
    writes: bool = False
    sources: tuple[tuple[int, int], ...] = ()
    norm: int | None = None


@dataclass(frozen=True)
class Plan:
    """Roles of all full-attention layers for both phases, and the budget.

    refresh: decode steps from one choice of keys to the next; None where every step chooses.
    """

    strategy: str
    budget: Budget
    pooled: bool
    layers: dict[str, dict[int, LayerPlan]]
    roles: dict[int, str]
    refresh: int | None = None
    _head_maps: dict[tuple[str, int, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def head_map(self, phase: str, layer: int, device: torch.device) -> Tensor:
        """Anchor head of each KV head of a reuse layer with one anchor, int32 [G].

        Made once per device: a copy from the host in every step would keep decoding out of CUDA graphs.
        """
        key = (phase, layer, device)
        if key not in self._head_maps:
            heads = [head for _, head in self.layers[phase][layer].sources]
            self._head_maps[key] = torch.tensor(heads, dtype=torch.int32, device=device)
        return self._head_maps[key]

    def counts(self, visible: Tensor) -> Tensor:
        """k(N) for a tensor of N, int32, on its device: Budget.count without leaving the device."""
        wanted = torch.ceil(visible.double() * self.budget.ratio - 1e-6).clamp_min(self.budget.min_keys)
        return torch.minimum(wanted, visible.double()).int()

    def layer_counts(self, phase: str) -> tuple[int, int]:
        """(layers that attend densely, layers that attend sparsely)."""
        dense = sum(layer.attends == "dense" for layer in self.layers[phase].values())
        return dense, len(self.layers[phase]) - dense


def make_plan(
    info: ModelInfo,
    profile: Profile | None,
    strategy: str = "kascade",
    *,
    ratio: float | None = None,
    min_keys: int | None = None,
    tile: int | None = None,
    refresh: int | None = None,
) -> Plan:
    """The plan of `strategy` for the model described by `info`; options left out come from the profile.

    Raises UsageError for an unknown strategy, a ratio outside (0, 1], a missing profile, or `refresh` with another
    strategy than kascade-refresh, and KascadeError for a profile of another shape.
    """
    check_strategy(strategy, profile, ratio)
    refresh = check_refresh(strategy, refresh)
    for name, value in (("min-keys", min_keys), ("tile", tile)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} must be 1 or more")
    base = profile.budget if profile else Budget()
    given = {"ratio": ratio, "min_keys": min_keys, "tile": tile}
    budget = base.model_copy(update={key: value for key, value in given.items() if value is not None})
    if profile is not None:
        _check_shape(info, profile)
    layers = {phase: _phase_layers(info, profile, strategy, phase) for phase in PHASES}
    return Plan(strategy, budget, strategy == "kascade-pooled", layers, _roles(info, profile, strategy), refresh)


def check_strategy(strategy: str, profile: Profile | None, ratio: float | None = None) -> None:
    """Raises UsageError for an unknown strategy, one without the profile that it needs, or a ratio outside (0, 1]."""
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy '{strategy}' is not known; use one of {', '.join(STRATEGIES)}")
    if strategy.startswith("kascade") and profile is None:
        raise UsageError(f"strategy {strategy} needs a profile (--profile)")
    if ratio is not None and not 0 < ratio <= 1:
        raise UsageError(f"ratio {ratio:g} is outside (0, 1]")


def check_refresh(strategy: str, refresh: int | None) -> int | None:
    """How often `strategy` chooses keys (None: in every step). Raises UsageError."""
    if strategy != REFRESH:
        if refresh is not None:
            raise UsageError(f"--refresh is for strategy {REFRESH}, not {strategy}")
        return None
    if refresh is not None and refresh < 1:
        raise UsageError(f"refresh {refresh} must be 1 or more")
    return REFRESH_EVERY if refresh is None else refresh


def _check_shape(info: ModelInfo, profile: Profile) -> None:
    card = profile.model
    for name in ("layers", "query_heads", "kv_heads", "head_dim"):
        if getattr(card, name) != getattr(info, name):
            raise KascadeError(
                f"the profile is for {card.name} with {getattr(card, name)} {name.replace('_', ' ')}; "
                f"{info.name} has {getattr(info, name)}"
            )
    if profile.attention_layers != info.profiled_layers:
        raise KascadeError(f"the profile's full-attention layers are not those of {info.name}; profile it again")


def _phase_layers(info: ModelInfo, profile: Profile | None, strategy: str, phase: str) -> dict[int, LayerPlan]:
    first = info.profiled_layers[0]
    if strategy == "dense" or (strategy == "kascade-decode-only" and phase == "prefill"):
        return {index: LayerPlan("dense") for index in info.profiled_layers}
    if strategy == "streaming-llm":
        return {index: LayerPlan("window") for index in info.profiled_layers}
    if strategy == "oracle":
        return {
            index: LayerPlan("dense" if index == first else "selected", index != first)
            for index in info.profiled_layers
        }
    plans = {}
    reused = strategy == REUSED_NORM and phase == "prefill"
    before = None  # the anchor before
    for index in info.profiled_layers:
        role = profile.layers[index].role
        if role == "reuse":
            plans[index] = LayerPlan("selected", sources=_sources(info, profile, strategy, index, phase))
        elif role == "dense":
            plans[index], before = LayerPlan("dense", writes=True), index
        else:
            plans[index] = LayerPlan("selected", writes=True, norm=before if reused else None)
            before = index
    return plans


def _sources(info: ModelInfo, profile: Profile, strategy: str, index: int, phase: str) -> tuple[tuple[int, int], ...]:
    entries = profile.head_map(index, phase)
    if strategy == "kascade-no-remap":
        return tuple((anchor, head) for head, (anchor, _) in enumerate(entries))
    if strategy == "kascade-pooled":
        return tuple((profile.layers[index].anchor, 0) for _ in entries)
    return tuple(entries)


def _roles(info: ModelInfo, profile: Profile | None, strategy: str) -> dict[int, str]:
    roles = dict.fromkeys(range(info.layers), "passthrough")
    for index in info.profiled_layers:
        if strategy.startswith("kascade"):
            roles[index] = profile.layers[index].role
        elif strategy == "dense" or (strategy == "oracle" and index == info.profiled_layers[0]):
            roles[index] = "dense"
        else:
            roles[index] = "window" if strategy == "streaming-llm" else "anchor"
    return roles
