"""Files of one toy model, small and with numbers that the tests choose."""

import json

import numpy as np
import pytest

from kascade_cli.schema import Budget, ModelCard, Profile
from tests.toy_captures import META, random_prompt, write_capture

LAYERS, GROUPS, HEADS = 6, 2, 4
FINGERPRINT = META["model_fingerprint"]
NAME = "toy <script>alert(1)</script>"


def score(value, low, high, versus=None):
    found = {"score": value, "low": low, "high": high, "questions": 40, "prompts": 10}
    if versus is not None:
        found["vs_dense"] = dict(zip(("score", "low", "high"), versus, strict=True))
    return found


def row(strategy, mean, read, ratio=0.1, **more):
    versus = None if strategy == "dense" else (mean - 80.0, mean - 84.0, mean - 77.0)
    points = score(mean, max(0.0, mean - 9.0), min(100.0, mean + 7.0), versus)
    density = {"all": read, "prefill": read, "decode": read / 2}
    return {
        "length": 1024, "strategy": strategy, "ratio": None if strategy == "dense" else ratio, "min_keys": 16,
        "density": density, "scores": {"one": points, "two": points}, "mean": points, "seconds": 1.0,
    } | more  # fmt: skip


def kl(mean):
    return {"mean": mean, "low": mean / 2, "high": mean * 2, "prompts": 4, "positions": 9, "per_prompt": [mean] * 4}


def sweep_rows(name):
    rows = [row("dense", 80.0, 1.0, kl=kl(0.0))]
    if name == "oracle":
        rows += [row("oracle", 40.0 + 8 * n, 0.2 + r, r, kl=kl(0.5 / (n + 1))) for n, r in enumerate((0.02, 0.1, 0.4))]
        rows += [row("oracle", 50.0 + n, 0.3, None, keys=k, kl=kl(0.2)) for n, k in enumerate((8, 64))]
    elif name == "pooling":
        for label, base in (("post-softmax", 78.0), ("pre-softmax", 60.0)):
            rows += [row(label, base - n, 0.2, tile=t, kl=kl(0.01 * (n + 1))) for n, t in enumerate((4, 32, 128))]
    else:
        for anchors in ([0, 3], [0, 2, 4]):
            for n, label in enumerate(("kascade", "kascade-pooled", "kascade-no-remap")):
                rows += [
                    row(label, 75.0 - 5 * n + 20 * r, 0.3, r, anchors=anchors, kl=kl(0.1 + n)) for r in (0.05, 0.2)
                ]
    return rows


def bench():
    rows = []
    for phase, size, context, speed in (("decode", "64 x 32k", 32768, 4.0), ("prefill", "1 x 32k", 32768, 2.0)):
        shape = {
            "phase": phase, "size": size, "batch": 1, "context": context, "query_heads": 32, "kv_heads": 8,
            "head_dim": 128, "dtype": "bfloat16", "ratio": 0.1,
        }  # fmt: skip
        model = {"layers": 32, "anchors": 5, "layer0_ms": 3.0, "anchor_ms": 2.0, "reuse_ms": 0.25, "mean_ms": 0.7}
        rows.append(
            shape | model | {"kind": "model", "name": "model", "dense_ms": 2.8, "baseline": "x", "speedup": speed}
        )
        times = {"ms_p20": 1.0, "ms_p50": 1.5, "ms_p80": 2.0, "gb_s": 100.0, "tflop_s": None, "speedup": 0.9}
        rows.append(shape | times | {"kind": "role", "name": "anchor"})
        rows.append(
            shape | times | {"kind": "e2e", "name": "sparse", "strategy": "kascade", "tokens_s": 9.0, "density": 0.1}
        )
    return {
        "schema": "kascade-bench/v1", "gpu": "Toy GPU", "device": "Toy GPU", "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.0"}, "ceilings": {"copy_gb_s": 3000.0, "matmul_tflop_s": 700.0},
        "settings": {"command": "model"}, "rows": rows,
    }  # fmt: skip


def candidates():
    made = []
    for anchors, value, who in (([0], 4.0, "importance"), ([0, 3], 0.02, "uniform"), ([0, 2, 4], 0.01, "importance")):
        made.append(
            {
                "anchors": anchors, "objectives": {who: 1.0}, "kl": {"decode": value, "prefill": value}, "prompts": 4,
                "kl_mean": value, "answers": {"asked": 40, "given": 30, "kept": 30 - int(5 * value)},
            }
        )  # fmt: skip
    return made


def make_profile(name=NAME, fingerprint=FINGERPRINT, **more):
    card = ModelCard(name=name, fingerprint=fingerprint, layers=LAYERS, query_heads=HEADS, kv_heads=GROUPS, head_dim=8)
    maps = {layer: {"decode": [1, 0], "prefill": [0, 1]} for layer in (1, 2, 4)}
    verify = {
        "positions": "answers",
        "prompts": 4,
        "dev_set": "<b>set</b>",
        "max_length": 99,
        "candidates": candidates(),
    }
    return Profile.build(
        model=card, anchors=[0, 3], profiled_layers=[0, 1, 2, 3, 4], head_maps=maps, budget=Budget(min_keys=16),
        selection={"anchors": [0, 3], "why": "a <i>reason</i>", "verify": verify},
        provenance={"tool": "kascade 0", "created": "2026-01-02T00:00:00+00:00", "capture": "c.h5"}, **more,
    )  # fmt: skip


def make_prompts(seed=0, count=2):
    rng = np.random.default_rng(seed)
    tiles = [(0, 32), (64, 32), (150, 1), (199, 1)]
    return [
        random_prompt(rng, layers=5, heads=GROUPS, n_tokens=200, tiles=tiles, query_heads=HEADS, related=0.3)
        for _ in range(count)
    ]


@pytest.fixture
def prompts():
    return make_prompts()


@pytest.fixture
def files(tmp_path, prompts):
    """Kind -> path; the sweeps under their own names."""
    paths = {name: tmp_path / f"{name}.json" for name in ("evaluation", "bench", "oracle", "pooling", "remap")}
    paths["capture"] = write_capture(
        tmp_path / "capture.h5", prompts, profiled_layers=[0, 1, 2, 3, 4], layers=LAYERS, model_name=NAME
    )
    paths["profile"] = tmp_path / "profile.yaml"
    make_profile().save(paths["profile"])
    rows = [
        row("dense", 80.0, 1.0), row("kascade", 78.0, 0.2), row("kascade", 70.0, 0.12, 0.05),
        row("streaming-llm", 5.0, 0.1), row("mine & <yours>", 33.0, 0.5),
    ]  # fmt: skip
    evaluation = {
        "model": NAME, "fingerprint": FINGERPRINT, "profile": "p.yaml", "tasks": ["one", "two"], "seed": 0,
        "dtype": "float32", "device": "cpu", "rows": rows, "requirements": [],
    }  # fmt: skip
    paths["evaluation"].write_text(json.dumps(evaluation))
    paths["bench"].write_text(json.dumps(bench()))
    for figure, name in ((2, "oracle"), (5, "pooling"), (6, "remap")):
        document = {
            "schema": "kascade-sweep/v1", "sweep": name, "figure": figure, "model": NAME, "fingerprint": FINGERPRINT,
            "tasks": ["one", "two"], "settings": {"length": 1024, "min_keys": 16}, "command": f"kascade sweep {name}",
            "tool": "kascade 0", "date": "2026-01-02T03:04:05+00:00", "rows": sweep_rows(name),
        }  # fmt: skip
        paths[name].write_text(json.dumps(document))
    return paths


@pytest.fixture
def build():
    """The page's text from paths."""
    from kascade_cli.report.page import load_all, measure_captures, page

    def make(*paths, **more):
        sources = load_all(list(paths))
        return page(sources, measure_captures(sources, top_k=8), **more)

    return make
