"""What kept keys cost when the keys that are needed change: many questions within one decode of a built-in model:

    python benchmarks/refresh_stress.py [--refresh 1,2,4,8,16] [-o benchmarks/results/refresh_stress-demo-1k.json]

`kascade evaluate` prefills every question and decodes the two or three tokens of its answer, so that kascade-refresh
chooses keys right behind the question. Here the text is prefilled and everything after it is decoded token by token:
question, answer, the next question, about 130 steps. Every question needs other keys, and a refresh falls anywhere in
it. The tokens are the right ones whatever the model says (teacher forcing), so an answer is right if it would be
written greedily after a right history. It is the hardest case for kept keys: look-ups with nothing in common.

Rows: exact match per task (points of 100, 95 % limits, difference to kascade paired over prompts), KL to dense at the
answers, keys read in decode, and the share of right answer tokens by age: how many steps ago the keys were chosen
that the step read (0: in that step).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kascade_cli import attach
from kascade_cli.benchmarking.report import machine
from kascade_cli.console import parse_size
from kascade_cli.demo import DEMO_TASKS
from kascade_cli.evaluation.cases import Case, built_in_cases, split_sources
from kascade_cli.generation import kl_divergence
from kascade_cli.models import load_model
from kascade_cli.schema import Profile
from kascade_cli.tasks import cluster_interval, paired_interval
from kascade_cli.tasks.encoding import encode_more

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8


class Decode:
    """A text's questions and answers as the tokens that are decoded, and where the answers are."""

    def __init__(self, case: Case, tokenizer: Any):
        self.context, self.tasks = case.context, [question.task for question in case.questions]
        self.tokens: list[int] = []
        self.answers: list[range] = []  # decode steps whose logits predict an answer's tokens
        for question in case.questions:
            self.tokens += question.ids
            answer = encode_more(tokenizer, question.answers[0])
            self.answers.append(range(len(self.tokens) - 1, len(self.tokens) - 1 + len(answer)))
            self.tokens += answer


@torch.no_grad()
def log_probabilities(model: Any, rows: list[Decode]) -> Tensor:
    """Of every decode step, the last token's left out: float32 [rows, steps, V]."""
    cache = model(torch.tensor([row.context for row in rows]), use_cache=True, logits_to_keep=1).past_key_values
    steps = []
    for token in torch.tensor([row.tokens for row in rows])[:, :-1].unbind(1):
        logits = model(token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        steps.append(logits.float().log_softmax(-1))
    return torch.stack(steps, 1)


def measure(model: Any, profile: Profile, rows: list[Decode], options: dict[str, Any], dense: list[Tensor]) -> dict:
    """Right answers, float64 [questions] of 0 and 1, and tokens of answers, bool; KL per question, decode density.

    `dense` holds the log-probabilities of the dense run, which fills it.
    """
    right, tokens, divergence, began = [], [], [], time.perf_counter()
    with attach(model, profile, backend="torch", **options) as attachment:
        for index, begin in enumerate(range(0, len(rows), BATCH)):
            part = rows[begin : begin + BATCH]
            found = log_probabilities(model, part)
            if options["strategy"] == "dense":
                dense.append(found)
            for i, row in enumerate(part):
                truth = torch.tensor(row.tokens[1:])
                hit = found[i].argmax(-1) == truth
                kl = kl_divergence(dense[index][i], found[i])
                right += [bool(hit[list(steps)].all()) for steps in row.answers]
                tokens += [bool(hit[step]) for steps in row.answers for step in steps]
                divergence += [float(kl[list(steps)].mean()) for steps in row.answers]
        report = attachment.report()
    decode = round(report["phases"]["decode"]["density"], 4)
    seconds = round(time.perf_counter() - began, 1)
    arrays = {"right": np.array(right, np.float64), "tokens": np.array(tokens), "kl": np.array(divergence)}
    return arrays | {"density": decode, "seconds": seconds}


def points(interval: Any) -> dict[str, float]:
    return {name: round(100 * getattr(interval, key), 2)
            for name, key in (("score", "mean"), ("low", "low"), ("high", "high"))}  # fmt: skip


def summary(found: dict, kascade: dict | None, rows: list[Decode], every: int | None) -> dict[str, Any]:
    tasks = np.array([task for row in rows for task in row.tasks])
    clusters = np.array([index for index, row in enumerate(rows) for _ in row.tasks])
    right = found["right"]
    scores = {task: points(cluster_interval(right[tasks == task], clusters[tasks == task]))
              for task in dict.fromkeys(sorted(tasks.tolist()))}  # fmt: skip
    out = {
        "density_decode": found["density"],
        "mean": points(cluster_interval(right, clusters)),
        "scores": scores,
        "kl": round(float(found["kl"].mean()), 4),
        "seconds": found["seconds"],
    }
    if kascade is not None:
        out["mean"]["vs_kascade"] = points(paired_interval(right, kascade["right"], clusters))
    if every:
        age = np.array([step % every for row in rows for steps in row.answers for step in steps])
        hit = found["tokens"]
        out["tokens_by_age"] = {int(a): round(100 * float(hit[age == a].mean()), 1) for a in np.unique(age)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=sorted(DEMO_TASKS))
    parser.add_argument("--profile", type=Path, default=ROOT / "profiles/demo.yaml")
    parser.add_argument("--refresh", default="1,2,4,8,16")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--max-length", default="1k")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model, device="cpu", dtype="float32")
    profile = Profile.load(options.profile)
    kinds, layout, *_ = split_sources([DEMO_TASKS[options.model]], DEMO_TASKS[options.model])
    asked = {"num_prompts": options.num_prompts, "questions": options.questions, "seed": options.seed}
    cases = built_in_cases(kinds, layout, tokenizer, length=parse_size(options.max_length), **asked)
    rows = [Decode(case, tokenizer) for case in cases]
    if len({(len(row.context), len(row.tokens)) for row in rows}) > 1:
        sys.exit("the prompts differ in length and cannot run as a batch: raise --max-length or ask fewer questions")

    every = [int(part) for part in options.refresh.split(",")]
    settings = [{"strategy": "dense"}, {"strategy": "kascade"}]
    settings += [{"strategy": "kascade-refresh", "refresh": n} for n in every]
    dense: list[Tensor] = []
    kascade, results = None, []
    for setting in settings:
        found = measure(model, profile, rows, setting | {"ratio": options.ratio}, dense)
        sparse = setting["strategy"] != "dense"
        if setting["strategy"] == "kascade":
            kascade = found
        other = kascade if "refresh" in setting else None
        results.append(setting | summary(found, other, rows, setting.get("refresh", 1) if sparse else None))
        row = results[-1]
        print(
            f"{setting}: {row['mean']['score']:.1f}, KL {row['kl']}, tokens by age {row.get('tokens_by_age')}",
            file=sys.stderr,
        )
    document = {
        "script": "benchmarks/refresh_stress.py",
        "model": options.model,
        "profile": options.profile.name,
        "ratio": options.ratio,
        "min_keys": profile.budget.min_keys,
        "length": parse_size(options.max_length),
        "prompts": len(rows),
        "questions": sum(len(row.tasks) for row in rows),
        "decode_steps": len(rows[0].tokens) - 1,
        "seed": options.seed,
        "split": "test",
        "dtype": "float32",
        **machine(torch.device("cpu")),
        "rows": results,
    }
    text = json.dumps(document, indent=1) + "\n"
    options.output.write_text(text) if options.output else print(text, end="")


if __name__ == "__main__":
    main()
