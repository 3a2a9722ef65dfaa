"""Inputs of one measurement, and the three roles of a layer run as an attached model runs them.

The roles go through the strategy's own `attend`, so that what is timed is what runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kascade_cli.benchmarking.shapes import Shape
from kascade_cli.benchmarking.timing import set_count
from kascade_cli.benchmarking.work import Workload
from kascade_cli.errors import KascadeError, UsageError
from kascade_cli.kernels import Backend
from kascade_cli.schema import Budget, ModelCard, Profile
from kascade_cli.sparse import Batch, Layer, Lengths, Pass, Strategy, make_strategy
from kascade_cli.sparse.strategies.refresh import Refresh
from kascade_cli.sparse.strategies.reused_norm import ReusedNorm
from kascade_cli.sparse.strategy import strategy_class

ROLES = ("layer0", "anchor", "reuse")
BETWEEN = ("layer0_between", "reuse_between")  # of a step that reads kept keys: anchors are reuse layers there
_LAYER = {"layer0": 0, "anchor": 1, "reuse": 2, "layer0_between": 0, "reuse_between": 2}
REUSED_NORM, REFRESH = ReusedNorm.name, Refresh.name
STRATEGIES = ("kascade", REUSED_NORM, REFRESH)  # that can be measured


@dataclass(frozen=True)
class Bench:
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


def with_strategy(setting: Bench, strategy: str, refresh: int | None = None) -> Bench:
    """`setting` with another strategy; UsageError for one that cannot be measured or does not take `refresh`."""
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy '{strategy}' is not measured; use {', '.join(STRATEGIES)}")
    if strategy != REFRESH and refresh is not None:
        raise UsageError(f"--refresh is for strategy {REFRESH}, not {strategy}")
    options = {} if refresh is None else {"refresh": refresh}
    return replace(setting, strategy=strategy, refresh=strategy_class(strategy).read_options(options).get("refresh"))


@dataclass
class Inputs:
    """One input set. q [B, H, T, D] (memory [B, T, H, D]); k, v [B, G, S, D]; state: its pass of `strategy`.

    between: with kascade-refresh, the pass of the last step of a cycle, which reads the most keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    strategy: Strategy
    backend: Backend
    state: Pass
    between: Pass | None = None

    @property
    def batch(self) -> Batch:
        return self.state.batch

    def attend(self, layer: int, state: Pass) -> Tensor:
        """The attention of one layer in that pass: [B, H, T, D]."""
        return self.strategy.attend(Layer(layer, self.q, self.k, self.v, self.scale, state, self.backend))

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


def workload_of(shape: Shape, phase: str, batch: int, context: int, setting: Bench) -> Workload:
    """The sizes that operations and bytes are counted from."""
    element = torch.empty(0, dtype=setting.dtype).element_size()
    return Workload(phase, batch, context, shape.query_heads, shape.kv_heads, shape.head_dim, element, setting.budget)


def role_strategy(kv_heads: int, head_dim: int, setting: Bench) -> Strategy:
    """Three layers: dense and anchor, anchor, and one that reuses layer 1 through a head map that is no identity."""
    card = ModelCard(
        name="roles",
        fingerprint=f"sha256:{'0' * 64}",
        layers=3,
        query_heads=kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    heads = list(reversed(range(kv_heads)))
    maps = {2: {"decode": heads, "prefill": heads}}
    profile = Profile.build(
        model=card, anchors=[0, 1], profiled_layers=[0, 1, 2], head_maps=maps, budget=setting.budget
    )
    options = {} if setting.refresh is None else {"refresh": setting.refresh}
    return make_strategy(setting.strategy, [0, 1, 2], profile, **options)


def full_batch(q: Tensor, k: Tensor, budget: Budget) -> Batch:
    """Every slot a key, the queries at the end."""
    full = torch.full((len(q),), k.shape[2], dtype=torch.int32, device=q.device)
    lengths = Lengths(full - q.shape[2], torch.zeros_like(full), full)
    phase = "decode" if q.shape[2] == 1 else "prefill"
    return Batch(lengths, phase, q.shape[2], k.shape[2], budget, plain=True)


def make_inputs(case: Workload, setting: Bench, seed: int = 0) -> Inputs:
    """Random normal q, k, v of a case, and the state of a forward pass over them."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    options = {"device": setting.device, "dtype": setting.dtype, "generator": generator}
    queries = 1 if case.phase == "decode" else case.context
    q = torch.randn(case.batch, queries, case.query_heads, case.head_dim, **options).transpose(1, 2)
    k, v = (torch.randn(case.batch, case.kv_heads, case.context, case.head_dim, **options) for _ in range(2))
    strategy = role_strategy(case.kv_heads, case.head_dim, setting)
    memory = strategy.memory()
    batch = full_batch(q, k, setting.budget)
    if case.phase == "prefill" or memory is None:
        return Inputs(q, k, v, strategy, setting.backend, strategy.start(batch, memory))
    if (setting.refresh or 1) < 2:
        with memory.only("refresh"):
            return Inputs(q, k, v, strategy, setting.backend, strategy.start(batch, memory))
    return _refresh_inputs(q, k, v, strategy, batch, setting)


def _refresh_inputs(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, batch: Batch, setting: Bench) -> Inputs:
    """A refresh at the full context, whose anchors also keep what they choose; and a cycle that ends there."""
    context, every, memory = k.shape[2], setting.refresh, strategy.memory()
    if context < every:
        raise KascadeError(f"a context of {context} keys is shorter than a cycle of {every} decode steps")
    with memory.only("refresh"):
        inputs = Inputs(q, k, v, strategy, setting.backend, strategy.start(batch, memory))
    for age in range(every):
        kv_len = torch.full_like(batch.lengths.kv_len, context - every + 1 + age)
        lengths = Lengths(kv_len - 1, torch.zeros_like(kv_len), kv_len)
        step = replace(batch, lengths=lengths, plain=False, _moved={})
        with memory.only("between" if age else "refresh"), torch.no_grad():
            state = strategy.start(step, memory)
            for anchor in (0, 1) if not age else ():
                inputs.attend(anchor, state)
            strategy.end(state)
    inputs.between = state
    return inputs


def make_sets(case: Workload, setting: Bench, touched: float, have: Sequence[Inputs] = ()) -> list[Inputs]:
    """As many input sets as leave L2 cold when a call touches `touched` bytes of its set; `have` is kept."""
    sets = list(have)
    wanted = set_count(touched, case.kv_bytes, setting.device) if case.phase == "decode" else 1
    while len(sets) < wanted:
        sets.append(make_inputs(case, setting, seed=len(sets)))
    return sets


def role_call(role: str, inputs: Inputs) -> Callable[[], Any]:
    """The attention of one layer of that role, after `prepare`."""
    state, layer = inputs.between if role in BETWEEN else inputs.state, _LAYER[role]
    if state.memory is None:
        return lambda: inputs.attend(layer, state)

    def call() -> Tensor:
        state.memory.between = role in BETWEEN  # one memory serves the passes of both kinds
        return inputs.attend(layer, state)

    return call


def prepare(role: str, inputs: Inputs) -> None:
    """Runs the layers whose keys the role reads, unless they have left them."""
    if role in BETWEEN:
        return
    state, layer = inputs.state, _LAYER[role]
    for source in sorted(set(inputs.strategy.reads(layer, state.batch.phase)) - {layer}):
        if source not in state.keys:
            earlier = next(name for name in ROLES if _LAYER[name] == source)
            prepare(earlier, inputs)
            with torch.no_grad():
                role_call(earlier, inputs)()


def pass_call(inputs: Inputs, between: bool = False) -> Callable[[], Any]:
    """What a forward pass does once, whatever the number of layers: lengths and budgets; between refreshes, also
    adding its key to the kept sets."""
    memory, budget = inputs.state.memory, inputs.state.batch.budget

    def begin() -> Any:
        state = inputs.strategy.start(full_batch(inputs.q, inputs.k, budget), memory)
        return state.batch.counts

    def of_a_kind() -> Any:
        with memory.only("between" if between else "refresh"):
            counts = begin()
            memory.finish()
        return counts

    return begin if memory is None else of_a_kind
