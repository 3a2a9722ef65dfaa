"""Peak memory of a capture against the prompt's length: it must grow linearly, never with the square.

    python benchmarks/capture_memory.py --lengths 4k,8k,16k --output benchmarks/results/capture_memory.json

Every point is a process of its own: peak above what the loaded model takes, for the dense forward pass and for the
captured one (file included). Resident memory on a CPU, allocated memory on a GPU. `growth` is the ratio of one
increment to the one before: 2 for linear growth, 4 for quadratic; the target is at most 2.3.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kascade_cli.capture.run import CaptureOptions, capture_meta, plan_capture, run_capture
from kascade_cli.console import format_size, parse_size, parse_sizes
from kascade_cli.devset import DevSet
from kascade_cli.models import describe, load_model

TARGET = 2.3


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Peak:
    """Bytes above the level at the start, at most."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = status("VmRSS")

    def bytes(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.start
        return status("VmHWM") - self.start


def point(arguments: argparse.Namespace) -> dict:
    """One measurement, in this process."""
    length = parse_size(arguments.length)
    model, _ = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    info = describe(model, arguments.model)
    tokens = torch.randint(16, 400, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    devset = DevSet("random", "0" * 64, [tokens], 0, length)
    options = CaptureOptions(num_prompts=1, max_length=length, tiles_per_prompt=arguments.tiles)
    plan = plan_capture(info, devset, options)
    with tempfile.TemporaryDirectory() as folder:

        def work(ids: list[int]) -> None:
            if arguments.mode == "capture":
                short = DevSet("random", "0" * 64, [ids], 0, len(ids))
                tiles = plan if len(ids) == length else plan_capture(info, short, options)
                run_capture(model, info, short, Path(folder) / "c.h5", options, plan=tiles, overwrite=True)
            else:
                with torch.inference_mode():
                    model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)

        work(tokens[:256])  # what is allocated once: kernels, HDF5, the compressor
        peak = Peak(model.device)
        work(tokens)
        used = peak.bytes()
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "resident memory, CPU"
    return {"bytes": used, "measured": name, "versions": capture_meta(model, info, devset, options)["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--lengths", default="4k,8k,16k")
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--length", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=["dense", "capture"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.length:
        print(json.dumps(point(arguments)))
        return

    lengths = parse_sizes(arguments.lengths)
    peaks: dict[str, list[int]] = {"dense": [], "capture": []}
    for length in lengths:
        for mode in peaks:
            same = ["--model", arguments.model, "--tiles", arguments.tiles, "--dtype", arguments.dtype]
            command = [
                sys.executable,
                __file__,
                *same,
                "--device",
                arguments.device,
                "--length",
                length,
                "--mode",
                mode,
            ]
            # One arena, and large blocks go back at once: resident memory then follows what is in use.
            environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            run = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
            if run.returncode:
                raise SystemExit(run.stderr)
            measured = json.loads(run.stdout)
            peaks[mode].append(measured["bytes"])
            print(f"{format_size(length)} {mode}: {measured['bytes'] / 1e6:.1f} MB", file=sys.stderr)

    def growth(values: list[int]) -> list[float]:
        steps = [later - earlier for earlier, later in zip(values, values[1:], strict=False)]
        return [round(later / earlier, 2) for earlier, later in zip(steps, steps[1:], strict=False)]

    row = {
        "benchmark": "capture_memory",
        "date": datetime.date.today().isoformat(),
        "measured": measured["measured"],
        "versions": measured["versions"],
        "model": arguments.model,
        "tiles": arguments.tiles,
        "tokens": lengths,
        "dense_bytes": peaks["dense"],
        "capture_bytes": peaks["capture"],
        "growth": growth(peaks["capture"]),
        "growth_dense": growth(peaks["dense"]),
        "target": TARGET,
        "met": all(value <= TARGET for value in growth(peaks["capture"])),
    }
    text = json.dumps(row, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
