"""How good the reused norm of `kascade-reused-norm` is: its error, and what the keys chosen with it are worth.

    python benchmarks/reused_norm.py demo --profile profiles/demo.yaml --lengths 1k,2k --prompts 8

For every anchor after the first layer, on prefills of test prompts under the strategy itself (so that errors of
earlier anchors are in): `gap`, exact log-sum-exp minus the one over the keys of the anchor before, in nats;
`gap_in_pool`, its standard deviation among the queries and heads that one score is summed over (an equal gap for all
of them changes nothing); `reused`, the exact mass that the anchor before's keys would keep, and `kept`, the one that
the keys chosen with the reused norm keep, both over the mass of the exact Top-k, per tile and KV head. Tiles that read
all keys are left out. Writes benchmarks/results/reused_norm-MODEL.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor

from kascade_cli import attach, console, files, tasks
from kascade_cli.demo import DEMO_TASKS
from kascade_cli.errors import KascadeError
from kascade_cli.integrations.transformers import Attachment
from kascade_cli.kernels import reference
from kascade_cli.models import load_model
from kascade_cli.schema import Profile

RESULTS = Path(__file__).parent / "results"


def measure(q: Tensor, k: Tensor, chosen: Tensor, counts: Tensor, reused: Tensor, *lengths: Tensor, **options: Any):
    """Flat tensors gap, gap_in_pool, reused, kept of one anchor and one prompt (batch 1, no padding)."""
    tile, tiles, groups = options["tile"], counts.shape[1], k.shape[1]
    before = torch.arange(tiles)[None] * tile
    late = (counts < before)[0] & (before[0] + tile <= q.shape[2])  # whole tiles that leave keys out

    def score(lse: Tensor) -> Tensor:
        return reference.prefill_score(q, k, lse, *lengths, tiles=tiles, **options)

    def top(scores: Tensor) -> Tensor:
        rows = (counts[:, None], torch.zeros(1, 1, 1, dtype=torch.int32), before[:, None])
        return reference.select_topk(scores, *rows, max_count=chosen.shape[-1])

    _, lse = reference.prefill_dense(q, k, None, *lengths, scale=options["scale"])
    exact = score(lse)

    def mass(indices: Tensor) -> Tensor:
        used = torch.arange(indices.shape[-1]) < counts[:, None, :, None]
        return (exact.gather(-1, indices.clamp_min(0).long()) * used).sum(-1)[:, :, late]

    best = mass(top(exact))
    gap = torch.nn.functional.pad(lse - reused, (0, tiles * tile - q.shape[2])).unflatten(2, (tiles, tile))[:, :, late]
    pools = gap.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
    return {
        "gap": gap.flatten(),
        "gap_in_pool": pools.std(-1).flatten(),
        "reused": (mass(chosen) / best).flatten(),
        "kept": (mass(top(score(reused))) / best).flatten(),
    }


def watch(attachment: Attachment) -> list[dict[str, Tensor]]:
    """Makes the attached backend measure every reused norm; returns the list that it appends to, in call order."""
    plain, found = attachment.backend.prefill_sparse_lse, []

    def call(q, k, chosen, counts, head_map, *lengths, **options):
        lse = plain(q, k, chosen, counts, head_map, *lengths, **options)
        found.append(measure(q, k, chosen, counts, lse, *lengths, **options))
        return lse

    attachment.backend.prefill_sparse_lse = call
    return found


def summary(values: dict[str, Tensor]) -> dict[str, float]:
    """Means, and the ends that matter."""
    gap, kept = values["gap"], values["kept"]
    found = {f"{name}_mean": value.mean() for name, value in values.items()}
    found |= {"gap_p99": gap.quantile(0.99), "gap_max": gap.max(), "kept_p01": kept.quantile(0.01)}
    return {name: round(float(value), 4) for name, value in found.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, demo-small, a folder or a hub id")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--lengths", default="1k,2k", help="tokens of the haystack")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    model, tokenizer = load_model(options.model, dtype="float32", device="cpu")
    profile = Profile.load(options.profile)
    anchors = [layer for layer in profile.anchors if profile.layers[layer].role == "anchor"]
    rows = []
    for length in console.parse_sizes(options.lengths):
        values: dict[int, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        task = DEMO_TASKS.get(options.model, "hops")
        prompts = tasks.make_prompts(
            task, length=length, count=options.prompts, questions_per_task=8, seed=options.seed
        )
        for prompt in prompts:
            ids = torch.tensor([tasks.encode_prompt(prompt, tokenizer).ids])
            with attach(model, profile, strategy="kascade-reused-norm", ratio=options.ratio) as attachment:
                found = watch(attachment)
                with torch.inference_mode():
                    model(ids, use_cache=False)
            for anchor, part in zip(anchors, found, strict=True):
                for name, value in part.items():
                    values[anchor][name].append(value)
        for anchor, parts in values.items():
            joined = {name: torch.cat(value) for name, value in parts.items()}
            rows.append({"length": length, "anchor": anchor, "prompts": options.prompts, **summary(joined)})
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    document = {
        "benchmark": "reused_norm",
        "command": "python benchmarks/reused_norm.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": options.model,
        "anchors": profile.anchors,
        "ratio": options.ratio,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    output = RESULTS / f"reused_norm-{Path(options.model).name}.json"
    files.atomic_write(output, json.dumps(document, indent=1) + "\n")
    console.out.print(table)
    console.err.print(f"wrote {output}")


if __name__ == "__main__":
    try:
        main()
    except KascadeError as error:
        sys.exit(f"error: {error}")
