"""The paper's Table 3: attention time of each role, and of a whole model, against the best dense attention."""

from collections.abc import Callable, Sequence
from typing import Any

from kascade_cli.benchmarking.baselines import OWN, Baseline, why_missing
from kascade_cli.benchmarking.report import Row, base_row, strategy_fields
from kascade_cli.benchmarking.roles import (
    BETWEEN,
    REUSED_NORM,
    ROLES,
    Bench,
    make_inputs,
    make_sets,
    pass_call,
    prepare,
    role_call,
    workload_of,
)
from kascade_cli.benchmarking.shapes import Shape
from kascade_cli.benchmarking.timing import Timing, free_memory, time_calls
from kascade_cli.benchmarking.work import Work, work_of
from kascade_cli.errors import KascadeError

Say = Callable[[str], None]


def _nothing(_: str) -> None:
    return None


def role_work(role: str, case: Any, strategy: str = "kascade", refresh: int = 1) -> Work:
    """Least operations and bytes of a role: its own ops, K read once where scoring and attending share it.

    refresh: length of kascade-refresh's cycle; its last step reads `refresh - 1` keys more.
    """
    phase = case.phase
    if role == "layer0_between":
        return work_of("decode_dense", case)
    if role == "reuse_between":
        sparse, share = work_of("decode_sparse", case), 1 + (refresh - 1) / case.selected
        return Work(sparse.flops * share, sparse.bytes * share, "memory")
    if phase == "decode":
        if role == "layer0":
            return work_of("decode_dense", case)
        sparse = work_of("decode_sparse", case)
        if role == "reuse":
            return sparse
        return Work(0, case.kv_bytes / 2 + work_of("decode_sparse+logits", case).bytes, "memory")
    if role == "layer0":
        parts = [work_of("prefill_dense", case), work_of("prefill_score", case)]
    elif role == "anchor":
        # Normalising the scores takes another pass over Q K^T, half of the dense one; or of the sparse one.
        norm = work_of("prefill_sparse" if strategy == REUSED_NORM else "prefill_dense", case)
        parts = [Work(norm.flops / 2, 0, "compute"), work_of("prefill_score", case), work_of("prefill_sparse", case)]
    else:
        parts = [work_of("prefill_sparse", case)]
    return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts), "compute")


def timing_fields(timing: Timing) -> dict[str, Any]:
    """Percentiles for a row, in milliseconds."""
    note = {"note": timing.note} if timing.note else {}
    digits = {name: round(getattr(timing, name[3:]), 5) for name in ("ms_p20", "ms_p50", "ms_p80")}
    return {**digits, "repeats": timing.repeats, "method": timing.method, **note}


def dense_rows(baselines: Sequence[Baseline], case: Any, setting: Bench, base: Row, say: Say = _nothing) -> list[Row]:
    """One row per baseline; one that cannot run has `skipped` with the reason instead of times."""
    work = work_of(f"{case.phase}_dense", case)
    sets = make_sets(case, setting, case.kv_bytes)
    rows = []
    for baseline in baselines:
        row = base | {"kind": "dense", "name": baseline.name, "label": baseline.label}
        reason = why_missing(baseline.name, setting.device, case.phase)
        if reason is None:
            say(f"{case.phase} {base['size']}: {baseline.label}")
            try:
                calls = [baseline.prepare(s.q, s.k, s.v, s.scale) for s in sets]
                timing = time_calls(calls, setting.device, graph=case.phase == "decode", seconds=setting.seconds)
                row |= timing_fields(timing) | work.rates(timing.p50)
                del calls
            except Exception as error:  # a baseline that fails here must not take the others with it
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        rows.append(row | {"skipped": reason} if reason else row)
        free_memory(setting.device)
    return rows


def best_dense(rows: Sequence[Row]) -> Row | None:
    """The fastest dense row, our own included."""
    timed = [row for row in rows if row["kind"] == "dense" and "ms_p50" in row]
    return min(timed, key=lambda row: row["ms_p50"]) if timed else None


def role_rows(case: Any, setting: Bench, base: Row, say: Say = _nothing) -> list[Row]:
    """Rows `layer0`, `anchor`, `reuse` and `pass` (what every forward pass does once).

    With kascade-refresh also those of a decode step that reads kept keys: `layer0_between`, `reuse_between` (anchors
    too) and `pass_between`.
    """
    rows = []
    sets = [make_inputs(case, setting)]
    graph = case.phase == "decode"
    cycle = sets[0].between is not None
    for role in (*ROLES, *BETWEEN) if cycle else ROLES:
        say(f"{case.phase} {base['size']}: {role}")
        work = role_work(role, case, setting.strategy, setting.refresh or 1)
        sets = make_sets(case, setting, work.bytes, sets)
        for inputs in sets:
            prepare(role, inputs)
        calls = [role_call(role, inputs) for inputs in sets]
        timing = time_calls(calls, setting.device, graph=graph, seconds=setting.seconds)
        rows.append(base | {"kind": "role", "name": role} | timing_fields(timing) | work.rates(timing.p50))
    # The pass of a refresh alone leaves nothing to read, so it comes last.
    for between in (True, False) if cycle else (False,):
        timing = time_calls([pass_call(sets[0], between)], setting.device, graph=graph, seconds=setting.seconds / 4)
        rows.append(base | {"kind": "role", "name": "pass_between" if between else "pass"} | timing_fields(timing))
    sets.clear()
    free_memory(setting.device)
    return rows


def whole_model(roles: Sequence[Row], dense: Row | None, shape: Shape, base: Row) -> Row:
    """The whole-model row from the roles' medians: layers and anchors of `shape`, speed-up over `dense`.

    It carries `dense_ms`, `layer0_ms`, `anchor_ms`, `reuse_ms`, which `select-anchors --cost` reads. With roles of
    kascade-refresh the total is the mean over a cycle of `base["refresh"]` decode steps.
    """
    ms = {row["name"]: row["ms_p50"] for row in roles}
    reuse = shape.layers - shape.anchors
    total = ms["layer0"] + (shape.anchors - 1) * ms["anchor"] + reuse * ms["reuse"] + ms.get("pass", 0.0)
    cycle = {}
    if "layer0_between" in ms:
        between = ms["layer0_between"] + (shape.layers - 1) * ms["reuse_between"] + ms["pass_between"]
        cycle = {f"{name}_ms": ms[name] for name in (*BETWEEN, "pass_between")}
        cycle |= {"refresh_step_ms": round(total, 5), "between_step_ms": round(between, 5)}
        total = (total + (base["refresh"] - 1) * between) / base["refresh"]
    row = base | {
        "kind": "model",
        "name": "model",
        "layers": shape.layers,
        "anchors": shape.anchors,
        "layer0_ms": ms["layer0"],
        "anchor_ms": ms["anchor"],
        "reuse_ms": ms["reuse"],
        "pass_ms": ms.get("pass", 0.0),
        "mean_ms": round(total / shape.layers, 5),
        "total_ms": round(total, 5),
        **cycle,
    }
    if dense is None:
        return row
    speedup = shape.layers * dense["ms_p50"] / total
    return row | {"dense_ms": dense["ms_p50"], "baseline": dense["name"], "speedup": float(f"{speedup:.4g}")}


def run_model(
    shape: Shape,
    phase: str,
    sizes: Sequence[tuple[int, int]],
    setting: Bench,
    baselines: Sequence[Baseline],
    say: Say = _nothing,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Table 3 for one phase over (batch, context) pairs.

    A size that fails (memory, an unsupported shape) gives a row of kind `failed` with the reason. done(rows) is called
    as every size ends. Speed-ups are over the fastest dense attention of the same run.
    """
    rows: list[Row] = []
    for batch, context in sizes:
        base = base_row(shape, phase, batch, context, setting) | strategy_fields(setting)
        case = workload_of(shape, phase, batch, context, setting)
        here: list[Row] = []
        try:
            here += dense_rows(baselines, case, setting, base, say)
            here += role_rows(case, setting, base, say)
            best = best_dense(here)
            for row in here:
                if best and "ms_p50" in row and not row["name"].startswith("pass"):
                    row |= {"baseline": best["name"], "speedup": round(best["ms_p50"] / row["ms_p50"], 3)}
            here.append(whole_model([row for row in here if row["kind"] == "role"], best, shape, base))
        except Exception as error:
            here.append(base | {"kind": "failed", "name": "model", "error": failure(error)})
        rows += here
        done(here)
        free_memory(setting.device)
    if rows and all(row["kind"] == "failed" for row in rows):
        raise KascadeError(rows[0]["error"])
    return rows


def failure(error: Exception) -> str:
    """One line for a row; running out of memory says which option lowers the need."""
    import torch

    line = " ".join(str(error).split())[:300]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"out of GPU memory ({line[:120]}): lower --batch or --context"
    return line if isinstance(error, KascadeError) else f"{type(error).__name__}: {line}"


def own_share(rows: Sequence[Row]) -> float | None:
    """Speed of our dense kernel over the best other dense one (1.0: equal)."""
    timed = {row["name"]: row["ms_p50"] for row in rows if row["kind"] == "dense" and "ms_p50" in row}
    others = [ms for name, ms in timed.items() if name != OWN]
    return round(min(others) / timed[OWN], 3) if OWN in timed and others else None
