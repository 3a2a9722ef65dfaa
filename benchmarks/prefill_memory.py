"""Peak memory and time of one sparse prefill of the 16-layer built-in model on the PyTorch backend:

    python benchmarks/prefill_memory.py [--lengths 8k,16k,32k] [--strategy kascade] [-o benchmarks/results/x.json]

Every length runs in a process of its own, because a process's peak never falls. Nothing is T x S, so the peak above
the loaded model grows linearly: the ratio of increments is about 2 per doubling. (The model's rotary positions end at
16k; its answers mean nothing beyond, its memory does.)
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(length: int, strategy: str) -> dict:
    """One prefill in this process."""
    import torch

    from kascade_cli import attach
    from kascade_cli.models import load_model
    from kascade_cli.schema import Profile

    torch.set_num_threads(1)
    model, _ = load_model("demo", device="cpu", dtype="float32")
    tokens = torch.randint(16, 500, (1, length), generator=torch.Generator().manual_seed(0))
    profile = Profile.load(ROOT / "profiles/demo.yaml")
    with torch.no_grad(), attach(model, profile, strategy=strategy, backend="torch", allow_other_weights=True) as run:
        model(tokens[:, :64], logits_to_keep=1)  # warm
        run.reset()
        before, begin = peak_mb(), time.perf_counter()
        model(tokens, logits_to_keep=1)
        seconds = time.perf_counter() - begin
        return {
            "length": length,
            "peak_mb": round(peak_mb(), 1),
            "above_model_mb": round(peak_mb() - before, 1),
            "seconds": round(seconds, 1),
            "density": round(run.density, 4),
        }


def main() -> None:
    from kascade_cli.console import parse_sizes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8k,16k,32k")
    parser.add_argument("--strategy", default="kascade")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.strategy)))
        return
    rows = []
    for length in parse_sizes(options.lengths):
        command = [sys.executable, __file__, "--one", str(length), "--strategy", options.strategy]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    growth = [round(b["above_model_mb"] / a["above_model_mb"], 2) for a, b in zip(rows, rows[1:], strict=False)]
    print("growth of the peak above the model:", growth)
    if options.output:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip()}
        about["strategy"] = options.strategy
        options.output.write_text(json.dumps({**about, "threads": 1, "rows": rows, "growth": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
