"""Inputs of one measurement, and the three roles of a layer run as an attached model runs them.

The roles go through `attention.forward.Forward`, so that what is timed is what runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kascade_cli.attention.forward import Forward
from kascade_cli.attention.plan import REFRESH, REUSED_NORM, LayerPlan, Plan, check_refresh
from kascade_cli.attention.refresh import Refresh
from kascade_cli.benchmarking.shapes import Shape
from kascade_cli.benchmarking.timing import set_count
from kascade_cli.benchmarking.work import Case
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import Backend
from kascade_cli.schema import Budget

ROLES = ("layer0", "anchor", "reuse")
BETWEEN = ("layer0_between", "reuse_between")  # of a step that reads kept keys: anchors are reuse layers there
_LAYER = {"layer0": 0, "anchor": 1, "reuse": 2, "layer0_between": 0, "reuse_between": 2}
STRATEGIES = ("kascade", REUSED_NORM, REFRESH)  # that can be measured


@dataclass(frozen=True)
class Setting:
    """Where and with what a case runs. refresh: kascade-refresh's decode steps from one choice of keys to the next."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    budget: Budget
    seconds: float = 0.4  # of repeats for each timing
    strategy: str = "kascade"
    refresh: int | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def with_strategy(setting: Setting, strategy: str, refresh: int | None = None) -> Setting:
    """`setting` with another strategy; UsageError for one that cannot be measured or does not take `refresh`."""
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy '{strategy}' is not measured; use {', '.join(STRATEGIES)}")
    return replace(setting, strategy=strategy, refresh=check_refresh(strategy, refresh))


@dataclass
class Inputs:
    """One input set. q [B, H, T, D] (memory [B, T, H, D]); k, v [B, G, S, D]; forward: the state of its pass.

    between: with kascade-refresh, the state of the last step of a cycle, which reads the most keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    forward: Forward
    between: Forward | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


def case_of(shape: Shape, phase: str, batch: int, context: int, setting: Setting) -> Case:
    """The sizes that operations and bytes are counted from."""
    element = torch.empty(0, dtype=setting.dtype).element_size()
    return Case(phase, batch, context, shape.query_heads, shape.kv_heads, shape.head_dim, element, setting.budget)


def role_plan(kv_heads: int, budget: Budget, strategy: str = "kascade") -> Plan:
    """Three layers: dense and anchor, anchor, and one that reuses layer 1 through a head map that is no identity."""
    sources = tuple((1, kv_heads - 1 - head) for head in range(kv_heads))
    layers = {0: LayerPlan("dense", True), 1: LayerPlan("selected", True), 2: LayerPlan("selected", sources=sources)}
    roles = {0: "dense", 1: "anchor", 2: "reuse"}
    prefill = layers | {1: LayerPlan("selected", True, norm=0)} if strategy == REUSED_NORM else layers
    return Plan(strategy, budget, False, {"decode": layers, "prefill": prefill}, roles)


def make_inputs(case: Case, setting: Setting, seed: int = 0) -> Inputs:
    """Random normal q, k, v of a case, and the state of a forward pass over them."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    options = {"device": setting.device, "dtype": setting.dtype, "generator": generator}
    queries = 1 if case.phase == "decode" else case.context
    q = torch.randn(case.batch, queries, case.query_heads, case.head_dim, **options).transpose(1, 2)
    k, v = (torch.randn(case.batch, case.kv_heads, case.context, case.head_dim, **options) for _ in range(2))
    plan = role_plan(case.kv_heads, setting.budget, setting.strategy)
    if case.phase == "prefill" or (setting.refresh or 1) < 2:
        return Inputs(q, k, v, Forward(plan, setting.backend, q, k, None))
    return _refresh_inputs(q, k, v, replace(plan, refresh=setting.refresh), setting.backend)


def _refresh_inputs(q: Tensor, k: Tensor, v: Tensor, plan: Plan, backend: Backend) -> Inputs:
    """A refresh at the full context, whose anchors also keep what they choose; and a cycle that ends there."""
    context, every = k.shape[2], plan.refresh
    if context < every:
        raise KascadeError(f"a context of {context} keys is shorter than a cycle of {every} decode steps")
    refresh = Refresh(every, [layer for layer, role in plan.layers["decode"].items() if role.writes])
    with refresh.only("refresh"):
        inputs = Inputs(q, k, v, Forward(plan, backend, q, k, None, refresh))
    for age in range(every):
        kv_len = context - every + 1 + age
        row = torch.tensor([kv_len - 1, 0, kv_len], dtype=torch.int32, device=q.device)
        mask = row.expand(q.shape[0], 1, 1, 3).contiguous()
        with refresh.only("between" if age else "refresh"), torch.no_grad():
            forward = Forward(plan, backend, q, k, mask, refresh)
            for layer, role in plan.layers["decode"].items():
                if role.writes and not age:
                    forward.attend(layer, role, q, k, v, inputs.scale)
            refresh.finish()
    inputs.between = forward
    return inputs


def make_sets(case: Case, setting: Setting, touched: float, have: Sequence[Inputs] = ()) -> list[Inputs]:
    """As many input sets as leave L2 cold when a call touches `touched` bytes of its set; `have` is kept."""
    sets = list(have)
    wanted = set_count(touched, case.kv_bytes, setting.device) if case.phase == "decode" else 1
    while len(sets) < wanted:
        sets.append(make_inputs(case, setting, seed=len(sets)))
    return sets


def role_call(role: str, inputs: Inputs) -> Callable[[], Any]:
    """The attention of one layer of that role, after `prepare`."""
    forward, layer = inputs.between if role in BETWEEN else inputs.forward, _LAYER[role]
    plan = forward.plan.layers[forward.phase][layer]
    return lambda: forward.attend(layer, plan, inputs.q, inputs.k, inputs.v, inputs.scale)


def prepare(role: str, inputs: Inputs) -> None:
    """Runs the layers whose indices the role reads, unless they have left them."""
    forward = inputs.forward
    plan = forward.plan.layers[forward.phase][_LAYER[role]]
    needed = {anchor for anchor, _ in plan.sources} | {plan.norm}
    for earlier, layer in _LAYER.items():
        if layer in needed - set(forward.indices):
            prepare(earlier, inputs)
            with torch.no_grad():
                role_call(earlier, inputs)()


def pass_call(inputs: Inputs, between: bool = False) -> Callable[[], Any]:
    """What a forward pass does once, whatever the number of layers: lengths and budgets; between refreshes, also
    adding its key to the kept sets."""
    like = inputs.forward

    def begin() -> Any:
        return Forward(like.plan, like.backend, inputs.q, inputs.k, None, like.refresh).counts

    def of_a_kind() -> Any:
        with like.refresh.only("between" if between else "refresh"):
            counts = begin()
            like.refresh.finish()
        return counts

    return begin if like.refresh is None else of_a_kind
