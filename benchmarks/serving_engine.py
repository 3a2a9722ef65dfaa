"""The process of `serving.py` that measures one engine: python benchmarks/serving_engine.py JOB.json."""

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def measure(job: dict[str, Any]) -> None:
    """Writes the rows of `job` to job['out'], one JSON line each."""
    import torch
    from vllm import LLM

    dry = job["device"] == "cpu"
    options = {
        "model": job["model"], "skip_tokenizer_init": True, "max_model_len": job["room"],
        "max_num_batched_tokens": job["budget"], "block_size": job["block_size"], "enable_prefix_caching": False,
        "disable_log_stats": True, "max_num_seqs": max([size[0] for size in job["decode"]] or [1]),
        "gpu_memory_utilization": job["memory"], "dtype": "float32" if dry else "bfloat16", "enforce_eager": dry,
        "tensor_parallel_size": job["tensor_parallel"],
    }  # fmt: skip
    if job["weights"] == "random":
        options["load_format"] = "dummy"
    if job["engine"] != "dense":
        options["attention_config"] = {"backend": "CUSTOM"}
        from kascade_cli.integrations.vllm import register

        register()  # as vLLM does it where the package is installed, and not run from a source tree
    llm = LLM(**options)
    config = llm.llm_engine.vllm_config
    shown = {name: value for name, value in options.items() if name != "model"}
    facts = {"flags": shown, "cudagraph_mode": str(config.compilation_config.cudagraph_mode)}
    sync = (lambda: None) if dry else torch.cuda.synchronize
    with open(job["out"], "a", encoding="utf-8") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row | {"engine": job["engine"]} | facts | read_so_far()) + "\n")
            out.flush()

        for (requests, tokens), new in zip(job["decode"], job["new"], strict=True):
            write(decode_row(llm, requests, tokens, new, job, sync))
        for tokens in job["first"]:
            write(first_row(llm, tokens, job, sync))


def read_so_far() -> dict[str, Any]:
    """What the plugin says of this process."""
    served = sys.modules.get("kascade_cli.integrations.vllm.served")
    if served is None or served._current is None:
        return {}
    report = served._current[1].reporter.report()
    return {"plugin": {name: report[name] for name in ("strategy", "backend", "fallbacks", "phases", "roles")}}


def add(llm: Any, name: str, tokens: int, new: int, vocabulary: int) -> None:
    from vllm import SamplingParams

    ids = random.Random(name).choices(range(10, vocabulary - 10), k=tokens)
    wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, wanted)


def decode_row(llm: Any, requests: int, tokens: int, new: int, job: dict[str, Any], sync: Any) -> dict[str, Any]:
    """Tokens a second of `requests` requests that decode together from `tokens` tokens on."""
    engine, steps = llm.llm_engine, job["steps"]
    names = [f"d{tokens}-{number}" for number in range(requests)]
    for name in names:
        add(llm, name, tokens, new, job["vocabulary"])
    began, seen = time.perf_counter(), set()
    while len(seen) < requests:  # those that are done earlier decode meanwhile
        seen |= {out.request_id for out in engine.step() if out.outputs[0].token_ids}
    sync()
    prefill = time.perf_counter() - began
    runs, profile = [], {}
    for window in range(job["runs"] + 1):
        sync()
        began = time.perf_counter()
        made = sum(len(engine.step()) for _ in range(steps))  # a token of every request that it has news of
        sync()
        took = time.perf_counter() - began
        if window:  # the first warms up
            runs.append(made / took)
        if engine.get_num_unfinished_requests() < requests:
            raise SystemExit("error: a request ended before the last window")
    if job["profile_steps"]:
        profile = {"kernels": kernels_of(engine, 8)}
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    rate = statistics.median(runs)
    return {
        "case": "decode", "requests": requests, "tokens": tokens, "tokens_per_s": round(rate, 2),
        "ms_per_step": round(1000 * requests / rate, 4), "runs": [round(run, 2) for run in runs],
        "prefill_s": round(prefill, 3),
    } | profile  # fmt: skip


def kernels_of(engine: Any, steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step of each kernel, the longest first."""
    import torch

    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            engine.step()
    found = [(event.key, event.self_device_time_total / 1000 / steps) for event in profiler.key_averages()]
    top = sorted(found, key=lambda entry: -entry[1])[:25]
    return [{"name": name[:120], "ms": round(ms, 4)} for name, ms in top if ms > 0]


def first_row(llm: Any, tokens: int, job: dict[str, Any], sync: Any) -> dict[str, Any]:
    """Seconds to the first token of one request alone."""
    engine, runs = llm.llm_engine, []
    for number in range(job["runs"] + 1):
        sync()
        began = time.perf_counter()
        add(llm, f"f{tokens}-{number}", tokens, 1, job["vocabulary"])
        while engine.has_unfinished_requests():
            engine.step()
        sync()
        if number:  # the first compiles what this length needs
            runs.append(time.perf_counter() - began)
    return {
        "case": "first token", "requests": 1, "tokens": tokens, "seconds": round(statistics.median(runs), 4),
        "runs": [round(run, 4) for run in runs],
    }  # fmt: skip


if __name__ == "__main__":
    measure(json.loads(Path(sys.argv[1]).read_text()))
