"""What a capture costs: time of captured prompts over the same dense forward passes without capture.

    python benchmarks/capture_overhead.py --model demo --length 8k --output benchmarks/results/capture_overhead.json

Dense and captured passes alternate, so that a slower minute of the machine hits both. The capture includes the
writing of the file. One JSON row: seconds at the 20th, 50th and 80th percentile, and the ratio of the medians.
"""

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kascade_cli.capture.run import CaptureOptions, capture_meta, plan_capture, run_capture
from kascade_cli.console import parse_size
from kascade_cli.devset import DevSet, load_devset
from kascade_cli.models import describe, load_model


def machine(device: torch.device) -> dict:
    """What a timing depends on beside the code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads()}


def seconds(device: torch.device, work) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(times, p)), 4) for p in (20, 50, 80)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", default="8k")
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    length = parse_size(arguments.length)
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    info = describe(model, arguments.model)
    options = CaptureOptions(num_prompts=1, max_length=length, tiles_per_prompt=arguments.tiles)
    devset = load_devset("hops", tokenizer, num_prompts=1, max_length=length, seed=0)
    # Exactly `length` tokens, whatever the task's generator made of it.
    tokens = (devset.prompts[0] * 2)[:length]
    devset = DevSet(devset.name, devset.sha256, [tokens], 0, length)
    plan = plan_capture(info, devset, options)
    ids = torch.tensor([tokens], device=model.device)

    @torch.inference_mode()
    def dense() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "capture.h5"

        def captured() -> None:
            run_capture(model, info, devset, target, options, plan=plan, overwrite=True)

        seconds(model.device, dense)
        seconds(model.device, captured)
        pairs = [(seconds(model.device, dense), seconds(model.device, captured)) for _ in range(arguments.repeats)]
        size = target.stat().st_size
    plain, with_capture = ([pair[i] for pair in pairs] for i in (0, 1))
    meta = capture_meta(model, info, devset, options)
    row = {
        "benchmark": "capture_overhead",
        "date": datetime.date.today().isoformat(),
        "machine": machine(model.device),
        "versions": meta["versions"],
        "model": arguments.model,
        "dtype": meta["dtype"],
        "layers": len(info.profiled_layers),
        "tokens": length,
        "tiles": arguments.tiles,
        "repeats": arguments.repeats,
        "dense_s": percentiles(plain),
        "capture_s": percentiles(with_capture),
        "ratio": round(float(np.median(with_capture) / np.median(plain)), 3),
        "target": 1.15,
        "file_bytes": size,
        "nonzero_bytes": plan.nonzero_bytes,
    }
    text = json.dumps(row, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
