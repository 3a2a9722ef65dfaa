"""Decode loops of a real model on one GPU: transformers' own, CUDA graphs, and graphs of compiled layers.

    python benchmarks/decode_loop.py MODEL PROFILE [-o rows.jsonl] [--context 28672] [--batch 1,8] [--steps tokens,...]

MODEL is anything that `kascade` takes, PROFILE its profile. Under six minutes on an H100 for 1.5B parameters.

tokens   every strategy on padded rows: the static loop run eagerly and in CUDA graphs must write the same tokens and
         count the same keys (exit 1 otherwise); how far transformers' loop and compiled layers agree is shown.
speed    dense and kascade: time to first token, and tokens/s after it of all three loops.
command  what `kascade generate` reports, both strategies, with and without --compile.
kernels  where the time of a step goes, by kernel.

One JSON row each, with GPU, versions, date and commit. `--dry-run` runs the logic without a GPU, without capturing.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

STEPS = ("tokens", "speed", "command", "kernels")
COUNTS = ("keys_read", "keys_visible", "forward_passes")


class Bench:
    """The model, where rows go, and whether anything differed that must not."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from kascade_cli.models import load_model
        from kascade_cli.provenance import commit, now, versions
        from kascade_cli.schema import Profile

        self.options, self.failed = options, False
        self.gpu = not options.dry_run
        device, dtype = ("cuda", "bfloat16") if self.gpu else ("cpu", "float32")
        self.model, self.tokenizer = load_model(options.model, dtype=dtype, device=device)
        self.model.generation_config.eos_token_id = None  # every run writes all of its tokens
        self.profile = Profile.load(options.profile)
        self.device = self.model.device
        name = torch.cuda.get_device_name() if self.gpu else "cpu"
        packages = ("torch", "transformers", "tilelang", "triton")
        self.facts = {"gpu": name, "versions": versions(packages), "date": now(), "commit": commit()}
        self.facts |= {"model": Path(options.model).name, "dtype": dtype}

    def row(self, **fields: Any) -> None:
        line = json.dumps(fields | self.facts, default=str)
        print(line, flush=True)
        if self.options.output:
            with self.options.output.open("a") as file:
                file.write(line + "\n")

    def attach(self, strategy: str) -> Any:
        from kascade_cli.integrations.transformers import attach

        return attach(self.model, self.profile, strategy=strategy, allow_other_weights=True)

    def prompt(self, rows: int, length: int) -> Any:
        import torch

        top = min(20_000, self.model.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(5, top, (rows, length), generator=generator).to(self.device)

    def prefill(self, ids: Any, mask: Any = None) -> tuple[list[Any], Any]:
        """Keys and values of every layer, and the token after the prompt."""
        from transformers import DynamicCache

        from kascade_cli.models import logits_at

        options = {}
        if mask is not None:
            options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        cache = DynamicCache(config=self.model.config)
        logits, _ = logits_at(self.model, ids, 1, past_key_values=cache, use_cache=True, **options)
        return [(layer.keys, layer.values) for layer in cache.layers], logits[:, -1].argmax(-1)

    def runner(self, run: Any, layers: list[Any], rows: int, slots: int, **how: Any) -> Any:
        from kascade_cli.integrations.transformers.decoding import Runner, Slots, bucket

        how["capture"] = self.gpu and how.get("capture", True)
        return Runner(self.model, Slots(layers, rows, bucket(slots)), run, **how)

    def clock(self) -> float:
        import torch

        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def eager(self, ids: Any, mask: Any, count: int) -> tuple[Any, float]:
        """transformers' loop: tokens [B, count], seconds for all but the first."""
        times = []

        class Clock:
            def put(_, value: Any) -> None:
                times.append(self.clock())

            def end(_) -> None:
                pass

        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, streamer=Clock()
        )
        return out[:, ids.shape[1] :], times[-1] - times[1]

    # -- steps --

    def tokens(self) -> None:
        import torch

        from kascade_cli.integrations.transformers.decoding import decode
        from kascade_cli.sparse import known_strategies

        length, count = (4096, 40) if self.gpu else (200, 20)
        ids = self.prompt(3, length)
        mask = torch.ones_like(ids)
        for row in (1, 2):
            mask[row, : row * length // 3 + row] = 0
        ids *= mask
        for strategy in known_strategies():
            with self.attach(strategy) as run:
                layers, token = self.prefill(ids, mask)
                found, reasons = {}, {}
                for name, how in {
                    "static": {"capture": False},
                    "graphs": {},
                    "compiled": {"compile": True},
                }.items():
                    runner = self.runner(run, layers, len(ids), length + count + 1, **how)
                    run.reset()
                    began = self.clock()
                    for _ in range(2):  # the second time without preparing
                        runner.load(layers, token, mask.sum(-1))
                        tokens = decode(runner, count)
                    counted = run.report()
                    found[name] = tokens, {key: counted[key] for key in COUNTS}, self.clock() - began
                    reasons[name] = {"reason": runner.reason, "uncompiled": runner.uncompiled}
                    refresh = counted.get("refresh")
                    found[name][1]["refresh"] = refresh
                own, _ = self.eager(ids, mask, count)
            static = found["static"]
            same = torch.equal(static[0], found["graphs"][0]) and static[1] == found["graphs"][1]
            self.failed |= not same
            self.row(
                kind="tokens", strategy=strategy, rows=len(ids), context=length, new=count,
                graphs_equal_static=same, captured=reasons["graphs"]["reason"] is None,
                why_not=reasons["graphs"]["reason"], why_not_compiled=reasons["compiled"]["uncompiled"],
                counts={name: value[1] for name, value in found.items()},
                agreement_transformers=round((own == static[0]).double().mean().item(), 4),
                agreement_compiled=round((found["compiled"][0] == static[0]).double().mean().item(), 4),
                seconds={name: round(value[2], 2) for name, value in found.items()},
                fallbacks=run.report()["fallbacks"],
            )  # fmt: skip

    def speed(self) -> None:
        from kascade_cli.integrations.transformers.decoding import decode

        length, new = self.options.context, self.options.new
        for rows in self.options.batch:
            ids, own = self.prompt(rows, length), {}
            for strategy in ("dense", "kascade"):
                with self.attach(strategy) as run:
                    self.prefill(ids)  # what is loaded at first
                    times = []
                    for _ in range(3):
                        began = self.clock()
                        layers, token = self.prefill(ids)
                        times.append(self.clock() - began)
                    _, seconds = self.eager(ids, None, 12)
                    base = {"strategy": strategy, "batch": rows, "context": length, "backend": run.backend.name}
                    row = {"first_token_s": round(statistics.median(times), 4)}
                    row |= {"transformers_tokens_s": round(rows * 11 / seconds, 1)}
                    for name, compile in (("graphs", False), ("compiled", True)):
                        runner = None  # its cache makes room
                        runner = self.runner(run, layers, rows, length + new + 1, compile=compile)
                        rates = []
                        for turn in range(4):
                            runner.load(layers, token)
                            runner.prepare()
                            if not turn:
                                row[f"{name}_prepare_s"] = round(runner.seconds, 2)
                            began = self.clock()
                            decode(runner, new)
                            rates.append(rows * (new - 1) / (self.clock() - began))
                        row[f"{name}_tokens_s"] = round(statistics.median(rates[1:]), 1)
                        row[f"{name}_ms"] = round(rows * 1000 / statistics.median(rates[1:]), 3)
                        row |= {f"{name}_why_not": runner.reason}
                    row["compiled_why_not"] = runner.uncompiled or runner.reason
                    row["density"] = round(run.report()["phases"]["decode"]["density"], 4)
                    own[strategy] = row
                    self.row(kind="speed", **base, **row)
                    del runner, layers
            self.row(
                kind="speed", strategy="kascade/dense", batch=rows, context=length,
                first_token=round(own["dense"]["first_token_s"] / own["kascade"]["first_token_s"], 3),
                **{
                    name: round(own["kascade"][f"{name}_tokens_s"] / own["dense"][f"{name}_tokens_s"], 3)
                    for name in ("transformers", "graphs", "compiled")
                },
            )  # fmt: skip

    def command(self) -> None:
        from kascade_cli.generation import generate
        from kascade_cli.sparse import Setting

        ids = self.prompt(1, self.options.context)[0].tolist()
        for strategy in ("dense", "kascade"):
            setting = Setting(strategy, self.profile, allow_other_weights=True)
            for compile in (False, True):
                run = generate(
                    self.model, self.tokenizer, ids, setting, max_new_tokens=self.options.new, compile=compile
                )
                self.row(
                    kind="command", strategy=strategy, batch=1, context=len(ids), new=len(run.tokens),
                    first_token_s=round(run.first_token_s, 4), tokens_s=round(run.tokens_per_s, 1),
                    graphs_s=round(run.graphs_s, 2), eager=run.eager, uncompiled=run.uncompiled,
                )  # fmt: skip

    def kernels(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activity = [ProfilerActivity.CUDA if self.gpu else ProfilerActivity.CPU]
        for rows in self.options.batch:
            ids = self.prompt(rows, self.options.context)
            for strategy in ("dense", "kascade"):
                with self.attach(strategy) as run:
                    layers, token = self.prefill(ids)
                    for compile in (False, True):
                        runner = self.runner(run, layers, rows, ids.shape[1] + 40, compile=compile)
                        runner.load(layers, token)
                        runner.prepare()
                        runner.step()
                        self.clock()
                        with profile(activities=activity) as prof:
                            for _ in range(8):
                                runner.step()
                            self.clock()
                        key = "self_device_time_total" if self.gpu else "self_cpu_time_total"
                        events = sorted(prof.key_averages(), key=lambda event: -getattr(event, key))
                        self.row(
                            kind="kernels", strategy=strategy, batch=rows, context=ids.shape[1],
                            compiled=runner.compiled, why_not=runner.uncompiled or runner.reason,
                            launches=sum(event.count for event in events) // 8,
                            busy_ms=round(sum(getattr(event, key) for event in events) / 8000, 3),
                            us_a_step=[
                                [event.key[:70], event.count // 8, round(getattr(event, key) / 8, 1)]
                                for event in events[:24]
                            ],
                        )  # fmt: skip
                        del runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--context", type=int, default=28_672)
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    import torch

    if not (torch.cuda.is_available() or options.dry_run):
        sys.exit("decode_loop.py measures on a GPU, and there is none here: --dry-run runs its logic without one")
    unknown = set(options.steps) - set(STEPS)
    if unknown:
        sys.exit(f"no step is called {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    bench = Bench(options)
    with torch.no_grad():
        for step in options.steps:
            began = time.perf_counter()
            try:
                getattr(bench, step)()
            except Exception as error:  # the other steps shall be measured all the same
                bench.failed = True
                bench.row(kind=step, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(f"{step}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    sys.exit(1 if bench.failed else 0)


if __name__ == "__main__":
    main()
