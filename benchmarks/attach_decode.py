"""Decode steps of the demo model under `attach` on a CPU: milliseconds a step, dense and kascade, and their ratio.

    python benchmarks/attach_decode.py                          this tree
    python benchmarks/attach_decode.py --against ../other-tree  both, taking turns, and the ratio of their medians

A tree is a checkout; each round is a process of its own, and rounds alternate, so that a busy machine slows both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import json, statistics, sys, time
import torch
from kascade_cli import Profile, attach
from kascade_cli.models import load_model
torch.set_num_threads(1)
context, steps, profile = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model, _ = load_model("demo", dtype="float32", device="cpu")
ids = torch.randint(5, 200, (1, context), generator=torch.Generator().manual_seed(0))
found = {}
for strategy in ("dense", "kascade"):
    with torch.inference_mode(), attach(model, Profile.load(profile), strategy=strategy, allow_other_weights=True):
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        mask, times = torch.ones(1, context, dtype=torch.long), []
        for step in range(steps):
            mask = torch.cat([mask, mask[:, :1]], 1)
            began = time.perf_counter()
            model(ids[:, :1], past_key_values=cache, attention_mask=mask, use_cache=True)
            times.append(time.perf_counter() - began)
    found[strategy] = 1000 * statistics.median(times[2:])
print(json.dumps(found))
"""


def measure(tree: Path, context: int, steps: int) -> dict[str, float]:
    """Median milliseconds a step per strategy, in a process that runs the package of `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", MEASURE, str(context), str(steps), str(ROOT / "profiles/demo.yaml")]
    if tree != ROOT:  # a profile that its code can read
        command[-1] = str(tree / "profiles/demo.yaml")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tree)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(options.rounds):
        for name, tree in trees.items():
            found[name].append(measure(tree, options.context, options.steps))
    medians = {
        name: {strategy: statistics.median(row[strategy] for row in rows) for strategy in rows[0]}
        for name, rows in found.items()
    }
    for name, row in medians.items():
        print(f"{name}: " + ", ".join(f"{strategy} {ms:.2f} ms" for strategy, ms in row.items()))
    if "other" in medians:
        for strategy in medians["this"]:
            ratios = [a[strategy] / b[strategy] for a, b in zip(found["this"], found["other"], strict=True)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"this / other, {strategy}: median {statistics.median(ratios):.3f}, {spread}")


if __name__ == "__main__":
    main()
