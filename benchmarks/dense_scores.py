"""Exact match of a model with dense attention on the built-in tasks: the figures of the model cards.

    python benchmarks/dense_scores.py demo --lengths 1k,2k,4k --prompts 96
    python benchmarks/dense_scores.py demo-small --lengths 1k,2k --prompts 96

Test split, teacher forced: a question counts when the argmax at every answer position is the answer's token,
which is what greedy decoding would give. Writes benchmarks/results/dense_scores-MODEL.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from kascade_cli import console, files, tasks
from kascade_cli.demo import DEMO_TASKS
from kascade_cli.errors import KascadeError
from kascade_cli.models import load_model

RESULTS = Path(__file__).parent / "results"


@torch.inference_mode()
def answers_right(model: Any, encoded: tasks.EncodedPrompt) -> list[bool]:
    """Per question, whether every answer token is the argmax of the logits before it."""
    ids = torch.tensor([encoded.ids], device=model.device)
    keep = len(encoded.ids) - min(encoded.answer_positions)
    predicted = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0].argmax(-1).tolist()
    shift = len(encoded.ids) - keep
    return [
        predicted[start - 1 - shift : stop - 1 - shift] == encoded.ids[start:stop] for start, stop in encoded.answers
    ]


def measure(
    model: Any, tokenizer: Any, task: str, length: int, prompts: int, questions: int, seed: int
) -> dict[str, tasks.Interval]:
    """Exact match per kind of question over `prompts` test prompts with haystacks of `length` tokens."""
    values: dict[str, list[bool]] = {}
    clusters: dict[str, list[int]] = {}
    with console.progress(f"{task} at {length}", total=prompts) as bar:
        for index, prompt in enumerate(
            tasks.make_prompts(task, length=length, count=prompts, questions_per_task=questions, seed=seed)
        ):
            right = answers_right(model, tasks.encode_prompt(prompt, tokenizer))
            for question, ok in zip(prompt.questions, right, strict=True):
                values.setdefault(question.task, []).append(ok)
                clusters.setdefault(question.task, []).append(index)
            bar.advance(bar.first)
    return {kind: tasks.cluster_interval(values[kind], clusters[kind]) for kind in values}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, demo-small, a folder or a hub id")
    parser.add_argument("--task", help="built-in task (default: what the demo model was trained on, else hops)")
    parser.add_argument("--lengths", default="1k,2k,4k", help="tokens of the haystack")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--questions", type=int, default=8, help="per prompt and kind of question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/dense_scores-MODEL.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    task = options.task or DEMO_TASKS.get(options.model, "hops")
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    tasks.check_words(tokenizer)
    rows = []
    table = Table("context", "task", "exact match", "95 % interval", "questions", "prompts")
    for length in console.parse_sizes(options.lengths):
        began = time.perf_counter()
        scores = measure(model, tokenizer, task, length, options.prompts, options.questions, options.seed)
        seconds = time.perf_counter() - began
        for kind in tasks.member_tasks(task):
            score = scores[kind]
            limits = f"{score.low:.3f} to {score.high:.3f}"
            table.add_row(
                console.format_size(length),
                kind,
                f"{score.mean:.3f}",
                limits,
                str(score.count),
                str(score.clusters),
            )
            rows.append(
                {
                    "model": options.model,
                    "strategy": "dense",
                    "task": kind,
                    "mix": task,
                    "length": length,
                    "exact_match": round(score.mean, 4),
                    "low": round(score.low, 4),
                    "high": round(score.high, 4),
                    "questions": score.count,
                    "prompts": score.clusters,
                    "seed": options.seed,
                    "seconds_all_tasks": round(seconds, 1),
                }
            )
    document = {
        "benchmark": "dense_scores",
        "command": "python benchmarks/dense_scores.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    output = options.output or RESULTS / f"dense_scores-{Path(options.model).name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(output, json.dumps(document, indent=1) + "\n")
    console.out.print(table)
    console.err.print(f"wrote {output}")


if __name__ == "__main__":
    try:
        main()
    except KascadeError as error:
        sys.exit(f"error: {error}")
