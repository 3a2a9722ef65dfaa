"""Wall time and peak memory of `kascade select-anchors` on a synthetic capture of a real model's size.

    python benchmarks/select_anchors.py    # 32 layers x 8 KV heads x 32 tiles x 100 prompts x 8k keys
    python benchmarks/select_anchors.py --prompts 5 --keep capture.h5

Every prompt is distinct: per (layer, head) and per tile random log-normal patterns, multiplied, with sink
keys and a local window, written with the store's own compression. Half of the tiles are decode rows. Peak
memory is the largest sum of resident sets over the command and its workers, sampled from /proc every 50 ms.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from kascade_cli.capture.parts import MARKER
from kascade_cli.capture.store import SCHEMA_VERSION, CaptureStore

LAUNCH = "from kascade_cli.app import main; main()"
TILE = 32


def prompt_mass(rng: np.random.Generator, layers: int, heads: int, tiles: np.ndarray, keys: int) -> np.ndarray:
    """float16 [layers, tiles, heads, keys]; rows sum to 1 and are zero after the causal edge."""
    shared = rng.standard_normal((4, 1, keys), np.float32)  # four families of layers that look at the same keys
    family = shared[np.arange(layers) * 4 // layers]
    own = np.exp(1.6 * family + 1.4 * rng.standard_normal((layers, heads, keys), np.float32))
    own[:, :, :4] += 200
    out = np.zeros((layers, len(tiles), heads, keys), np.float16)
    for t, (start, length) in enumerate(tiles):
        end = int(start + length)
        row = np.exp(1.2 * rng.standard_normal(end, np.float32))
        row[max(0, end - 64) :] *= 30
        mass = own[:, :, :end] * row
        mass /= mass.sum(axis=-1, keepdims=True)
        bits = mass.astype(np.float16).view(np.uint16)
        out[:, t, :, :end].view(np.uint16)[...] = bits
    return out


def write(path: Path, layers: int, heads: int, tiles: int, prompts: int, keys: int) -> None:
    """The capture contract, straight to one file."""
    meta = {
        "schema_version": SCHEMA_VERSION, "tool_version": "benchmark", "model_name": "synthetic", "layers": layers,
        "model_fingerprint": "sha256:" + "0" * 64, "query_heads": 4 * heads, "kv_heads": heads, "head_dim": 128,
        "tile": TILE, "seed": 0, "dtype": "bfloat16", "device": "cpu", "dev_set_name": "synthetic",
        "dev_set_sha256": "0" * 64, "num_prompts": prompts, "max_length": keys, "options": {}, "versions": {},
        "top_mass_keys": ["64", "256", "5%", "10%", "20%"],
    }  # fmt: skip
    store = CaptureStore(path, meta, list(range(layers)))
    store.parts.mkdir()
    for index in range(prompts):
        rng = np.random.default_rng(index)
        starts = rng.choice(np.arange(1, keys // TILE), tiles, replace=False) * TILE
        chosen = np.array([(start, 1 if t % 2 else TILE) for t, start in enumerate(starts)], np.int32)
        writer = store.begin(index, rng.integers(1 << 15, size=keys).tolist(), chosen, keys)
        mass = prompt_mass(rng, layers, heads, chosen, keys)
        for layer in range(layers):
            writer.write_mass(layer, 0, mass[layer])
        top_mass = np.sort(rng.random((layers, 4 * heads, 5), np.float32), axis=-1)
        writer.finish(rng.random(layers, np.float32), top_mass)
        print(f"\rwriting prompt {index + 1}/{prompts}", end="", file=sys.stderr, flush=True)
    (store.parts / "lock").write_bytes(MARKER)
    store.join()
    print(file=sys.stderr)


def tree_rss(pid: int) -> int:
    """Bytes resident in `pid` and all its descendants."""
    total, pending = 0, [pid]
    while pending:
        current = pending.pop()
        try:
            status = Path(f"/proc/{current}/statm").read_text().split()
            total += int(status[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{current}/task").iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, IndexError):
            continue
    return total


def run(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes of the whole process tree)."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], tree_rss(process.pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    return time.perf_counter() - began, peak[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 32), ("heads", 8), ("tiles", 32), ("prompts", 100), ("keys", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="write the capture here, and use it if it exists")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "select_anchors.json")
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in ("layers", "heads", "tiles", "prompts", "keys")}
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "capture.h5"
        if not path.exists():
            write(path, **shape)
        command = [sys.executable, "-c", LAUNCH, "select-anchors", str(path), "--no-verify", "--overwrite"]
        load = os.getloadavg()[0]
        cpu = children_seconds()
        runs = [run([*command, "-o", str(Path(folder) / "profile.yaml")]) for _ in range(options.repeat)]
        size = path.stat().st_size
    seconds, peak = min(runs)
    row = shape | {
        "capture_bytes": size, "raw_bytes": int(np.prod(list(shape.values()))) * 2, "seconds": round(seconds, 2),
        "all_seconds": [round(entry[0], 2) for entry in runs], "peak_rss_bytes": max(entry[1] for entry in runs),
        "cores": len(os.sched_getaffinity(0)), "cpu": cpu_name(), "date": datetime.now(UTC).date().isoformat(),
        "cpu_seconds": round((children_seconds() - cpu) / options.repeat, 2),
        "load_average_before": round(load, 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "h5py")},
        "compression": "gzip, level 1",
        "target": {"seconds": 120, "peak_rss_bytes": 2_000_000_000},
    }  # fmt: skip
    options.output.write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps(row, indent=2))


def children_seconds() -> float:
    """CPU seconds, user and system, of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
