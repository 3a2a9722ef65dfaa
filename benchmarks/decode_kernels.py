"""Check and time the decode kernels on a Hopper GPU:  python benchmarks/decode_kernels.py -o rows.json [--quick]

Compiles what it needs in parallel, runs the numerics matrix, then times each op, each role of the method and a
stack of 32 layers (one dense anchor, four anchors, 27 reuse) against the best dense attention, all from CUDA
graphs whose calls cycle through several caches, so that no call finds its keys in L2.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kascade_cli.kernels import get_backend
from kascade_cli.kernels.testing import decode
from kascade_cli.kernels.tilelang import specs
from kascade_cli.kernels.tilelang.compile import prebuild

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPES = ((64, 32768), (16, 131072), (4, 32768), (1, 131072))
DEVICE = torch.device("cuda")
ROLES = ("layer0", "anchor", "anchor", "anchor", "anchor", *["reuse"] * 27)


def wanted(cases: tuple[decode.DecodeCase, ...]) -> list[Any]:
    """Every kernel that `cases` and the timings use, once."""
    shapes = {(c.heads // c.kv_heads, c.dim, str(c.dtype)[6:], c.page) for c in cases}
    found = specs.select_specs()
    for shape in sorted(shapes | {(HEADS // KV_HEADS, DIM, "bfloat16", 0)}):
        found += specs.decode_specs(*shape)
    return list({str(spec): spec for spec in found}.values())


def timed(call: Callable[[int], Any], caches: int, repeats: int = 9) -> dict[str, float]:
    """Milliseconds per call, p20/p50/p80 over graph replays of two rounds through the caches."""
    call(0)
    torch.cuda.synchronize()
    calls = 2 * caches
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i % caches) for i in range(calls)]
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    del kept
    times.sort()
    return {f"p{p}": times[min(len(times) - 1, len(times) * p // 100)] for p in (20, 50, 80)}


class Step:
    """One decode step's inputs: several caches of one shape, and the ops on them."""

    def __init__(self, ops: Any, batch: int, length: int, ratio: float = 0.1):
        self.ops, self.batch, self.length, self.scale = ops, batch, length, DIM**-0.5
        size = batch * length * KV_HEADS * DIM * 4
        self.caches = max(2, min(6, int(60e9 / size)))
        make = dict(device=DEVICE, dtype=torch.bfloat16)
        self.q = torch.randn(batch, HEADS, DIM, **make)
        self.k = [torch.randn(batch, KV_HEADS, length, DIM, **make) for _ in range(self.caches)]
        self.v = [torch.randn(batch, KV_HEADS, length, DIM, **make) for _ in range(self.caches)]
        self.start = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
        self.len = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
        self.budget = max(128, int(ratio * length))
        self.count = torch.full((batch,), self.budget, dtype=torch.int32, device=DEVICE)
        self.map = torch.tensor([1, 0, 2, 3, 5, 4, 7, 7], dtype=torch.int32, device=DEVICE)
        self.scores = [self.score(i) for i in range(self.caches)]
        self.picked = [self.select(s) for s in self.scores]

    def cudnn(self, i: int) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(self.q[:, :, None], self.k[i], self.v[i], enable_gqa=True)

    def dense(self, i: int) -> Tensor:
        return self.ops.decode_dense(self.q, self.k[i], self.v[i], self.start, self.len, scale=self.scale)[0]

    def score(self, i: int) -> Tensor:
        return self.ops.decode_score(self.q, self.k[i], self.start, self.len, scale=self.scale)

    def select(self, scores: Tensor) -> Tensor:
        return self.ops.select_topk(
            scores, self.count[:, None], self.start[:, None], self.len[:, None], max_count=self.budget
        )

    def sparse(self, i: int, picked: Tensor, logits: Tensor | None = None) -> Tensor:
        return self.ops.decode_sparse(
            self.q, self.k[i], self.v[i], picked, self.count, self.map, scale=self.scale, logits=logits
        )

    def layer0(self, i: int) -> tuple[Tensor, Tensor]:
        out, scores = self.ops.decode_dense(
            self.q, self.k[i], self.v[i], self.start, self.len, scale=self.scale, scores=True
        )
        return out, self.select(scores)

    def anchor(self, i: int) -> tuple[Tensor, Tensor]:
        scores, logits = self.ops.decode_score(self.q, self.k[i], self.start, self.len, scale=self.scale, logits=True)
        picked = self.select(scores)
        return self.sparse(i, picked, logits), picked

    def reuse(self, i: int) -> Tensor:
        return self.sparse(i, self.picked[i])

    def model(self, start: int) -> list[Any]:
        """32 layers, each on the next cache."""
        return [getattr(self, role)((start + i) % self.caches) for i, role in enumerate(ROLES)]

    def dense_model(self, start: int, best: str) -> list[Any]:
        return [getattr(self, best)((start + i) % self.caches) for i in range(len(ROLES))]


def measure(ops: Any, batch: int, length: int) -> dict[str, Any]:
    """Times of every op and role of one shape, and the speed-ups."""
    step = Step(ops, batch, length)
    calls = {
        "cudnn": step.cudnn,
        "dense": step.dense,
        "score": step.score,
        "topk": lambda i: step.select(step.scores[i]),
        "sparse": lambda i: step.sparse(i, step.picked[i]),
        "layer0": step.layer0,
        "anchor": step.anchor,
    }
    times = {name: timed(call, step.caches) for name, call in calls.items()}
    best = min(("cudnn", "dense"), key=lambda n: times[n]["p50"])
    best_ms = times[best]["p50"]
    mean = (times["layer0"]["p50"] + 4 * times["anchor"]["p50"] + 27 * times["sparse"]["p50"]) / len(ROLES)
    whole = timed(step.model, 1, repeats=5)["p50"] / len(ROLES)
    whole_dense = timed(lambda i: step.dense_model(i, best), 1, repeats=5)["p50"] / len(ROLES)
    bytes_read = batch * length * KV_HEADS * DIM * 4
    return {
        "batch": batch, "length": length, "budget": step.budget, "ms": times, "best_dense": best,
        "dense_GBs": bytes_read / best_ms / 1e6, "own_dense_over_best": times["cudnn"]["p50"] / times["dense"]["p50"],
        "mean_ms": mean, "speedup_from_roles": best_ms / mean, "model_ms_per_layer": whole,
        "dense_model_ms_per_layer": whole_dense, "speedup_whole_stack": whole_dense / whole,
    }  # fmt: skip


def copy_bandwidth() -> float:
    """GB/s of a large device-to-device copy, read plus write."""
    x = torch.randn(1 << 31, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_like(x)
    return 4 * x.numel() / timed(lambda i: y.copy_(x), 1)["p50"] / 1e6


def about() -> dict[str, Any]:
    """What the numbers were measured on."""
    import tilelang

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "tilelang": tilelang.__version__, "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--commit", help="commit to record where there is no git history")
    parser.add_argument("--quick", action="store_true", help="skip the numerics matrix")
    options = parser.parse_args()
    result: dict[str, Any] = {"about": {**about(), **({"commit": options.commit} if options.commit else {})}}
    begin = time.perf_counter()
    failed = prebuild(wanted(() if options.quick else decode.CASES))
    print(f"compiled in {time.perf_counter() - begin:.0f} s, {len(failed)} failed {failed or ''}", flush=True)
    ops = get_backend("tilelang", DEVICE)
    good = True
    if not options.quick:
        rows = decode.check_decode(ops, DEVICE) + decode.check_select(ops, DEVICE)
        rows += decode.stress_decode(ops, DEVICE) + decode.check_graph(ops, DEVICE)
        good = decode.summary(rows)
        result["checks"] = rows
        print(f"checked after {time.perf_counter() - begin:.0f} s", flush=True)
    result["copy_GBs"] = copy_bandwidth()
    result["rows"] = []
    for batch, length in SHAPES:
        row = measure(ops, batch, length)
        result["rows"].append(row)
        line = " ".join(f"{name} {t['p50']:.4f}" for name, t in row["ms"].items())
        print(
            f"{batch}x{length}: {line} | roles {row['speedup_from_roles']:.2f}x "
            f"stack {row['speedup_whole_stack']:.2f}x "
            f"dense {row['own_dense_over_best']:.3f}",
            flush=True,
        )
        torch.cuda.empty_cache()
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
