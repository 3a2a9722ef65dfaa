"""The parts of gpu_suite.py that build and check. Each leaves rows, failures and a one-line summary in its Context."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from kascade_cli.benchmarking import report
from kascade_cli.benchmarking.roles import Bench
from kascade_cli.benchmarking.shapes import named_shape
from kascade_cli.benchmarking.timing import free_memory
from kascade_cli.kernels import get_backend
from kascade_cli.kernels.testing import broken, decode, prefill, ragged
from kascade_cli.schema import Budget, Profile

# (query heads per KV head, head size, dtype) that the prefill numerics cover; the first is the benchmark's.
PREFILL_CORNERS = (
    (4, 128, "bfloat16"),
    (4, 128, "float16"),
    (1, 128, "bfloat16"),
    (7, 64, "float16"),
    (16, 64, "bfloat16"),
)
DEMO = (4, 64, "bfloat16")
NEAR_TIE = 4.0  # steps of bf16 between the two best logits
EVALUATE_GAP = 0.01  # share of the answers; near-ties go either way


class Context:
    """Where a part writes, when it must end, and what it runs on."""

    def __init__(self, into: Path, deadline: float, dry: bool):
        self.into, self.deadline, self.dry = into, deadline, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.data: dict[str, Any] = {"failures": [], "machine": report.machine(self.device)}

    @property
    def left(self) -> float:
        """Seconds to the end."""
        return self.deadline - time.monotonic()

    def backend(self) -> Any:
        """TileLang, strictly: a fallback would hide a failure."""
        return get_backend("torch" if self.dry else "tilelang", self.device)

    def fail(self, line: str) -> None:
        """Notes a failure."""
        self.data["failures"].append(line[:400])
        print("FAILED", line, flush=True)

    def save(self) -> None:
        """Writes what there is, so that it survives whatever comes next."""
        temporary = self.into.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data))
        temporary.replace(self.into)


def part_compile(ctx: Context) -> None:
    """Builds every kernel that the other parts use, in parallel processes."""
    if ctx.dry:
        ctx.data["summary"] = "not on a CPU"
        return
    from kascade_cli.kernels.tilelang import ahead
    from kascade_cli.kernels.tilelang.compile import prebuild

    found = wanted_specs()
    times: dict[str, float] = {}

    def done(spec: Any, seconds: float, error: str) -> None:
        times[str(spec)] = round(seconds, 1)
        if not error:
            ahead.note(spec)
        print(f"{seconds:5.1f} s {spec} {error}", flush=True)

    failed = prebuild(found, jobs=max(2, (os.cpu_count() or 4) - 1), done=done)
    for spec, error in failed.items():
        ctx.fail(f"{spec}: {error}")
    ctx.data |= {"kernels": times, "summary": f"{len(found) - len(failed)} of {len(found)} kernels"}


def wanted_specs() -> list[Any]:
    """Kernels of the numerics cases, the demo model and the speed table, each once; the slow ones come first."""
    from kascade_cli.benchmarking.kernel_list import unique
    from kascade_cli.kernels.tilelang.prefill_specs import prefill_specs
    from kascade_cli.kernels.tilelang.specs import decode_specs, select_specs

    shapes = {(case.heads // case.kv_heads, case.dim, str(case.dtype)[6:], case.page) for case in decode.CASES}
    shapes |= {(4, 128, "bfloat16", 0), DEMO + (0,)}
    # The shapes of testing.broken are among these.
    tiled = {(case.group, case.head_dim, str(case.dtype)[6:], case.tile) for case in prefill_cases(False)}
    tiled |= {(case.group, case.head_dim, str(case.dtype)[6:], case.tile) for case in stress_cases()} | {DEMO + (32,)}
    found: list[Any] = []
    for case in ragged_cases(False):
        found += prefill_specs(case.group, case.head_dim, str(case.dtype)[6:], case.tile, case.page)
    for group, size, dtype, tile in sorted(tiled):
        found += prefill_specs(group, size, dtype, tile)
    found += select_specs()
    for shape in sorted(shapes):
        found += decode_specs(*shape)
    return unique(found)


def judge(ctx: Context, rows: list[dict[str, Any]]) -> None:
    """Adds numerics rows and their failures; the summary counts them per op."""
    known = ctx.data.setdefault("rows", [])
    known += rows
    for row in rows:
        if not row["ok"]:
            limit = row.get("bound", row.get("plain"))
            ctx.fail(f"{row['op']} {row['case']}: error {row.get('error')}, limit {limit} {row.get('note', '')}")
    good = sum(row["ok"] for row in known)
    ctx.data["summary"] = f"{good} of {len(known)} checks"
    ctx.save()


def part_decode(ctx: Context) -> None:
    """Numerics of the decode ops, adversarial Top-k rows, rows with NaN or inf, a CUDA graph at other lengths."""
    ops = ctx.backend()
    cases = decode.CASES[:2] if ctx.dry else decode.CASES
    for number, case in enumerate(cases):
        if ctx.left < 5:
            ctx.fail(f"no time for {len(cases) - number} of {len(cases)} decode cases")
            break
        judge(ctx, decode.check_decode(ops, ctx.device, (case,), seed=number))
        free_memory(ctx.device)
    for width in (1, 33) if ctx.dry else (1, 33, 4097, 40000, 1 << 19):
        if ctx.left < 5:
            ctx.fail(f"no time for Top-k rows of {width}")
            break
        judge(ctx, decode.check_select(ops, ctx.device, (width,)))
    judge(ctx, broken.check_decode(ops, ctx.device, broken.DECODE_CASES[: 1 if ctx.dry else None]))
    if not ctx.dry:
        judge(ctx, decode.check_graph(ops, ctx.device))


def prefill_cases(dry: bool) -> list[Any]:
    """Whole prompts of odd lengths, late chunks and ragged batches, over the corners."""
    if found := getattr(prefill, "CASES", None):
        return list(found[:2] if dry else found)
    single, late, ragged = prefill.single, prefill.late, prefill.ragged
    first = (torch.bfloat16, 4, 128)
    if dry:
        return [single(*first, 33), ragged(*first, 129)]
    cases = [single(*first, length) for length in (1, 33, 127, 129, 1000, 4097)]
    cases += [late(*first, 32768 + 17, 100), late(*first, 131072, 64), late(*first, 1 << 19, 33)]
    cases += [ragged(*first, 777, tile=tile) for tile in (8, 16, 64, 128)]
    cases += [ragged(torch.float16, group, 64, 777) for group in (2, 6, 12)]
    for group, size, dtype in PREFILL_CORNERS:
        corner = (getattr(torch, dtype), group, size)
        cases += [single(*corner, 1025), late(*corner, 5000, 333), ragged(*corner, 777)]
    return cases


def ragged_cases(dry: bool) -> list[Any]:
    """Batches over pages of a few sizes, in four compiled shapes; `paged_prefill.py` has them all."""
    if dry:
        return [ragged.RaggedCase(torch.bfloat16, 2, 64, 16, ((33, 50), (1, 9)))]
    shapes = {(4, 128, page, torch.bfloat16, 32) for page in (16, 32, 128)} | {(7, 64, 32, torch.float16, 32)}
    return [c for c in ragged.CASES if (c.group, c.head_dim, c.page, c.dtype, c.tile) in shapes]


def part_prefill(ctx: Context) -> None:
    """Numerics of the prefill ops, padded and ragged, and rows that hold NaN or inf."""
    ops = ctx.backend()
    cases = [(prefill, case) for case in prefill_cases(ctx.dry)]
    cases += [(ragged, case) for case in ragged_cases(ctx.dry)]
    for number, (kind, case) in enumerate(cases):
        if ctx.left < 5:
            ctx.fail(f"no time for {len(cases) - number} of {len(cases)} prefill cases")
            break
        try:
            rows = kind.check(ops, case, seed=number, device=str(ctx.device))
        except Exception as error:  # one broken case must not hide the others
            line = " ".join(str(error).split())[:300]
            rows = [{"op": "all", "case": str(case), "ok": False, "note": f"{type(error).__name__}: {line}"}]
        judge(ctx, rows)
        free_memory(ctx.device)
    judge(ctx, broken.check_prefill(ops, ctx.device, broken.PREFILL_CASES[1 if ctx.dry else 0 :]))
    judge(ctx, broken.check_ragged(ops, ctx.device, ragged_cases(True) if ctx.dry else broken.RAGGED_CASES))


def stress_cases() -> list[Any]:
    """One ragged batch per corner, large enough to fill the machine."""
    return [prefill.ragged(getattr(torch, dtype), group, size, 1500) for group, size, dtype in PREFILL_CORNERS]


def part_stress(ctx: Context) -> None:
    """The same inputs again and again, other seeds in between: changing bits are a race."""
    if ctx.dry:
        ctx.data["summary"] = "not on a CPU"
        return
    ops = ctx.backend()
    judge(ctx, decode.stress_decode(ops, ctx.device, repeats=50))
    free_memory(ctx.device)
    cases = stress_cases()
    share = max(10.0, ctx.left * 0.8) / len(cases)
    rows = []
    for case in cases:
        end, seeds, runs = time.monotonic() + share, 0, 0
        while time.monotonic() < end and ctx.left > 5:
            found = prefill.stress(ops, case, seeds=4, repeats=5)
            seeds, runs = seeds + 4, runs + 20
            changed = {op: times for op, times in found["changed"].items() if times}
            if changed:
                rows.append({"op": "stress", "case": str(case), "ok": False, "note": f"bits change: {changed}"})
                break
        rows.append({"op": "stress", "case": str(case), "ok": True, "note": f"{runs} runs over {seeds} seeds"})
    judge(ctx, rows)


def demo_profile(model: Any) -> tuple[Profile, str]:
    """The shipped profile of the demo model; without one, anchors spread evenly with identity head maps."""
    from kascade_cli.benchmarking.e2e import profile_for

    for path in sorted(Path(__file__).resolve().parents[1].glob("profiles/demo*.yaml")):
        profile = Profile.load(path)
        if profile.model.layers == model.config.num_hidden_layers:
            return profile, path.name
    shape = named_shape("demo")
    setting = Bench(get_backend("torch", "cpu"), torch.device("cpu"), torch.float32, Budget())
    return profile_for(model, shape, setting), "evenly spread anchors"


def part_demo(ctx: Context) -> None:
    """Greedy answers of the demo model to the built-in tasks: dense, and kascade on both backends."""
    import kascade_cli
    from kascade_cli import attach
    from kascade_cli.models import load_model
    from kascade_cli.tasks import make_prompts

    model, tokenizer = load_model("demo", dtype="float32" if ctx.dry else "bfloat16", device=str(ctx.device))
    profile, source = demo_profile(model)
    lengths, count = ((512,), 1) if ctx.dry else ((1024, 4096), 4)
    prompts = [
        prompt
        for length in lengths
        for prompt in make_prompts("hops", length=length, count=count, questions_per_task=4, seed=7)
    ]
    answers: dict[str, list[tuple[str, list[float]]]] = {}
    wanted = [question.answer for prompt in prompts for question in prompt.questions]
    torch_only = {"dense": None, "torch": "torch"}
    for name, backend in (torch_only if ctx.dry else {**torch_only, "tilelang": "tilelang"}).items():
        given: list[tuple[str, list[float]]] = []
        for prompt in prompts:
            if backend is None:
                given += greedy(model, tokenizer, prompt)
            else:
                with attach(model, profile, backend=backend, allow_other_weights=True) as attachment:
                    given += greedy(model, tokenizer, prompt)
                    density = attachment.report()
                ctx.data.setdefault("density", {})[name] = round(density["density"], 4)
        answers[name] = given
        right = sum(a.split() == b.split() for (a, _), b in zip(given, wanted, strict=True)) / len(wanted)
        ctx.data.setdefault("accuracy", {})[name] = round(right, 4)
        ctx.save()
    other = answers["torch" if ctx.dry else "tilelang"]
    differ = [i for i, (a, b) in enumerate(zip(answers["torch"], other, strict=True)) if a[0] != b[0]]
    ties = 0
    for i in differ:
        (plain, leads), fast = answers["torch"][i], other[i][0]
        first = next(j for j, (a, b) in enumerate(zip(plain.split(), fast.split(), strict=True)) if a != b)
        line = f"question {i}: torch '{plain}', tilelang '{fast}', right '{wanted[i]}', lead {leads[first]:.1f} steps"
        ctx.data.setdefault("differences", []).append(line)
        # Two bf16 computations of one value differ by a few roundings: a lead that small decides nothing.
        if leads[first] <= NEAR_TIE:
            ties += 1
        elif len(ctx.data["failures"]) < 5:
            ctx.fail(line)
    ctx.data |= {"profile": source, "questions": len(wanted), "different_answers": len(differ), "near_ties": ties}
    ctx.data["summary"] = (
        f"{len(differ)} of {len(wanted)} answers differ ({ties} near-ties); accuracy {ctx.data['accuracy']}"
    )
    ctx.data["package"] = kascade_cli.__version__
    evaluate_both(ctx, model, tokenizer, profile)


def evaluate_both(ctx: Context, model: Any, tokenizer: Any, profile: Profile) -> None:
    """What `kascade evaluate` does (a shared prefix, questions as chunks behind it) on both backends: same scores.

    kascade on many questions, every other strategy on a few.
    """
    from kascade_cli.demo import DEMO_TASKS
    from kascade_cli.evaluation.cases import built_in_cases, split_sources
    from kascade_cli.evaluation.run import Run, run_cases
    from kascade_cli.sparse import Setting, known_strategies

    prompts, length = (1, 512) if ctx.dry else (24, 1024)
    settings = {"length": length, "num_prompts": prompts, "questions": 8, "seed": 0}
    kinds, layout, *_ = split_sources([DEMO_TASKS["demo"]], DEMO_TASKS["demo"])
    cases = built_in_cases(kinds, layout, tokenizer, **settings)
    few = cases[: max(1, prompts // 6)]
    backends = ("torch",) if ctx.dry else ("torch", "tilelang")
    ctx.data["evaluate"] = {}
    others = ("quest",) if ctx.dry else (name for name in known_strategies() if name != "kascade")
    for strategy in ("kascade", *others):
        found = {}
        for backend in backends:
            setting = Setting(strategy, profile, 0.1, backend=backend, allow_other_weights=True)
            found[backend] = run_cases(
                model, tokenizer, cases if strategy == "kascade" else few, Run(strategy, (setting,))
            )
        scores = {name: round(float(outcome.values.mean()), 4) for name, outcome in found.items()}
        differ = int((found["torch"].values != found[backends[-1]].values).sum())
        ctx.data["evaluate"][strategy] = {
            "questions": len(found["torch"].values),
            "scores": scores,
            "verdicts_that_differ": differ,
            "density": found[backends[-1]].density,
            "fallbacks": found[backends[-1]].fallbacks,
        }
        if strategy == "kascade":
            ctx.data["summary"] += f"; evaluate {scores}, {differ} verdicts differ"
        if max(scores.values()) - min(scores.values()) > (EVALUATE_GAP if strategy == "kascade" else 2 * EVALUATE_GAP):
            ctx.fail(f"evaluate scores of the backends are far apart with {strategy}: {scores}")
        ctx.save()


def greedy(model: Any, tokenizer: Any, prompt: Any) -> list[tuple[str, list[float]]]:
    """Answers to all questions of a prompt, one left-padded batch.

    With each answer, per token, the lead of the best logit over the second best in steps of the model's dtype.
    """
    from kascade_cli.tasks.encoding import encode_more, encode_text

    haystack = encode_text(tokenizer, prompt.haystack)
    rows = [haystack + encode_more(tokenizer, question.prompt) for question in prompt.questions]
    sizes = [len(encode_more(tokenizer, question.answer)) for question in prompt.questions]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options = {"max_new_tokens": max(sizes), "min_new_tokens": max(sizes), "do_sample": False, "pad_token_id": pad}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
    best = torch.stack(out.logits, 1).float().topk(2, -1).values
    leads = (best[..., 0] - best[..., 1]) / (best[..., 0].abs() * torch.finfo(model.dtype).eps)
    return [
        (tokenizer.decode(row[width : width + size]), lead[:size])
        for row, lead, size in zip(out.sequences.tolist(), leads.tolist(), sizes, strict=True)
    ]
