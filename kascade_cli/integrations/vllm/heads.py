"""Tensor parallelism: which heads this process holds, and whether the head maps make processes exchange indices."""

from dataclasses import dataclass, replace

from kascade_cli.models import ModelInfo
from kascade_cli.partition import Partition
from kascade_cli.schema import PHASES, Layer, Profile
from kascade_cli.sparse import Setting, Strategy


@dataclass(frozen=True)
class Heads:
    """strategy: for the heads of this process, `rank` of `world`. partition: None where it needs no other process.

    gathers: anchors whose indices (or scores, where a strategy pools them) are gathered from all processes.
    """

    strategy: Strategy
    partition: Partition | None
    rank: int
    world: int
    gathers: tuple[int, ...]

    def describe(self) -> str:
        if self.world == 1:
            return "one process"
        if self.gathers and getattr(self.strategy, "pooled", False):
            return (
                f"scores of layers {list(self.gathers)} gathered from {self.world} processes: all heads read one set"
            )
        if self.gathers:
            return f"keys of layers {list(self.gathers)} gathered from {self.world} processes: head maps cross them"
        return f"{self.world} processes, nothing gathered: every head reads what its own process chose"


def share_heads(setting: Setting, info: ModelInfo) -> Heads:
    """For this process of vLLM's tensor parallel group."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return split(setting, info, Partition(group.rank_in_group, group.world_size, group.device_group))


def split(setting: Setting, info: ModelInfo, whole: Partition) -> Heads:
    """As `share_heads`, for process `whole.rank` of `whole.world`."""
    strategy = setting.make(info.profiled_layers)
    if whole.world == 1:
        return Heads(strategy, None, 0, 1, ())
    own = local_profile(strategy, whole.rank, whole.world)
    if own is not None:
        return Heads(replace(setting, profile=own).make(info.profiled_layers), None, whole.rank, whole.world, ())
    sources = {source for layer in strategy.layers for phase in PHASES for source in strategy.reads(layer, phase)}
    return Heads(strategy, whole, whole.rank, whole.world, tuple(sorted(sources)))


def local_profile(strategy: Strategy, rank: int, world: int) -> Profile | None:
    """The profile of a model that has the heads of process `rank` alone; None if any process's heads read keys that
    another one chose, or keys pooled over all heads.
    """
    profile, sources = strategy.profile, getattr(strategy, "sources", None)
    if profile is None or sources is None or getattr(strategy, "pooled", False):
        return None
    here = profile.model.kv_heads // world
    layers = []
    for index, layer in enumerate(profile.layers):
        if layer.role != "reuse":
            layers.append(layer)
            continue
        heads = {}
        for phase in PHASES:
            entries = sources(index, phase)
            if any(head // here != number // here for number, (_, head) in enumerate(entries)):
                return None
            mine = entries[rank * here : (rank + 1) * here]
            heads[phase] = [(anchor, head - rank * here) for anchor, head in mine]
        layers.append(Layer(role="reuse", anchor=layer.anchor, heads=heads))
    card = profile.model.model_copy(
        update={"kv_heads": here, "query_heads": profile.model.query_heads // world, "fingerprint": None}
    )
    return profile.model_copy(update={"model": card, "layers": layers})
