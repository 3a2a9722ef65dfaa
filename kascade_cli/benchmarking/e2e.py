"""A whole model: time to first token and decode tokens per second, dense against sparse.

Decode runs the step of `generate` over and over at a full static cache, whose last slot it writes. The dense side runs
the fastest dense attention there is on the same cache, without a mask, also in a graph.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kascade_cli.benchmarking.baselines import BASELINES, Baseline, why_missing
from kascade_cli.benchmarking.model import Say, failure, timing_fields
from kascade_cli.benchmarking.report import Row, base_row, strategy_fields
from kascade_cli.benchmarking.roles import Bench, make_inputs, workload_of
from kascade_cli.benchmarking.shapes import Shape, describe_sizes
from kascade_cli.benchmarking.timing import free_memory, time_calls
from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers import attach
from kascade_cli.integrations.transformers.decoding import Runner, Slots
from kascade_cli.models import attention_implementation, describe, logits_at
from kascade_cli.schema import Profile

DENSE = "kascade-bench-dense"


def fastest_dense(shape: Shape, phase: str, batch: int, context: int, setting: Bench) -> Baseline:
    """The fastest dense attention that needs no plan, measured now on one layer of this size."""
    case = workload_of(shape, phase, batch, context, setting)
    inputs = make_inputs(case, setting)
    found: dict[str, float] = {}
    for baseline in BASELINES.values():
        if baseline.attend is None or why_missing(baseline.name, setting.device, phase):
            continue
        with contextlib.suppress(Exception):
            call = baseline.prepare(inputs.q, inputs.k, inputs.v, inputs.scale)
            graph = phase == "decode"
            found[baseline.name] = time_calls([call], setting.device, graph=graph, seconds=0.1, fewest=3).p50
    del inputs
    free_memory(setting.device)
    if not found:
        raise KascadeError(f"no dense attention runs {shape.name} in {setting.dtype_name} here")
    return BASELINES[min(found, key=lambda name: found[name])]


@torch.library.custom_op("kascade::bench_dense", mutates_args=())
def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float, baseline: int) -> Tensor:
    """Attention of the baseline with this number: [B, H, T, D] -> [B, T, H, D]. An op: layers compile around it."""
    chosen = list(BASELINES.values())[baseline]
    out = chosen.attend(query, key, value, scale)
    out = out[0] if isinstance(out, tuple) else out
    # FlashAttention gives [B, T, H, D] already, SDPA [B, H, T, D].
    return (out if chosen.name in ("fa3", "fa4") else out.transpose(1, 2)).contiguous()


@_dense.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


@contextlib.contextmanager
def dense_attention(model: Any, baseline: Baseline) -> Iterator[None]:
    """`model` with `baseline` as its attention, no mask: every slot of the cache is a key, prefill is causal."""
    from transformers import AttentionInterface, AttentionMaskInterface

    number = list(BASELINES).index(baseline.name)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        return _dense(query, key, value, scaling or query.shape[-1] ** -0.5, number), None

    AttentionInterface.register(DENSE, attention)
    AttentionMaskInterface.register(DENSE, lambda *args, **kwargs: None)
    with attention_implementation(model, DENSE):
        yield


def profile_for(model: Any, shape: Shape, setting: Bench) -> Profile:
    """A profile with the shape's anchors and identity head maps: what is chosen does not matter to a clock."""
    info = describe(model, shape.name)
    heads = list(range(info.kv_heads))
    anchors = [info.profiled_layers[index] for index in shape.anchor_layers()]
    maps = {layer: {"decode": heads, "prefill": heads} for layer in info.profiled_layers if layer not in set(anchors)}
    return Profile.build(
        model=info.card, anchors=anchors, profiled_layers=info.profiled_layers, head_maps=maps, budget=setting.budget
    )


def filled_slots(model: Any, batch: int, context: int, setting: Bench) -> Slots:
    """A static cache of `context` slots filled with random normal keys and values; the next step writes the last."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = torch.empty(0, heads, 0, head_dim, dtype=setting.dtype, device=setting.device)
    slots = Slots([(like, like)] * config.num_hidden_layers, batch, context)
    for layer in slots.cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    slots.token.random_(5, 200)
    slots.place(context - 1)
    return slots


def decode_row(model: Any, slots: Slots, setting: Bench, attachment: Any = None, compile: bool = False) -> Row:
    """One decode step at a full cache, again and again: milliseconds and tokens per second."""
    runner = Runner(model, slots, attachment, capture=setting.device.type == "cuda", compile=compile, stay=True)
    runner.prepare()
    timing = time_calls([runner.step], setting.device, seconds=max(setting.seconds, 0.5), fewest=8)
    row = timing_fields(timing) | _how(runner, setting)
    return row | {"tokens_s": round(slots.rows * 1000 / row["ms_p50"], 1)}


def _how(runner: Runner, setting: Bench) -> Row:
    if runner.captured:
        how = {"method": "graph", "compiled": runner.compiled}
        return how if runner.compiled or not runner.compile else how | {"note": f"not compiled: {runner.uncompiled}"}
    return {} if setting.device.type != "cuda" else {"note": f"no CUDA graph: {runner.reason}"}


def cycle_row(model: Any, slots: Slots, setting: Bench, attachment: Any, compile: bool = False) -> Row:
    """A cycle of kascade-refresh that ends at a full cache: the mean of its steps, and the time of both kinds.

    Two graphs, one that chooses keys and one that reads them, replayed in turn; eager, with the reason, where that
    does not work.
    """
    every, context = attachment.memory.every, slots.slots
    if context < every:
        raise KascadeError(f"a context of {context} keys is shorter than a cycle of {every} decode steps")
    runner = Runner(model, slots, attachment, capture=setting.device.type == "cuda", compile=compile)

    def run(steps: int) -> None:
        slots.place(context - every)
        runner.restart()
        for _ in range(steps):
            runner.step()

    slots.place(context - every)
    runner.prepare()
    seconds = max(setting.seconds, 0.5)
    whole = time_calls([lambda: run(every)], setting.device, seconds=seconds, fewest=5)
    first = time_calls([lambda: run(1)], setting.device, seconds=seconds / 2, fewest=5)
    fields = {
        name: round(value / every, 5) if name.startswith("ms_") else value
        for name, value in timing_fields(whole).items()
    }
    between = (whole.p50 - first.p50) / (every - 1) if every > 1 else None
    kinds = {"refresh_step_ms": round(first.p50, 5), "between_step_ms": None if between is None else round(between, 5)}
    return fields | _how(runner, setting) | kinds | {"tokens_s": round(slots.rows * 1000 / fields["ms_p50"], 1)}


def prefill_row(model: Any, batch: int, context: int, setting: Bench) -> Row:
    """Time to first token: a whole prefill into a dynamic cache, logits of the last position only."""
    tokens = torch.randint(5, 200, (batch, context), device=setting.device)

    def run() -> None:
        logits, _ = logits_at(model, tokens, use_cache=True)
        logits[:, -1].argmax(-1)

    fewest = 2 if context * batch >= 1 << 15 else 3
    timing = time_calls([run], setting.device, seconds=setting.seconds, fewest=fewest, most=10)
    return timing_fields(timing) | {"tokens_s": round(batch * context * 1000 / timing.p50, 1)}


def run_e2e(
    model: Any,
    shape: Shape,
    phase: str,
    sizes: Sequence[tuple[int, int]],
    setting: Bench,
    profile: Profile | None = None,
    say: Say = lambda text: None,
    done: Callable[[list[Row]], None] = lambda rows: None,
    compile: bool = False,
) -> list[Row]:
    """Rows `dense` and `sparse` per (batch, context): in prefill the time to first token, in decode the step.

    The decode cache holds random values instead of a prefill (`cache: random` in the row). compile: the decoder layers
    are compiled for decoding, on both sides (`compiled` in the row).
    """
    profile = profile or profile_for(model, shape, setting)
    rows: list[Row] = []
    for batch, context in sizes:
        here: list[Row] = []
        base = base_row(shape, phase, batch, context, setting) | {"kind": "e2e"}
        base |= {"layers": shape.layers, "anchors": shape.anchors}
        try:
            here += _one_size(model, shape, phase, batch, context, setting, profile, base, say, compile)
        except Exception as error:
            here.append(base | {"kind": "failed", "name": "e2e", "error": failure(error)})
        rows += here
        done(here)
        free_memory(setting.device)
    if rows and all(row["kind"] == "failed" for row in rows):
        raise KascadeError(rows[0]["error"])
    return rows


def _one_size(
    model: Any,
    shape: Shape,
    phase: str,
    batch: int,
    context: int,
    setting: Bench,
    profile: Profile,
    base: Row,
    say: Say,
    compile: bool,
) -> list[Row]:
    check_memory(shape, phase, batch, context, setting)
    baseline = fastest_dense(shape, phase, batch, context, setting)
    slots: Any = None
    if phase == "decode":
        slots = filled_slots(model, batch, context, setting)
        base = base | {"cache": "random"}

    def measure(attachment: Any = None) -> Row:
        if phase == "decode":
            return decode_row(model, slots, setting, attachment, compile)
        return prefill_row(model, batch, context, setting)

    say(f"{phase} {base['size']}: dense, {baseline.label}")
    with dense_attention(model, baseline):
        dense = base | {"name": "dense", "attention": baseline.name, "backend": "torch"} | measure()
    free_memory(setting.device)
    say(f"{phase} {base['size']}: sparse")
    backend = setting.backend.name
    options = strategy_fields(setting)
    with attach(model, profile, backend=backend, allow_other_weights=True, **options) as attachment:
        if setting.refresh is not None and phase == "decode":
            cycle = cycle_row(model, slots, setting, attachment, compile)
            sparse = base | {"name": "sparse"} | options | cycle
        else:
            sparse = base | {"name": "sparse"} | options | measure(attachment)
        report = attachment.report()
    sparse |= {"density": round(report["density"], 4), "fallbacks": report["fallbacks"]}
    speedup = round(dense["ms_p50"] / sparse["ms_p50"], 3)
    return [dense | {"speedup": 1.0}, sparse | {"speedup": speedup, "baseline": baseline.name}]


def check_memory(shape: Shape, phase: str, batch: int, context: int, setting: Bench) -> None:
    """Raises KascadeError if the cache alone does not fit the GPU; says how much it needs."""
    if setting.device.type != "cuda":
        return
    needed = workload_of(shape, phase, batch, context, setting).kv_bytes * shape.layers
    free, _ = torch.cuda.mem_get_info(setting.device)
    if needed > free:
        raise KascadeError(
            f"the KV cache of {describe_sizes(batch, context)} takes {needed / 1e9:.1f} GB and the GPU has "
            f"{free / 1e9:.1f} GB free: lower --batch or --context"
        )
