"""The parts of gpu_suite.py that measure speed and have the GPU to themselves."""

from typing import Any

import torch

from benchmarks.gpu_parts import Context
from kascade_cli.benchmarking.roles import Bench, with_strategy
from kascade_cli.benchmarking.shapes import SHAPES, named_shape, random_model
from kascade_cli.benchmarking.timing import ceilings, free_memory
from kascade_cli.schema import Budget

SPEED = {
    "decode": ((64, 32768), (16, 131072), (1, 131072), (4, 32768)),
    "prefill": ((1, 32768), (1, 131072)),
}
# (strategy, its refresh, phase, sizes) of the approximations, measured after the table
APPROXIMATE = (
    ("kascade-reused-norm", None, "prefill", ((1, 32768), (1, 131072))),
    ("kascade-refresh", 8, "decode", ((64, 32768), (16, 131072))),
)


def speed_setting(ctx: Context, seconds: float) -> Bench:
    """bfloat16, ratio 0.10 on a GPU; float32 and few keys in a dry run."""
    dtype = torch.float32 if ctx.dry else torch.bfloat16
    budget = Budget(ratio=0.10, min_keys=32 if ctx.dry else 128)
    return Bench(ctx.backend(), ctx.device, dtype, budget, 0.02 if ctx.dry else seconds)


def part_model(ctx: Context) -> None:
    """Table 3 at the sizes of the speed table."""
    from kascade_cli.benchmarking.baselines import choose
    from kascade_cli.benchmarking.model import run_model

    setting = speed_setting(ctx, 0.35)
    shape = named_shape("demo") if ctx.dry else SHAPES["llama-3.1-8b"]
    ctx.data["rows"] = []
    ctx.data["machine"]["ceilings"] = ceilings(ctx.device)
    ctx.save()
    free_memory(ctx.device)

    def done(rows: list[dict[str, Any]]) -> None:
        ctx.data["rows"] += rows
        for row in rows:
            if row["kind"] == "failed":
                ctx.fail(f"{row['phase']} {row['size']}: {row['error']}")
            elif row.get("note"):
                print(row["name"], row["size"], row["note"], flush=True)
        ctx.save()

    measured = 0
    for phase, sizes in ({"decode": ((1, 512),), "prefill": ((1, 256),)} if ctx.dry else SPEED).items():
        chosen = [entry for entry in choose("all", setting.backend) if ctx.dry or entry.name != "sdpa"]
        for size in sizes:
            if ctx.left < 8:
                ctx.fail(f"no time for {phase} {size}")
                continue
            try:
                run_model(shape, phase, [size], setting, chosen, say=print, done=done)
                measured += 1
            except Exception as error:
                print(f"{phase} {size}: {error}", flush=True)
    for strategy, refresh, phase, sizes in () if ctx.dry else APPROXIMATE:
        for size in sizes:
            if ctx.left < 8:
                ctx.fail(f"no time for {strategy} {phase} {size}")
                continue
            models = [row for row in ctx.data["rows"] if row["kind"] == "model" and sized(row, phase, size)]
            best = [row["baseline"] for row in models if "baseline" in row]
            if best:
                variant = with_strategy(setting, strategy, refresh)
                run_model(shape, phase, [size], variant, choose(best[0], setting.backend), say=print, done=done)
    ctx.data["summary"] = f"{measured} sizes"


def sized(row: dict[str, Any], phase: str, size: tuple[int, int]) -> bool:
    """Whether a row is of this phase, batch and context."""
    return (row["phase"], row["batch"], row["context"]) == (phase, *size)


def part_e2e(ctx: Context) -> None:
    """Llama-3.1-8B's shape, random weights: decode at 8 x 64k (fewer rows on a smaller GPU) and a 32k prefill."""
    from kascade_cli.benchmarking.e2e import run_e2e
    from kascade_cli.models import load_model

    setting = speed_setting(ctx, 1.0)
    shape = named_shape("demo") if ctx.dry else SHAPES["llama-3.1-8b"]
    ctx.data["rows"] = []
    if ctx.dry:
        model, _ = load_model("demo", dtype="float32", device="cpu")
        plan = [("decode", (1, 256)), ("prefill", (1, 256))]
    else:
        model = random_model(shape, dtype=torch.bfloat16, device=ctx.device)
        free, _ = torch.cuda.mem_get_info()
        row = 2 * 65536 * shape.kv_heads * shape.head_dim * 2 * shape.layers
        batch = next((b for b in (8, 4, 2) if b * row < 0.85 * free), 1)
        plan = [("decode", (batch, 65536)), ("prefill", (1, 32768)), ("decode", (1, 131072))]

    def done(rows: list[dict[str, Any]]) -> None:
        ctx.data["rows"] += rows
        for row in rows:
            if row["kind"] == "failed":
                ctx.fail(f"{row['phase']} {row['size']}: {row['error']}")
            elif row.get("note"):
                ctx.fail(f"{row['name']} {row['phase']} {row['size']}: {row['note']}")
        ctx.save()

    variants = [(*entry, setting) for entry in plan]
    variants.append((*plan[0], with_strategy(setting, "kascade-refresh", 8)))
    for phase, size, variant in variants:
        if ctx.left < 10:
            ctx.fail(f"no time for {phase} {size}")
            continue
        try:
            run_e2e(model, shape, phase, [size], variant, say=print, done=done)
        except Exception as error:
            print(f"{phase} {size}: {error}", flush=True)
    ctx.data["summary"] = f"{len(ctx.data['rows'])} rows"
